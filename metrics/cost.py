"""What it costs to use a network: size, arithmetic, time and memory on the present device."""

import resource
import statistics
import time

import torch

REPEATS, TIME_LIMIT = 10, 2.0  # timed calls, and the seconds after which no further one begins
BATCH = {"cuda": 64, "cpu": 8}  # images of the batch latency


def cost_of(net, gmacs, device):
    """Return {what: value} of a network that is called as net(x, t, label), in eval mode on `device`.

    latency_ms: one evaluation of one image; batch_latency_ms: of `latency_batch` images. peak_memory_mib: of the
    GPU during the batch, weights included; on a CPU the most that this process has held so far.
    One multiply-accumulate counts as two floating-point operations.
    """
    batch = BATCH[device.type]
    one = median_ms(lambda: evaluate(net, 1, device), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    many = median_ms(lambda: evaluate(net, batch, device), device)
    return {
        "parameters": sum(p.numel() for p in net.parameters()), "gmacs": round(gmacs, 6), "gflops": round(2 * gmacs, 6),
        "latency_ms": round(one, 3), "batch_latency_ms": round(many, 3), "latency_batch": batch,
        "peak_memory_mib": round(peak_memory(device) / 2**20, 1), "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def evaluate(net, batch, device):
    """Evaluate the network once on a batch of zeros; what the numbers are changes no time."""
    size, channels, classes = (net.config_fields[f"data.{name}"] for name in ("image_size", "num_channels",
                                                                              "num_classes"))
    label = torch.zeros(batch, classes, device=device) if classes else None
    net(torch.zeros(batch, channels, size, size, device=device), torch.ones(batch, device=device), label)


def median_ms(call, device):
    """Return the median milliseconds of a call that leaves its work on `device`; one call before is not counted."""
    times = []
    began = time.perf_counter()
    while len(times) <= REPEATS and (len(times) < 2 or time.perf_counter() - began < TIME_LIMIT):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def peak_memory(device):
    """Return bytes: allocated on the GPU at most since the last reset, or resident in this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cost_line(cost):
    """Return the cost as one line for people."""
    return (f"{cost['parameters']:,} parameters, {cost['gmacs']:.4g} GMACs ({cost['gflops']:.4g} GFLOPs) "
            f"an evaluation, {cost['latency_ms']:.3g} ms for one image, {cost['batch_latency_ms']:.3g} ms for "
            f"{cost['latency_batch']}, {cost['peak_memory_mib']:.0f} MiB at most")
