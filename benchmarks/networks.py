"""Both U-Nets at all configurations of the paper: our implementation and that of the released code, on the CPU.

    OMP_NUM_THREADS=2 python -m benchmarks.networks | tee benchmarks/networks.txt

The peer has the same weights and velocity, computed as in the released networks: attention by einsum with its
pixels × pixels matrix, 1×1 projections between permutations, resampling by reshaping or filters, the embedding
projected in each block. The released CIFAR 3.4M network dispatches 587 operations in a forward pass; the peer's
are printed. Runs alternate (ours, peer and, forward only, ours in channels_last, the layout in which `load_model`
returns a network on a CPU); figures are medians, ratio is the peer's time over ours. GFLOP/s counts two operations
per multiply-accumulate of our forward pass; torch.mm, in the same run, shows the peak of the machine.
"""

import copy
import math
import statistics
import time
import types

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import layers
from models.create import create_from_fields
from models.describe import describe
from models.dhariwal_unet import DhariwalUNet
from models.ncsnpp import NCSNpp
from models.released import PUBLISHED
from runtime.run_folder import git_commit

GMACS_PER_RUN = 5.0  # the batch of small networks is chosen for about this much work
ROUNDS = 5


# The peer: methods for our modules, as in the released code. First those of NCSN++.


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


def seconds(work, *args):
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


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
        rounds = [{arm: seconds(work, *arms[arm]) for arm in names} for _ in range(ROUNDS + 1)][1:]  # after a warm-up
        taken = {arm: statistics.median(times[arm] for times in rounds) for arm in names}
        ratios.append(taken["peer"] / taken["ours"])
        rates.append(2 * gmacs * batch / taken["ours"])
        line += "".join(f" {batch / value:>9.2f}" for value in taken.values()) + f" {ratios[-1]:>6.2f}"
    print(f"{line} {rates[0]:>8.1f}", flush=True)
    return ratios


def main():
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
    print(f"torch.mm: {max(2 * 2048**3 / seconds(torch.mm, a, b) / 1e9 for _ in range(5)):.1f} GFLOP/s")
    both = f" {'ours':>9} {'peer':>9}"
    print(f"{'':<31} {'forward, images/s':^36} {'forward+backward, images/s':^26}")
    print(f"{'configuration':<17} {'GMACs':>7} {'batch':>5}{both} {'ours c.l.':>9} {'ratio':>6}{both} {'ratio':>6} "
          f"{'GFLOP/s':>8}")
    ratios = [compare(name, fields) for name, (_, fields) in PUBLISHED.items()]
    for work, values in zip(("forward", "forward+backward"), zip(*ratios, strict=True), strict=True):
        print(f"{work}: ours {statistics.geometric_mean(values):.2f} times as fast as the peer (geometric mean), from "
              f"{min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
