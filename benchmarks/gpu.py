"""Speed at the paper's configurations on a GPU: training, sampling, pairs, evaluation, features; and repeatability.

    python -m benchmarks.gpu --seconds 400 --out results     rows as JSON lines in results/gpu.jsonl, text on stdout

A training row is the update of train.py: images/s, TFLOP/s (six operations for each multiply-accumulate of a forward
pass), their share of the dense peak of the card's data sheet, peak memory, and the seconds of the first update, in
which cuDNN times its algorithms or the compiler runs. `released` is that of released.py, as in the released code. The
most important rows come first; those for which there is no time are listed. --tiny: small networks, any device.
"""

import argparse
import functools
import gc
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock

import torch
from torchvision.models import inception_v3

from benchmarks.released import SMALL, create_training, ours, released
from flows.rectified_flow import velocity_from_network
from flows.runge_kutta import rk45
from flows.samplers import euler
from metrics.features import full_float32
from models.checkpoint import load_model, write_checkpoint
from models.describe import describe, fastest_layout, median_seconds
from runtime.devices import compiled, in_precision, set_precision
from runtime.run_folder import git_commit

H100 = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4}  # dense TFLOP/s, by a part of the card's name
PEAKS = {"A100": {"fp32": 19.5, "tf32": 156, "bf16": 312}, "H100 80GB HBM3": H100, "H200": H100}
SIZES = {
    "61.8M": {}, "15.7M": {"model.nf": 96, "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2)}, "3.4M": SMALL,
    "80.7M": {"model.name": "DhariwalUNet", "model.num_res_blocks": 2, "model.ch_mult": (1, 2, 2, 4),
              "model.attn_resolutions": (32, 16), "data.image_size": 64, "data.num_classes": 1000},
}
TINY = {"model.nf": 8, "model.num_res_blocks": 1, "model.ch_mult": (1, 2), "model.attn_resolutions": (4,),
        "data.image_size": 8}
# Rows of training, the most important first: in the layout that train.py chooses, and not compiled, by default.
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FIRST = [{"size": size, "precision": precision} for precision in ("tf32", "bf16") for size in SIZES]
COMPILED = [{"size": size, "precision": "bf16", "compile": mode} for size, mode in (
    ("3.4M", "default"), ("15.7M", "default"), ("3.4M", "reduce-overhead"), ("15.7M", "reduce-overhead"),
    ("61.8M", "default"), ("80.7M", "default"))]
LAST = [{"size": size, "precision": precision, "layout": layout} for size in ("15.7M", "61.8M")
        for precision in ("tf32", "bf16") for layout in LAYOUTS]
LAST += [{"size": size, "precision": "fp32"} for size in SIZES]
SAMPLING = [{"precision": "tf32"}, {"precision": "bf16"}, {"precision": "bf16", "compile": "reduce-overhead"},
            {"precision": "fp32"}]


class Programme:
    """The benchmarks, each a method that returns the values of a row, and what they share."""

    def __init__(self, out, seconds, tiny):
        self.out, self.end, self.missed = pathlib.Path(out), time.monotonic() + seconds, []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda, self.work = self.device.type == "cuda", tempfile.TemporaryDirectory()
        self.card = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.peaks = next((peaks for name, peaks in PEAKS.items() if name in self.card), None)
        self.checkpoint = pathlib.Path(self.work.name, "flow.pth")
        # networks, seconds per measurement, batch of training, samples, updates of the network to sample
        self.fields, self.seconds, self.batch, self.many, self.trained = SIZES, 1.0, 128, 512, 600
        if tiny:
            self.fields = {size: fields | TINY for size, fields in SIZES.items()}
            self.seconds, self.batch, self.many, self.trained = 0.01, 2, 4, 2
        self.gmacs = functools.cache(lambda size: describe(self.fields[size])[-1].gmacs)

    def row(self, part, **values):
        """Run a part, print and save its row, or its error; without time left, add it to `missed`."""
        if time.monotonic() > self.end:
            self.missed.append(f"{part.__name__} {' '.join(map(str, values.values()))}")
            return
        try:
            found = part(**values)
        except Exception as error:  # such as no memory or a missing kernel: continue with the other rows
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:150]}
        gc.collect()  # or the next row's peak memory includes this row's network
        torch.cuda.empty_cache()  # does nothing on a CPU
        entry = {"part": part.__name__, **values, **found}
        with open(self.out / "gpu.jsonl", "a") as opened:
            opened.write(json.dumps(entry) + "\n")
        shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                 for name, value in entry.items() if name != "part")
        print(f"{part.__name__:9}", ", ".join(shown), flush=True)

    def rate(self, call):
        """Return the number of calls per second."""
        return 1 / median_seconds(call, seconds=self.seconds)

    def training(self, size, precision, compile=None):
        """Return train.py's `Training` of a network."""
        torch._dynamo.reset()
        own = {"training.precision": precision, "training.compile": bool(compile),
               "training.compile_mode": compile or "default"}
        return create_training(self.fields[size] | own, self.batch, self.device)

    def updates(self, training, count):
        """Do `count` updates; return (the iterator of the next ones, seconds)."""
        started, step = time.perf_counter(), ours(training)
        for _ in range(count):
            next(step)
        if self.cuda:
            torch.cuda.synchronize()
        return step, time.perf_counter() - started

    def train(self, size, precision, compile=None, layout=None):
        """Updates of train.py."""
        chosen = {"return_value": LAYOUTS[layout]} if layout else {"side_effect": fastest_layout}
        with unittest.mock.patch("train.fastest_layout", **chosen):
            training = self.training(size, precision, compile)
        step, first = self.updates(training, 1)
        next(step)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = self.rate(step.__next__)
        tflops = 6 * self.gmacs(size) * self.batch * speed / 1e3
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return {"images_s": self.batch * speed, "ms": 1e3 / speed, "tflops": tflops,
                "percent_of_peak": self.peaks and 100 * tflops / self.peaks[precision], "peak_gib": peak,
                "first_s": first, "nonfinite": training.stats.read()["nonfinite"], "messages": training.messages}

    def released(self, size):
        """Updates as in the released code, in its precision."""
        return {"images_s": self.batch * self.rate(released(self.training(size, "fp32")).__next__)}

    def pretrain(self, size):
        """The network that the parts below sample from."""
        training = self.training(size, "bf16")
        _, seconds = self.updates(training, self.trained)
        training.config.data.dataset = "CIFAR10"  # since scripts do not have the data set of released.py
        write_checkpoint(self.checkpoint, training.state(self.trained))
        return {"images_s": self.batch * self.trained / seconds}

    def sample(self, sampler, precision, compile=None):
        """Sampling, from noise on the device."""
        set_precision(precision)
        net = load_model(self.checkpoint, device=self.device)
        network = compiled(net, argparse.Namespace(compile=bool(compile), compile_mode=compile))
        velocity = velocity_from_network(in_precision(network, precision, self.device))
        size, nfe = net.config_fields["data.image_size"], {"one_step": 1, "euler-10": 10}.get(sampler)
        z = torch.randn(self.many, 3, size, size, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # keeps cast weights, as in the scripts
            euler(velocity, z, steps=3)  # the compiler runs in the first, and the second records a CUDA graph
            if nfe:
                return {"images_s": self.many * self.rate(lambda: euler(velocity, z, steps=nfe)), "nfe": nfe}
            started = time.perf_counter()
            _, nfe = rk45(velocity, z, tol=1e-3, slots=self.many, shrink_slots=True)
            return {"nfe": nfe.double().mean().item(), "images_s": self.many / (time.perf_counter() - started)}

    def script(self, name, tol):
        """Pairs, or samples compared with them, timed by the difference of two runs, without the start."""
        work, seconds = self.work.name, []
        calls = {"pairs": ["generate_data.py", f"--ckpt_path={self.checkpoint}", f"--data_root={work}"],
                 "evaluate": ["evaluation_fid.py", f"--ckpt_dir={self.checkpoint}", f"--target_path={work}/5/z1.npy"]}
        for seed, count in ((1, self.many), (5, 5 * self.many)):
            fields = {"seed": seed, "sampling.ode_tol": tol, "training.progress": "false", "training.batch_size":
                      self.many, "eval.batch_size": self.many, "eval.feature_extractor": "pixels", "eval.num_samples":
                      count, "sampling.pair_storage": "compact", "sampling.total_number_of_samples": count}
            started, own = time.perf_counter(), [f"--config.{field}={value}" for field, value in fields.items()]
            subprocess.run([sys.executable, *calls[name], "--config=configs/rectified_flow/cifar10_rf_gaussian.py",
                            *own], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - started)
        return {"images_s": 4 * self.many / (seconds[1] - seconds[0]), "start_s": seconds[0]}

    def features(self):
        """torchvision's Inception (random weights) in full float32."""
        net = inception_v3(weights=None, aux_logits=False, init_weights=False).eval().to(self.device)
        images = torch.randn(128 if self.cuda else 2, 3, 299, 299, device=self.device)
        with torch.no_grad(), full_float32():
            return {"images_s": len(images) * self.rate(lambda: net(images))}

    def repeats(self, deterministic):
        """Whether two trainings from the same seeds end with the same bits."""
        ends = []
        for _ in range(2):
            fields = self.fields["3.4M"] | {"training.deterministic": deterministic}
            training = create_training(fields, self.batch, self.device)
            self.updates(training, 20 if self.cuda else 2)
            ends.append(torch.cat([p.detach().flatten() for p in training.network.parameters()]))
        return {"same_bits": torch.equal(*ends), "largest": (ends[0] - ends[1]).abs().max().item()}

    def run(self):
        """Run all rows, the most important first."""
        self.out.mkdir(parents=True, exist_ok=True)
        for values in FIRST:
            self.row(self.train, **values)
        self.row(self.released, size="15.7M")
        for values in COMPILED:
            self.row(self.train, **values)
        self.row(self.pretrain, size="15.7M")
        for values in SAMPLING:
            for sampler in ("one_step", "euler-10", "rk45"):
                self.row(self.sample, sampler=sampler, **values)
        for name in ("pairs", "evaluate"):
            self.row(self.script, name=name, tol=1e-3)
        self.row(self.features)
        for deterministic in (False, True):
            self.row(self.repeats, deterministic=deterministic)
        for values in LAST:
            self.row(self.train, **values)


def time_is_up(number, frame):
    """Raise TimeoutError."""
    raise TimeoutError("the time is up")


def main():
    """Read the command line and run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warm", choices=SIZES, help="only fill the compiler's caches for this network")
    options = parser.parse_args()
    programme = Programme(options.out, options.seconds, options.tiny)
    if options.warm:
        _, seconds = programme.updates(programme.training(options.warm, "bf16", "default"), 1)
        print(f"{options.warm} compiled in {seconds:.1f} s")
        return
    print(programme.card, f"torch {torch.__version__} commit {git_commit()}")
    signal.signal(signal.SIGALRM, time_is_up)  # ends the row that runs; those after it count as not reached
    signal.setitimer(signal.ITIMER_REAL, options.seconds)
    programme.run()
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("not reached:", "; ".join(programme.missed) or "nothing")


if __name__ == "__main__":
    main()
