"""Devices and processes: CUDA where there is one, the CPU otherwise; torchrun or a single process; precision."""

import contextlib
import dataclasses
import os

import torch
import torch.distributed as dist

from runtime.terminal import UserError, print_message


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started (a single process is rank 0 of 1)."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        """Whether this process writes the files of which there is one: logs, plots, reports."""
        return self.rank == 0

    def say(self, message):
        """Print a line in process 0 only."""
        if self.is_main:
            print_message(message)

    def from_main(self, work):
        """Call `work()` in process 0; return its result, or raise its UserError or OSError, in every process."""
        result = error = None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as caught:
                error = caught
        result, error = gather((result, error))[0]
        if error is not None:
            raise error
        return result


def gather(value):
    """Return the list of every process's picklable `value`, in the order of ranks. Every process must call it."""
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def start_processes(patience=None):
    """Yield the `Processes` of this process, started by torchrun or alone, with its device.

    Each uses the GPU of its local rank with NCCL; without GPUs all use the CPU with gloo. UserError for too few GPUs.
    patience: how long a process waits for another, a `datetime.timedelta` (None: torch's 10 or 30 minutes).
    """
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend, own = torch.device("cpu"), "gloo", {}
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError("this machine has fewer GPUs than processes: start torchrun with --nproc_per_node="
                            f"{torch.cuda.device_count()} or fewer")
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
        own = {"device_id": device}  # otherwise NCCL guesses it
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group(backend, timeout=patience, **own)
    try:
        dist.barrier()  # a process that fails at once must not exit while others are joining
        yield Processes(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def explained(advice):
    """Turn two failures in the `with` block into a UserError: torch.compile's, and too little memory (see `advice`)."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so are all of torch.compile
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"out of memory: {advice}") from error
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise UserError("config.training.compile is true, but torch.compile fails: "
                        f"{f'{type(cause).__name__}: {cause}'.splitlines()[0]}; set it to false, or install the "
                        "compiler it needs") from error


def set_precision(precision):
    """Allow TF32 in float32 matrix products and convolutions, except for "fp32"; autocast leaves some in float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def set_deterministic(deterministic):
    """Use deterministic algorithms, with equal bits in every run on one GPU, or the fastest that cuDNN finds."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # all batches of a run have one shape


def autocast(precision, device):
    """Return the autocast context of a precision: bfloat16, float16 (CUDA only), or none."""
    kind = torch.device(device).type
    if precision == "bf16" or (precision == "fp16" and kind == "cuda"):
        return torch.autocast(kind, torch.bfloat16 if precision == "bf16" else torch.float16)
    return contextlib.nullcontext()


def in_precision(network, precision, device):
    """Return `network(x, t, label)` computed in `precision`, with float32 output."""

    def call(x, t, label=None):
        with autocast(precision, device):
            return network(x, t, label).float()

    return call


def compiled(network, options, say=lambda text: None):
    """Return `network(x, t, label)` without gradients, compiled if config.training (`options`) asks for it.

    All calls run one graph, with as many rows as the largest batch so far: in a smaller one, the last rows are those of
    an earlier call, and their results are dropped. Results are copies: a CUDA graph writes all into the same memory.
    say: called with a sentence about the time that this takes.
    """
    if not options.compile:
        return network
    say("compiling the network; the first time takes a minute or more")
    # dynamic: otherwise batches of two sizes, as of student and teacher, make the second graph one for all sizes
    run, inputs = torch.compile(network, mode=options.compile_mode, dynamic=False), []

    def call(x, t, label=None):
        given, count = [value for value in (x, t, label) if value is not None], len(x)
        if not inputs or len(inputs[0]) < count:
            inputs[:] = [torch.empty_like(value) for value in given]
        for buffer, value in zip(inputs, given, strict=True):
            buffer[:count] = value
        return run(*inputs)[:count].clone()

    return call
