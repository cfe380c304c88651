"""Devices and processes: CUDA where there is one, the CPU otherwise; torchrun or a single process."""

import dataclasses
import os

import torch
import torch.distributed as dist

from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started (a single process is rank 0 of 1)."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        """Whether this process writes what is written once: logs, pictures, reports."""
        return self.rank == 0

    def barrier(self):
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def share(self, value, source=0):
        """Return process `source`'s picklable `value` in every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def from_main(self, work):
        """Return in every process what `work()` returns in process 0.

        Where it raises a UserError or cannot write, every process raises that, instead of waiting for process 0.
        """
        result = error = None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as caught:
                error = caught
        result, error = self.share((result, error))
        if error is not None:
            raise error
        return result


def start_processes(patience=None):
    """Join the processes that torchrun started, if it did, and choose this one's device.

    Each process takes the GPU of its local rank with NCCL; without GPUs all take the CPU with gloo.
    patience: the longest that one waits for another, a `datetime.timedelta` (None: torch's 10 or 30 minutes).
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return Processes(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return Processes(dist.get_rank(), world_size, device)


def stop_processes():
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
