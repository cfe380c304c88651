"""The cost of a network: parameters, multiply-accumulates and activation memory, level by level."""

import collections
import dataclasses
import logging
import resource

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from models.create import create_from_fields

RESAMPLING = {torch.ops.aten.avg_pool2d: 4, torch.ops.aten.upsample_nearest2d: 1}  # MACs per output value
SHARED = "time and class"  # the part outside all levels: embeddings and their projections


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one part of a network, or of all of it, for one image."""

    part: str
    size: int  # height and width of its features, 0 if it has none
    parameters: int
    gmacs: float  # 10⁹ multiply-accumulates of a forward pass
    plain_gmacs: float  # without attention and its projections, which the paper's tables leave out
    activation_bytes: int  # what a float32 forward pass keeps for the backward pass, per image


def describe(config_fields):
    """Return the costs of the network of dotted config fields, a list of `Cost`: one per part, then their total.

    Nothing is computed: the network runs on fake tensors. Convolutions, matrix products and both products of attention
    are counted, and DhariwalUNet's resampling as a 2×2 filter, so that the totals agree with the paper's table.
    Raises UserError as `create_from_fields`.
    """
    with torch.device("meta"):
        net = create_from_fields(config_fields)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = net.to_empty(device="cpu")
        one, two = measure(net, 1), measure(net, 2)
    parameters = collections.Counter()
    for name, parameter in net.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    rows = [Cost(part, one.sizes.get(part, 0), parameters[part], one.macs[part] / 1e9,
                 (one.macs[part] - one.attention_macs[part]) / 1e9, two.kept[part] - one.kept[part])
            for part in parameters]
    total = [sum(getattr(row, field.name) for row in rows) for field in dataclasses.fields(Cost)[2:]]
    return [*rows, Cost("total", 0, *total)]


def measure(net, batch):
    """Return the `Meter` of a forward pass of `batch` images on the device of the network."""
    meter = Meter(net)
    with meter.tracker, meter, saved_tensors_hooks(meter.keep, lambda kept: kept):
        net(*_inputs(net, batch))
    return meter


def _inputs(net, batch):
    """Return x, t and label (None without classes) of `batch` images, all zeros, on the device of the network."""
    device, fields = next(net.parameters()).device, net.config_fields
    size, classes = fields["data.image_size"], fields["data.num_classes"]
    return (torch.zeros(batch, fields["data.num_channels"], size, size, device=device),
            torch.zeros(batch, device=device), torch.zeros(batch, classes, device=device) if classes else None)


def cost_of(net):
    """Return {name: value} for evaluating a network in eval mode on its device: size, operations, median time, memory.

    One multiply-accumulate counts as two floating-point operations. The memory is the peak on the GPU during a batch,
    including the weights; on a CPU, the peak of this process so far.
    """
    device, gmacs = next(net.parameters()).device, sum(measure(net, 1).macs.values()) / 1e9
    cuda = device.type == "cuda"
    batch = 64 if cuda else 8
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        one, many = (median_seconds(net, *_inputs(net, images)) for images in (1, batch))
    peak = torch.cuda.max_memory_allocated(device) if cuda else 1024 * resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss
    return {"parameters": sum(p.numel() for p in net.parameters()), "gmacs": round(gmacs, 6),
            "gflops": round(2 * gmacs, 6), "latency_ms": round(1000 * one, 3),
            "batch_latency_ms": round(1000 * many, 3), "latency_batch": batch,
            "peak_memory_mib": round(peak / 2**20, 1), "threads": torch.get_num_threads()}


def median_seconds(call, *arguments, seconds=0.5):
    """Return the median time of `call(*arguments)` in seconds, measured for about `seconds` after a warm-up call."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns if there is nvcc but no GPU
    from torch.utils.benchmark import Timer

    timer = Timer("call(*arguments)", globals={"call": call, "arguments": arguments},
                  num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median


def fastest_layout(net, velocity, batch):
    """Return the memory format in which forward and backward of `velocity`, on `batch` images, take less time.

    It is measured, since it depends on GPU, precision and torch's kernels. `net` keeps its weights and no gradients.
    """
    def forward_backward():
        velocity(*_inputs(net, batch)).square().mean().backward()

    seconds = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        net.to(memory_format=layout)
        seconds[layout] = median_seconds(forward_backward, seconds=0.2)
    net.zero_grad(set_to_none=True)
    return min(seconds, key=seconds.get)


def cost_line(cost):
    """Return the result of `cost_of` as a line of text."""
    return (f"{cost['parameters']:,} parameters, {cost['gmacs']:.4g} GMACs ({cost['gflops']:.4g} GFLOPs) "
            f"an evaluation, {cost['latency_ms']:.3g} ms for one image, {cost['batch_latency_ms']:.3g} ms for "
            f"{cost['latency_batch']}, {cost['peak_memory_mib']:.0f} MiB at most")


def part_of(name):
    """Return the part that the module or parameter called `name` belongs to."""
    first, *rest = name.removeprefix("net.").split(".")  # net: in EDM's preconditioning
    if first in ("encoder", "decoder") and rest:
        return f"{first} {int(rest[0]) + 1}"
    if first == "middle" or first.startswith(("input", "output")):
        return first.split("_")[0]
    return SHARED


class Meter(TorchDispatchMode):
    """Counts, per part, the multiply-accumulates of operations and the bytes of tensors kept for the backward pass."""

    def __init__(self, net):
        super().__init__()
        self.macs, self.attention_macs, self.kept = collections.Counter(), collections.Counter(), collections.Counter()
        self.sizes = {}  # height and width of the output of each part's first convolution: that of its level
        self.count_resampling = net.config_fields["model.name"] == "DhariwalUNet"
        self.tracker = ModuleTracker()
        self.seen = {p.untyped_storage()._cdata: p for p in [*net.parameters(), *net.buffers()]}

    def part(self):
        """Return the part that is running; the tracker has the names of the running modules, after the class name."""
        parts = {part_of(name.partition(".")[2]) for name in self.tracker.parents} - {SHARED}
        return min(parts, default=SHARED)

    def keep(self, tensor):
        """Count a tensor that autograd keeps, once, unless it is a parameter."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor  # kept alive, so that no other tensor gets its address
            self.kept[self.part()] += storage.nbytes()
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        operation, macs = function.overloadpacket, 0
        if operation in flop_registry:
            macs = flop_registry[operation](*args, **(kwargs or {}), out_val=out) // 2
        elif operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            macs = sdpa_flop_count(*(a.shape for a in args[:3])) // 2
        elif self.count_resampling and operation in RESAMPLING:
            macs = RESAMPLING[operation] * out.numel()
        if macs:
            part = self.part()
            self.macs[part] += macs
            self.attention_macs[part] += macs * any("attention" in name for name in self.tracker.parents)
            if operation is torch.ops.aten.convolution:
                self.sizes.setdefault(part, out.shape[-1])
        return out


def table(rows):
    """Return a list of `Cost` as a text table."""
    lines = [f"{row.part:<15} {f'{row.size}²' * (row.size > 0):>6} {row.parameters:>12,} {row.gmacs:>9.4f} "
             f"{row.plain_gmacs:>13.4f} {row.activation_bytes / 2**20:>8.2f} MiB" for row in rows]
    return "\n".join([
        f"{'part':<15} {'size':>6} {'parameters':>12} {'GMACs':>9} {'no attention':>13} {'activations':>12}", *lines])
