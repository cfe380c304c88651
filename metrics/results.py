"""Results of evaluations: one JSON object a line in eval/results.jsonl, a table, a line to quote, a figure.
"""

import contextlib
import json
import os
import pathlib
import platform
import sys

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullFormatter

from flows.samplers import sampler_fields, sampler_title
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.versions import git_commit

# What two results must share to be compared with each other, and with what else they are the same evaluation, which
# is not computed again: the checkpoint and how it was sampled.
COMPARABLE = ("features", "extractor_digest", "target", "target_state", "image_shape", "num_samples")
IDENTITY = (*COMPARABLE, "checkpoint", "digest", "weights", "sampler", *sampler_fields(), "eps", "arithmetic",
            "init_noise_scale", "class_label", "num_classes", "batch_size", "seeds", "dataset", "training_images",
            "nearest", "precision_recall")
TITLES = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall",
          "inception_score": "Inception score", "pixel_frechet_distance": "pixel Fréchet distance",
          "pixel_kernel_distance": "pixel kernel distance", "pixel_precision": "pixel precision",
          "pixel_recall": "pixel recall"}
NUMBER, NONE = (int, float), type(None)
TYPES = {"checkpoint": str, "sampler": (str, NONE), "num_samples": int, "step": (int, NONE), "nfe": (*NUMBER, NONE),
         "seconds": NUMBER, "reference": str, "protocol": str, "versions": dict, "seeds": dict}


def results_path(folder):
    """Return the results file of the run folder."""
    return pathlib.Path(folder) / "eval" / "results.jsonl"


def read_results(path):
    """Return the list of finished evaluations; a last line torn by a crash is left out.

    Other lines that are no results are left out, too, which a line on stderr says.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path} is not a file; results are one JSON object a line")
    found, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        result = None
        with contextlib.suppress(ValueError, RecursionError):
            result = json.loads(line)
        if is_result(result):
            found.append(result)
        elif line.strip() and number < len(lines):
            print(f"{path}, line {number} is no result and is left out", file=sys.stderr)
    return found


def is_result(value):
    """Return whether a JSON value has what this program reads of a result, with the right types."""
    return (isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in TYPES.items())
            and any(isinstance(value.get(name), NUMBER) for name in ("fid", "pixel_frechet_distance"))
            and all(isinstance(value.get(name), (*NUMBER, NONE)) for name in TITLES))


def append_result(path, result):
    """Append `result` as one line, on disk when this returns."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
            torn = opened.read(1) != b"\n"
            opened.write(b"\n" if torn else b"")
        opened.write((json.dumps(result, ensure_ascii=False) + "\n").encode())
        opened.flush()
        os.fsync(opened.fileno())


def find_result(results, wanted):
    """Return the newest of `results` that has the identity of `wanted`, or None."""
    same = [r for r in results if all(r.get(key) == wanted.get(key) for key in IDENTITY)]
    return same[-1] if same else None


def newest_of_each(results):
    """Return `results` without those that a later line of the same identity replaced, in order."""
    latest = {json.dumps([result.get(key) for key in IDENTITY]): result for result in results}
    return list(latest.values())


def main_metric(result):
    """Return the name of the Fréchet distance in `result`: "fid" or "pixel_frechet_distance"."""
    return "fid" if "fid" in result else "pixel_frechet_distance"


def best_of(results):
    """Return the result with the smallest Fréchet distance, or None if there are none."""
    return min(results, key=lambda r: r[main_metric(r)], default=None)


def protocol_line(result):
    """Return the one line to quote beside the number."""
    name = main_metric(result)
    parts = [f"{TITLES[name]} {result[name]:.4g}: {result['num_samples']} samples"]
    if result["sampler"] is not None:
        parts += [f"{sampler_name(result)} (NFE {result['nfe']:g})", f"{result['weights']} weights of "
                  f"{result['checkpoint']} (step {result['step']})", f"seed {result['seeds']['samples']}"]
    parts += [result["protocol"], f"against {result['reference']}"]
    return ", ".join(parts) + "; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items())


def sampler_name(result):
    """Return the sampler of a result with what matters for it: `euler-2`, `rk45 (ode_tol 1e-05, …)`."""
    return "files" if result["sampler"] is None else sampler_title(result["sampler"], result)


def table(results):
    """Return the results as lines of text: one row each, one column a metric."""
    metrics = list(dict.fromkeys(name for r in results for name in TITLES if name in r))
    rows = [["checkpoint", "step", "sampler", "NFE", "samples", *(TITLES[m] for m in metrics), "nearest image",
             "(real)", "seconds"]]
    for r in results:
        values = [r.get(m) for m in metrics] + [r.get("nn_distance"), r.get("nn_distance_real")]
        rows.append([r["checkpoint"], _text(r["step"]), sampler_name(r), _text(r["nfe"]), str(r["num_samples"]),
                     *map(_text, values), f"{r['seconds']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(value):
    if value is None:
        return "n/a"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def draw_figure(path, results):
    """Write `results` of checkpoints as a PNG: the Fréchet distance against the training step and against NFE.

    Results that can be compared with each other share a row, whose title names what they are compared with.
    """
    rows = {}
    for result in results:
        if result["sampler"] is not None:
            rows.setdefault(json.dumps([result.get(key) for key in COMPARABLE]), []).append(result)
    if not rows:
        return
    figure = Figure(figsize=(10, 4 * len(rows)), layout="constrained")
    for (left, right), row in zip(figure.subplots(len(rows), 2, sharey="row", squeeze=False), rows.values(),
                                  strict=True):
        metric = main_metric(row[-1])
        _draw_lines(left, row, metric, label=sampler_name, place=lambda r: r["step"])
        _draw_lines(right, row, metric, label=lambda r: f"step {r['step']}", place=lambda r: r["nfe"])
        left.set(xlabel="training step", ylabel=TITLES[metric])
        left.set_title(f"compared with {row[-1]['reference']}\n{row[-1]['num_samples']:,} samples", loc="left",
                       fontsize=9, wrap=True)
        right.set(xlabel="function evaluations (NFE)")
        left.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _scale(left.yaxis, [r[metric] for r in row])
        _scale(right.xaxis, [r["nfe"] for r in row])
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _draw_lines(axes, results, metric, label, place):
    """Draw one line for each label, its points in order of place."""
    groups = {}
    for result in results:
        groups.setdefault(f"{label(result)}, {result['weights']}", []).append((place(result), result[metric]))
    for name, points in groups.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.grid(alpha=0.3)
    if len(groups) <= 12:  # more lines than colours to tell them by need no legend
        axes.legend(fontsize=7)


def _scale(axis, values):
    """Make an axis logarithmic where its values differ by more than a factor of four, with plain numbers on it."""
    if min(values) <= 0 or max(values) <= 4 * min(values):
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_label_text(f"{axis.get_label_text()} (log)")
    axis.set_major_formatter(LogFormatter())  # 48 and 2, not 4.8 × 10¹ and 2 × 10⁰
    axis.set_minor_formatter(LogFormatter() if max(values) < 100 * min(values) else NullFormatter())


# Keeping the samples that were measured.


@contextlib.contextmanager
def sample_store(path, count, shape, processes):
    """Yield `keep(first, images)`, which puts uint8 images at their numbers into an npy (count, C, H, W) at `path`.

    All processes fill one file, which appears under its name when they are done. Its space is taken at once, so that
    a disk that is too small is known before anything is sampled.
    """
    path = pathlib.Path(path)
    partial, size = path.with_suffix(".partial.npy"), int(np.prod(shape))

    def allocate():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as opened:
            np.lib.format.write_array_header_1_0(opened, {"descr": "|u1", "fortran_order": False,
                                                          "shape": (count, *shape)})
            opened.flush()
            os.posix_fallocate(opened.fileno(), opened.tell(), count * size)
            return opened.tell()

    try:
        start = processes.from_main(allocate)
        with open(partial, "r+b") as opened:

            def keep(first, images):
                opened.seek(start + first * size)
                opened.write(images.cpu().numpy().tobytes())

            yield keep
            opened.flush()
            os.fsync(opened.fileno())
        processes.barrier()
        if processes.is_main:
            partial.replace(path)
    finally:
        if processes.is_main:
            partial.unlink(missing_ok=True)


# Which software measured it.


def versions(device):
    """Return {name: version} of what the numbers depend on: this code, Python, torch, numpy, the device."""
    cuda, commit = device.type == "cuda", git_commit()
    found = {"slimflow": commit[:7] + commit[40:] if commit else "not a git checkout",
             "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "device": torch.cuda.get_device_name(device) if cuda else "cpu"}
    return found | ({"cuda": str(torch.version.cuda)} if cuda else {})
