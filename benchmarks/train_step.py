"""A whole training step: ours against the same step done the released way, in one run; on CUDA unchanged.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py | tee benchmarks/train_step.txt

The peer has the same weights, batch and objective: the network computed the released way (benchmarks/networks.py),
per-tensor gradient clipping, Adam and EMA loops, and a read of the loss at every step. Rounds alternate; figures are
medians. One multiply-accumulate counts as two operations, and backward as twice forward.
"""

import argparse
import pathlib
import platform
import resource
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from networks import Count, mm_peak, released_way  # noqa: E402

from configs.default import get_default_config  # noqa: E402
from datasets import Batch  # noqa: E402
from flows.objective import Draws, create_objective  # noqa: E402
from flows.rectified_flow import velocity_from_network  # noqa: E402
from models import create_model  # noqa: E402
from models.describe import describe  # noqa: E402
from models.ema import ExponentialMovingAverage  # noqa: E402
from runtime.devices import autocast, set_precision  # noqa: E402
from runtime.seeds import DRAWS, step_generator  # noqa: E402
from training.update import UpdateStats, apply_update, create_optimizer  # noqa: E402

SHAPE = (3, 32, 32)


class OurStep:
    """The step of train.py."""

    def __init__(self, network, config, device):
        self.config, self.device = config, device
        self.network = network.to(memory_format=torch.channels_last)
        parameters = list(network.parameters())
        self.optimizer = create_optimizer(parameters, name="Adam", lr=2e-4, beta1=0.9, eps=1e-8, weight_decay=0.0)
        self.ema, self.stats = ExponentialMovingAverage(parameters, 0.999999), UpdateStats(device)
        self.objective = create_objective(config, device=device)

    def velocity(self, x, t, label=None):
        """The network in the precision that is measured."""
        with autocast(self.config.training.precision, self.device):
            return velocity_from_network(self.network)(x, t, label).float()

    def __call__(self, update, batch):
        """Do one update."""
        draws = Draws(step_generator(0, update, DRAWS, self.device), len(batch.z1), device=self.device)
        loss = self.objective(self.velocity, batch, draws, update).mean()
        loss.backward()
        apply_update(update, self.optimizer, self.ema, self.stats, loss.detach(), grad_clip=1.0)
        self.optimizer.zero_grad(set_to_none=True)


class ReleasedStep:
    """The same step with a loop over the tensors for everything, and the loss read each time."""

    def __init__(self, network, config, device):
        self.network, self.device = released_way(network), device
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=2e-4, foreach=False, fused=False)
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.objective = create_objective(config, device=device)

    def __call__(self, update, batch):
        """Do one update."""
        generator = torch.Generator(self.device).manual_seed(update)
        draws = Draws(generator, len(batch.z1), device=self.device)
        self.optimizer.zero_grad()
        loss = self.objective(velocity_from_network(self.network), batch, draws, update).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=False)
        self.optimizer.step()
        with torch.no_grad():
            for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
                shadow.sub_((1 - 0.999) * (shadow - parameter))
        loss.item()


def seconds(step, update, batch, device):
    """Return (wall seconds, CPU seconds) of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step(update, batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_mib(device):
    """Return the peak memory in MiB: the GPU's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    """Print one line for each way, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"), help="of our step, on CUDA")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(options.precision)
    torch.manual_seed(0)
    config = get_default_config()
    config.model.nf, config.model.num_res_blocks, config.model.ch_mult = 64, 1, (1, 1, 2)
    config.training.precision = options.precision
    network = create_model(config).to(device).train()
    gmacs = describe(network.config_fields)[-1].gmacs
    steps = {"released way": ReleasedStep(network, config, device), "ours": OurStep(network, config, device)}
    batch = Batch(None, torch.rand(options.batch, *SHAPE, device=device) * 2 - 1)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else platform.machine()}, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads, CIFAR 3.4M ({gmacs:.2f} GMACs), batch "
          f"{options.batch}, ours in {options.precision}, peer in fp32, medians of {options.rounds} rounds")
    peak = mm_peak()
    counts, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step(0, batch)
        with Count() as count:
            step(1, batch)
        counts[name] = count.operations
    for number in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, 2 + number, batch, device))
    wall = {name: statistics.median(w for w, _ in taken) for name, taken in times.items()}
    cpu = {name: statistics.median(c for _, c in taken) for name, taken in times.items()}
    for name in steps:
        rate = 3 * 2 * gmacs * options.batch / wall[name] / 1e3
        print(f"{name:<13} {1e3 * wall[name]:8.1f} ms wall, {1e3 * cpu[name]:8.1f} ms CPU, "
              f"{options.batch / wall[name]:8.1f} images/s, {rate:7.3f} TFLOP/s, {counts[name]:>5} operations")
    print(f"ours is {wall['released way'] / wall['ours']:.2f} times as fast in wall time, "
          f"{cpu['released way'] / cpu['ours']:.2f} in CPU time; peak memory {peak_mib(device):.0f} MiB (both); "
          f"torch.mm {peak / 1e3:.3f} TFLOP/s on the CPU")


if __name__ == "__main__":
    main()
