"""Ours compared with the released code's way of computing, on the CPU: both U-Nets, or a whole training step.

    OMP_NUM_THREADS=2 python -m benchmarks.released networks | tee benchmarks/networks.txt
    OMP_NUM_THREADS=1 python -m benchmarks.released step | tee benchmarks/train_step.txt

Networks: forward and backward passes at all configurations of the paper. The peer has the same weights and velocity,
computed as in the released networks: attention by einsum with its pixels × pixels matrix, 1×1 projections between
permutations, resampling by reshaping or filters, the embedding projected in each block. The released CIFAR 3.4M network
dispatches 587 operations in a forward pass; the peer's are printed. Runs alternate (ours, peer and, forward only, ours
in channels_last, the layout in which `load_model` returns a network on a CPU); ratio is the peer's time over ours.
GFLOP/s counts two operations per multiply-accumulate of our forward pass; torch.mm, in the same run, shows the peak of
the machine.

Step: ours is the update of train.py. The peer has the same weights, batches and objective, the network as above,
per-tensor gradient clipping, Adam and EMA loops, and a read of the loss at every step. Rounds alternate.

Figures are medians; operations are those that torch dispatches.
"""

import copy
import functools
import itertools
import math
import statistics
import time
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configs.command_line import run_program
from configs.default import Field, get_default_config, set_field
from datasets.sources import DATASETS, DataSet, ImageSet
from flows.objective import Draws
from flows.rectified_flow import velocity_from_network
from models import layers
from models.create import create_from_fields
from models.describe import describe
from models.dhariwal_unet import DhariwalUNet
from models.ncsnpp import NCSNpp
from models.released import PUBLISHED
from runtime.devices import Processes
from runtime.run_folder import git_commit
from runtime.seeds import DRAWS, step_generator
from train import Training

FLAGS = {"part": Field("networks", "what to compare", choices=("networks", "step"))}
GMACS_PER_RUN, ROUNDS = 5.0, 5  # networks: the batch of small ones is chosen for about this much work
SMALL = {"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)}  # CIFAR-10's 3.4M
STEP_BATCH, STEP_ROUNDS = 16, 9


# The peer's networks: methods for our modules, as in the released code. First those of NCSN++.


def nin_attention(self, x):
    """Three input projections and one of the output, each a tensordot between permutations; einsum attention."""
    n, c, height, width = x.shape

    def project(x, rows, layer):
        y = torch.tensordot(x.permute(0, 2, 3, 1), layer.weight[rows].t(), dims=1) + layer.bias[rows]
        return y.permute(0, 3, 1, 2)

    h = self.norm(x)
    q, k, v = (project(h, slice(i * c, (i + 1) * c), self.qkv) for i in range(3))
    w = torch.einsum("bchw,bcij->bhwij", q, k) * (c ** -0.5)
    w = w.reshape(n, height, width, -1).softmax(dim=-1).reshape(n, height, width, height, width)
    return project(torch.einsum("bhwij,bcij->bchw", w, v), slice(None), self.proj)


def reshape_resampling(self, x, shifts=None):
    """Up: repeat every pixel; down: mean over two dimensions of the reshaped image."""
    n, c, height, width = x.shape
    if self.up:
        return x.view(n, c, height, 1, width, 1).repeat(1, 1, 1, 2, 1, 2).view(n, c, 2 * height, 2 * width)
    return x.reshape(n, c, height // 2, 2, width // 2, 2).mean(dim=(3, 5))


def time_shifts(self, t999, label):
    """Each block activates and projects the time embedding itself."""
    emb = self.time_embedding.linear1(F.silu(self.time_embedding.linear0(self.time_features(t999))))
    return (linear(F.silu(emb)) for linear in self.time_linears)


# Those of DhariwalUNet.


def einsum_attention(self, x):
    """1×1 convolutions, batched heads, float32 einsum attention."""
    n, c, height, width = x.shape
    qkv = F.conv2d(self.norm(x), self.qkv.weight[:, :, None, None], self.qkv.bias)
    q, k, v = qkv.reshape(n, 3, self.heads, -1, height * width).transpose(0, 1).flatten(1, 2).unbind()
    w = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float()).softmax(dim=2)
    mixed = torch.einsum("nqk,nck->ncq", w, v).reshape(n, c, height, width)
    return F.conv2d(mixed, self.proj.weight[:, :, None, None], self.proj.bias)


def filter_resampling(self, x, shifts=None):
    """Up: transposed convolution of each channel with ones; down: convolution with 1/4."""
    convolve, value = (F.conv_transpose2d, 1.0) if self.up else (F.conv2d, 0.25)
    return convolve(x, x.new_full((x.shape[1], 1, 2, 2), value), stride=2, groups=x.shape[1])


def scales_and_shifts(self, t999, label):
    """Each block projects the embedding itself."""
    emb = self.embed(t999, label)
    return (linear(emb) for linear in self.affine_linears)


RELEASED_WAY = {
    "ncsnpp": {layers.SelfAttention: nin_attention, layers.Resampling: reshape_resampling, NCSNpp: time_shifts},
    "DhariwalUNet": {layers.SelfAttention: einsum_attention, layers.Resampling: filter_resampling,
                     DhariwalUNet: scales_and_shifts},
}


def released_way(net):
    """Return a copy of a network that computes as in the released code."""
    peer = copy.deepcopy(net)
    methods = RELEASED_WAY[net.config_fields["model.name"]]
    for module in peer.modules():
        if method := methods.get(type(module)):
            setattr(module, method.__name__ if module is peer else "forward", types.MethodType(method, module))
    return peer


class Count(TorchDispatchMode):
    """Counts dispatched aten operations."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def forward(net, inputs):
    with torch.no_grad():
        net.eval()(*inputs)


def forward_backward(net, inputs):
    net.train()(*inputs).square().mean().backward()
    net.zero_grad(set_to_none=True)


def medians_in_turns(works, rounds):
    """Return {name: [wall-clock, CPU]} of {name: function}, called in turns: medians of rounds after a warm-up."""
    times = {name: [] for name in works}
    for name in [*works] * (1 + rounds):
        started = time.perf_counter(), time.process_time()
        works[name]()
        times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {name: [*map(statistics.median, zip(*taken[1:], strict=True))] for name, taken in times.items()}


def compare(name, fields):
    """Print the line of one configuration; return the ratios (forward, forward and backward)."""
    torch.manual_seed(0)
    net = create_from_fields(fields)
    for p in net.parameters():  # zeros would make the comparison of velocities trivial
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    gmacs = describe(fields)[-1].gmacs
    batch = max(1, round(GMACS_PER_RUN / gmacs))
    size, classes = net.config_fields["data.image_size"], net.config_fields["data.num_classes"]
    label = torch.eye(classes)[:batch] if classes else None
    x, t999 = torch.randn(batch, 3, size, size), 999 * torch.rand(batch)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    arms = {"ours": (net, (x, t999, label)), "peer": (released_way(net), (x, t999, label)),
            "channels_last": (last, (x.contiguous(memory_format=torch.channels_last), t999, label))}
    with torch.no_grad():
        torch.testing.assert_close(net(x, t999, label), arms["peer"][0](x, t999, label), rtol=1e-3, atol=1e-4)
    line, ratios, rates = f"{name:<17} {gmacs:>7.2f} {batch:>5}", [], []
    for work, names in ((forward, arms), (forward_backward, ("ours", "peer"))):
        taken = medians_in_turns({arm: functools.partial(work, *arms[arm]) for arm in names}, ROUNDS)
        ratios.append(taken["peer"][0] / taken["ours"][0])
        rates.append(2 * gmacs * batch / taken["ours"][0])
        line += "".join(f" {batch / wall:>9.2f}" for wall, _ in taken.values()) + f" {ratios[-1]:>6.2f}"
    print(f"{line} {rates[0]:>8.1f}", flush=True)
    return ratios


def compare_networks():
    """Print a line per configuration, and the mean ratios."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} "
          f"threads, float32, medians of {ROUNDS} rounds, commit {git_commit()}")
    net, inputs = create_from_fields(PUBLISHED["CIFAR32 3.4M"][1]), (torch.randn(1, 3, 32, 32), torch.rand(1))
    for name, arm in (("ours", net), ("peer", released_way(net))):
        for work in (forward, forward_backward):
            with Count() as count:
                work(arm, inputs)
            print(f"aten operations of CIFAR32 3.4M, {name}, {work.__name__}: {count.operations}")
    a, b = torch.randn(2, 2048, 2048)
    print(f"torch.mm: {2 * 2048**3 / medians_in_turns({'mm': lambda: torch.mm(a, b)}, 5)['mm'][0] / 1e9:.1f} GFLOP/s")
    both = f" {'ours':>9} {'peer':>9}"
    print(f"{'':<31} {'forward, images/s':^36} {'forward+backward, images/s':^26}")
    print(f"{'configuration':<17} {'GMACs':>7} {'batch':>5}{both} {'ours c.l.':>9} {'ratio':>6}{both} {'ratio':>6} "
          f"{'GFLOP/s':>8}")
    ratios = [compare(name, fields) for name, (_, fields) in PUBLISHED.items()]
    for work, values in zip(("forward", "forward+backward"), zip(*ratios, strict=True), strict=True):
        print(f"{work}: ours {statistics.geometric_mean(values):.2f} times as fast as the peer (geometric mean), from "
              f"{min(values):.2f} to {max(values):.2f}")


# A whole training step.


def random_images(root, spec):
    """Return the data set `benchmark`: 2,000 random images of the given size and channels, two per class."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2000, spec.channels, spec.size, spec.size), dtype=np.uint8)
    return ImageSet(images, np.arange(2000) % 1000, None, "random images")


def create_training(fields, batch, device):
    """Return train.py's `Training` of the fields on random images."""
    DATASETS["benchmark"] = DataSet(random_images, channels=None)
    config = get_default_config()
    own = {"data.dataset": "benchmark", "training.batch_size": batch, "optim.warmup": 0}
    for name, value in (own | fields).items():
        set_field(config, name, value)
    return Training(config, Processes(0, 1, device))


def ours(training):
    """Return an iterator that does one update at every `next`."""
    return map(training.update, itertools.count())


def released(training):
    """Do one update at every `next` as in the released code, with a loop over the tensors for everything."""
    device, size = training.device, training.config.training.batch_size
    network = released_way(training.network).to(memory_format=torch.contiguous_format)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-4, foreach=False, fused=False)
    average = [p.detach().clone() for p in parameters]
    for update in itertools.count():
        optimizer.zero_grad()
        draws = Draws(step_generator(0, update, DRAWS, device), size, device=device)
        batch = training.source.batch(update, 0, size)
        loss = training.objective(velocity_from_network(network), batch, draws, update).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for shadow, parameter in zip(average, parameters, strict=True):
                shadow.sub_((1 - 0.999) * (shadow - parameter))
        yield loss.item()


def compare_steps():
    """Print a line for a training step of each, and the ratios."""
    training = create_training(SMALL, STEP_BATCH, torch.device("cpu"))
    steps = {"released way": released(training), "ours": ours(training)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CIFAR 3.4M, float32, "
          f"batch {STEP_BATCH}, medians of {STEP_ROUNDS} rounds, commit {git_commit()}")
    taken = medians_in_turns({name: step.__next__ for name, step in steps.items()}, STEP_ROUNDS)
    for name, (wall, cpu) in taken.items():
        with Count() as count:
            next(steps[name])
        print(f"{name:<13} {1e3 * wall:8.1f} ms wall, {1e3 * cpu:8.1f} ms CPU, {STEP_BATCH / wall:8.1f} images/s, "
              f"{count.operations:>5} operations")
    wall, cpu = (peer / own for peer, own in zip(taken["released way"], taken["ours"], strict=True))
    print(f"ours is {wall:.2f} times as fast in wall time, {cpu:.2f} in CPU time")


def main(args):
    """Print the table of the part that is asked for."""
    if args.part == "networks":
        compare_networks()
    else:
        compare_steps()


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("part",))
