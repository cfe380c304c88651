"""Speed on a GPU at the paper's configurations: training, sampling, pairs, features; and what is certain only there.

    python benchmarks/gpu.py --seconds 400 --out results     rows as JSON lines in results/gpu.jsonl, text on stdout

A training row is the update of train.py on images that are on the device: images/s, TFLOP/s (six operations for each
multiply-accumulate of a forward pass), their share of the dense peak of an H100 SXM's data sheet, peak memory, and the
seconds of the first update, in which cuDNN times its algorithms or the compiler runs. `released` is the same update
the released code's way (benchmarks/train_step.py). Rows come in the order of what one wants to know first; those that
the time does not reach are named. --tiny: small networks, any device.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.default import get_default_config, set_field  # noqa: E402
from datasets.sources import DATASETS, DataSet, ImageSet  # noqa: E402
from flows.rectified_flow import velocity_from_network  # noqa: E402
from flows.runge_kutta import rk45  # noqa: E402
from flows.samplers import euler, one_step  # noqa: E402
from metrics.features import full_float32  # noqa: E402
from models import load_model  # noqa: E402
from models.checkpoint import write_checkpoint  # noqa: E402
from models.describe import describe  # noqa: E402
from runtime.devices import Processes, in_precision, set_precision  # noqa: E402
from runtime.seeds import index_noise  # noqa: E402
from train import Training  # noqa: E402

SECONDS = 1.0  # that a speed is measured over
PEAKS = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4}  # dense TFLOP/s of an H100 SXM
SIZES = {
    "61.8M": {}, "15.7M": {"model.nf": 96, "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2)},
    "3.4M": {"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)},
    "80.7M": {"model.name": "DhariwalUNet", "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2, 4),
              "model.attn_resolutions": (32, 16), "data.image_size": 64, "data.num_classes": 1000},
}
TINY = {"model.nf": 16, "model.num_res_blocks": 1, "model.ch_mult": (1, 2), "model.attn_resolutions": (16,)}
# (size, precision, compile mode or None, memory layout), the most important first.
FIRST = [(size, precision, None, "nhwc") for precision in ("tf32", "bf16") for size in SIZES]
COMPILED = [(size, "bf16", mode, "nhwc") for mode in ("default", "reduce-overhead") for size in ("3.4M", "15.7M")]
COMPILED += [(size, "bf16", "default", "nhwc") for size in ("61.8M", "80.7M")]
LAST = [*((size, precision, None, "nchw") for size in ("15.7M", "61.8M") for precision in ("tf32", "bf16")),
        *((size, "fp32", None, "nhwc") for size in SIZES)]


def random_images(root, spec):
    """Return the data set `benchmark`: 2,000 random images of the size and channels asked for, two of each class."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2000, spec.channels, spec.size, spec.size), dtype=np.uint8)
    return ImageSet(images, np.arange(2000) % 1000, None, "random images")


DATASETS["benchmark"] = DataSet(random_images, channels=None)


def create_training(fields, precision, mode, layout, batch, device):
    """Return train.py's `Training` of the fields."""
    torch._dynamo.reset()
    config = get_default_config()
    own = {"data.dataset": "benchmark", "training.batch_size": batch, "training.precision": precision,
           "training.compile": mode is not None, "training.compile_mode": mode or "default", "optim.warmup": 0}
    for name, value in (own | fields).items():
        set_field(config, name, value)
    torch.backends.cudnn.benchmark = True
    training = Training(config, Processes(0, 1, device))
    if layout == "nchw":
        training.network.to(memory_format=torch.contiguous_format)
    return training


class Updates:
    """Calls train.py's update with the numbers 0, 1, …"""

    def __init__(self, training):
        self.training, self.done = training, 0

    def __call__(self):
        self.training.update(self.done)
        self.done += 1


def timed(call, count, device):
    """Return the seconds of `count` calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - started


def rate(call, device):
    """Return calls a second, over about SECONDS seconds, after two calls that are not counted."""
    count = max(3, min(300, int(SECONDS / (timed(call, 2, device) / 2))))
    return count / timed(call, count, device)


def train(fields, precision, mode, layout, batch, device):
    """Return the figures of a training row."""
    update = Updates(create_training(fields, precision, mode, layout, batch, device))
    first = timed(update, 1, device)
    timed(update, 2, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speed = rate(update, device)
    tflops = 6 * describe(fields)[-1].gmacs * batch * speed / 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"images_s": batch * speed, "ms": 1e3 / speed, "tflops": tflops, "percent_of_peak": 100 * tflops / PEAKS[
        precision], "peak_gib": peak, "first_s": first, "nonfinite": update.training.stats.read()["nonfinite"]}


def released(fields, batch, device):
    """Return the figures of the same update the released code's way, in its precision."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from train_step import ReleasedStep

    training = create_training(fields, "fp32", None, "nchw", batch, device)
    step, images = ReleasedStep(training.network, training.config, device), training.source.batch(0, 0, batch)
    speed = rate(lambda: step(0, images), device)
    return {"images_s": batch * speed, "ms": 1e3 / speed}


def sample(path, name, precision, count, device):
    """Return images/s and evaluations a sample of a sampler, from noise that is on the device."""
    set_precision(precision)
    net = load_model(path, device=device).requires_grad_(False)
    velocity, fields = velocity_from_network(in_precision(net, precision, device)), net.config_fields
    z = torch.randn(count, *(fields[f"data.{key}"] for key in ("num_channels", "image_size", "image_size")),
                    device=device)
    with torch.no_grad():
        if name == "rk45":
            started = time.perf_counter()
            x, nfe = rk45(velocity, z, tol=1e-5, slots=min(count, 512), shrink_slots=True)
            x.sum().item()
            return {"images_s": count / (time.perf_counter() - started), "nfe": nfe.double().mean().item()}
        call = {"one_step": one_step, "euler-10": lambda *a: euler(*a, steps=10)}[name]
        return {"images_s": count * rate(lambda: call(velocity, z), device), "nfe": {"one_step": 1}.get(name, 10)}


def script_seconds(*words):
    """Return the seconds of a script, its start included."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return time.perf_counter() - started


def pairs(path, tol, count, batch, folder):
    """Return pairs/s of generate_data.py: from the difference of two runs, so that its start does not count."""
    words = ("generate_data.py", "--config", "configs/rectified_flow/cifar10_rf_gaussian.py", "--ckpt_path", path,
             "--config.sampling.ode_tol", tol, "--config.training.batch_size", batch, "--config.training.progress",
             "false", "--config.sampling.pair_storage", "compact", "--config.sampling.total_number_of_samples")
    short = script_seconds(*words, batch, "--data_root", folder / "short")
    long = script_seconds(*words, count + batch, "--data_root", folder / "long")
    about = json.loads((folder / "long" / "42" / "pairs.json").read_text())
    return {"pairs_s": count / (long - short), "nfe": about["nfe_mean"], "start_s": short}


def features(batch, device):
    """Return images/s of torchvision's Inception (random weights) in full float32, and whether cuDNN stays on."""
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, aux_logits=False, init_weights=False).eval().to(device)
    images = torch.randn(batch, 3, 299, 299, device=device)
    with torch.no_grad(), full_float32():
        return {"images_s": batch * rate(lambda: net(images), device), "cudnn": torch.backends.cudnn.enabled}


def host_waits(fields, device):
    """Say whether an update, after the first ones, waits for the device anywhere."""
    update = Updates(create_training(fields, "tf32", None, "nhwc", 16, device))
    timed(update, 3, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update()
        return {"host_waits": "no"}
    finally:
        torch.cuda.set_sync_debug_mode("default")


def repeats(fields, deterministic, batch, device):
    """Say whether some updates from the same seeds end in the same bits."""
    ends = []
    for _ in range(2):
        fields = fields | {"training.deterministic": deterministic}
        update = Updates(create_training(fields, "tf32", None, "nhwc", batch // 2, device))
        timed(update, 20 if device.type == "cuda" else 2, device)
        ends.append([p.detach().clone() for p in update.training.network.parameters()])
    largest = max((a - b).abs().max().item() for a, b in zip(*ends, strict=True))
    return {"same_bits": largest == 0, "largest": largest}


def ceilings(device):
    """Return what the card gives: a copy's TB/s, and TFLOP/s of a matrix product in each precision."""
    big = device.type == "cuda"
    a = torch.empty(2**28 if big else 2**20, device=device).normal_()
    b, size = torch.empty_like(a), 8192 if big else 256
    found = {"copy_tb_s": 2 * a.nbytes * rate(lambda: b.copy_(a), device) / 1e12}
    for precision in PEAKS:
        set_precision(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"{precision}_tflops"] = 2 * size**3 * rate(lambda x=x, y=y: x @ y, device) / 1e12
    return found


class Report:
    """Prints rows as they come, and keeps them as JSON lines."""

    def __init__(self, folder, seconds):
        self.path, self.end, self.missed = pathlib.Path(folder) / "gpu.jsonl", time.monotonic() + seconds, []

    def row(self, part, work, **values):
        """Add what `work()` returns to `values`; a row that fails says why, one out of time is named at the end."""
        if time.monotonic() > self.end:
            self.missed.append(f"{part} {' '.join(map(str, values.values()))}")
            return
        try:
            found = work()
        except Exception as error:  # out of memory, a kernel that is missing: the other rows are wanted all the same
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        entry = {"part": part, **values, **found}
        with open(self.path, "a") as opened:
            opened.write(json.dumps(entry) + "\n")
        shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in entry.items() if name != "part")
        print(f"{part:9}", ", ".join(shown), flush=True)


def run(report, fields, batch, many, updates, device):
    """Add the rows, the most important first."""
    def train_rows(rows):
        for size, precision, mode, layout in rows:
            report.row("train", lambda a=(fields[size], precision, mode, layout): train(*a, batch, device), size=size,
                       precision=precision, compile=mode, layout=layout)

    cuda = device.type == "cuda"
    report.row("ceilings", lambda: ceilings(device))
    if cuda:
        report.row("waits", lambda: host_waits(fields["3.4M"], device))
    train_rows(FIRST if cuda else FIRST[2:3] + FIRST[3:4])
    report.row("released", lambda: released(fields["15.7M"], batch, device), size="15.7M")
    train_rows(COMPILED if cuda else COMPILED[:0])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        update = Updates(create_training(fields["15.7M"], "bf16" if cuda else "fp32", None, "nhwc", batch, device))
        timed(update, updates, device)
        update.training.config.data.dataset = "CIFAR10"  # the scripts do not know that of this file
        write_checkpoint(folder / "flow.pth", update.training.state(updates))
        for precision in ("tf32", "bf16", "fp32")[: 3 if cuda else 1]:
            for sampler in ("one_step", "euler-10", "rk45"):
                report.row("sample", lambda a=(sampler, precision): sample(folder / "flow.pth", *a, many, device),
                           sampler=sampler, precision=precision)
        report.row("pairs", lambda: pairs(folder / "flow.pth", 1e-3, 4 * many, many, folder), tol=1e-3)
    report.row("features", lambda: features(128 if cuda else 2, device))
    train_rows(LAST if cuda else LAST[:1])
    report.row("noise", lambda: {"images_s": 512 * rate(lambda: index_noise(0, range(512), (3, 32, 32)), device)})
    for deterministic in (False, True):
        report.row("repeats", lambda d=deterministic: repeats(fields["3.4M"], d, batch, device),
                   deterministic=deterministic)


def main():
    """Run the parts in the order of their worth until the seconds are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=600, help="of the network that rk45 and the pairs use")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warm", choices=SIZES, help="only fill the compiler's caches for this network")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fields = SIZES
    if options.tiny:
        global SECONDS
        fields, SECONDS = dict.fromkeys(SIZES, TINY), 0.05
    if options.warm:
        update = Updates(create_training(fields[options.warm], "bf16", "default", "nhwc", options.batch, device))
        print(options.warm, "compiled in", round(timed(update, 1, device), 1), "s")
        return
    pathlib.Path(options.out).mkdir(parents=True, exist_ok=True)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch", torch.__version__, flush=True)
    report = Report(options.out, options.seconds)
    run(report, fields, options.batch, 8 if options.tiny else 512, options.updates, device)
    print("not reached:", "; ".join(report.missed) or "nothing")


if __name__ == "__main__":
    main()
