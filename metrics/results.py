"""Results of evaluations: lines of eval/results.jsonl (JSON), a table, a line to quote, a plot."""

import json
import os
import platform
import re

import numpy as np
import torch

from configs.default import FIELDS
from flows.samplers import sampler_fields
from runtime.files import atomic_path, read_json_lines
from runtime.plots import label_log_axis
from runtime.run_folder import git_commit
from runtime.terminal import print_message

# Results that agree in COMPARABLE can be compared; those that agree in IDENTITY, hence also in checkpoint and sampling,
# are the same evaluation, which is not repeated.
COMPARABLE = ("features", "extractor_digest", "target", "target_state", "image_shape", "num_samples")
IDENTITY = (*COMPARABLE, "checkpoint", "digest", "weights", "sampler", *sampler_fields(), "eps", "arithmetic",
            "init_noise_scale", "class_label", "num_classes", "batch_size", "batch_processes", "seeds", "dataset",
            "training_images", "nearest", "precision_recall")
TITLES = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall",
          "inception_score": "Inception score", "pixel_frechet_distance": "pixel Fréchet distance",
          "pixel_kernel_distance": "pixel kernel distance", "pixel_precision": "pixel precision",
          "pixel_recall": "pixel recall"}
AXES = {"step": "training step", "nfe": "function evaluations (NFE)"}  # x-axes of the plot
FURTHER = ("weights", "arithmetic", "eps", "init_noise_scale", "class_label")  # added to its labels where they differ
LINE = 119  # characters on a line of a table
NUMBER, NONE = (int, float), type(None)
TYPES = {"checkpoint": str, "sampler": (str, NONE), "num_samples": int, "step": (int, NONE), "nfe": (*NUMBER, NONE),
         "seconds": NUMBER, "reference": str, "protocol": str, "versions": dict, "seeds": dict,
         **{name: (*NUMBER, NONE) for name in TITLES}}


def read_results(path):
    """Return the evaluations in a file, [] without it; invalid lines are skipped with a message on stderr."""
    entries = read_json_lines(path)
    found = [entry for entry in entries if entry.get(main_metric(entry)) is not None
             and all(isinstance(entry.get(key), kind) for key, kind in TYPES.items())]
    if len(found) < len(entries):
        print_message(f"{path}: {len(entries) - len(found)} of {len(entries)} lines are not results: skipped",
                      stderr=True)
    return found


def append_result(path, result):
    """Append `result` as one line and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as opened:
        opened.seek(max(0, opened.tell() - 1))
        torn = opened.read() not in (b"", b"\n")  # the last line was cut by a crash
        opened.write(("\n" * torn + json.dumps(result, ensure_ascii=False) + "\n").encode())
        opened.flush()
        os.fsync(opened.fileno())


def key_of(result, fields=IDENTITY):
    """Return a string that is equal for results with equal `fields`."""
    return json.dumps([result.get(name) for name in fields])


def newest_of_each(results):
    """Return {identity: result}, in order, with the last result of each identity."""
    return {key_of(result): result for result in results}


def main_metric(result):
    """Return the name of the Fréchet distance in `result`: "fid" or "pixel_frechet_distance"."""
    return "fid" if "fid" in result else "pixel_frechet_distance"


def protocol_line(result):
    """Return the line to quote with the number: metric, samples, sampler, checkpoint, features, reference, versions."""
    name = main_metric(result)
    parts = [f"{TITLES[name]} {result[name]:.4g}: {result['num_samples']} samples"]
    if result["sampler"] is not None:
        parts += [f"{sampler_name(result)} (NFE {result['nfe']:g})", f"{result['weights']} weights of "
                  f"{result['checkpoint']} (step {result['step']})", f"seed {result['seeds']['samples']}"]
        parts += [f"class {result['class_label']} alone"] * (result.get("class_label", -1) >= 0)
        unusual = {field: result[field] for field, usual in (("eps", 1e-3), ("init_noise_scale", 1.0))
                   if result.get(field, usual) != usual}
        parts += [*(f"{field} {value:g}" for field, value in unusual.items()),
                  *(f"in {kind}" for kind in ("bf16", "fp16") if result.get("arithmetic") == kind)]
    parts += [result["protocol"], f"against {result['reference']}"]
    return ", ".join(parts) + "; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items())


def sampler_name(result, brief=False):
    """Return the sampler of a result with its options, `rk45 (ode_tol 0.01, step_control batch)`.

    brief: without those at their defaults, and in fewer words: `rk45 tol 0.01 batch`.
    """
    if result["sampler"] is None:
        return "files"
    values = {name: result[name] for name in sampler_fields() if result.get(name) is not None}
    steps = f"-{values.pop('sample_N')}" if "sample_N" in values else ""
    options = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
               if not brief or value != FIELDS[f"sampling.{name}"].default]
    if brief:
        return " ".join([result["sampler"] + steps, *(re.sub("^(step_control |[a-z]+_)", "", o) for o in options)])
    return result["sampler"] + steps + (f" ({', '.join(options)})" if options else "")


def table(results):
    """Return the results as a text table, a row per result and a column per metric."""
    metrics = [name for name in TITLES if any(name in r for r in results)]
    heads = [head.split() for head in ("checkpoint", "step", "sampler", "NFE", "samples", *(TITLES[m] for m in metrics),
                                       "nearest image", "(real)", "seconds")]
    rows = list(map(list, zip(*([""] * (3 - len(words)) + words for words in heads), strict=True)))  # a word per line
    for r in results:
        values = [r["step"], sampler_name(r, brief=True), r["nfe"], r["num_samples"], *map(r.get, metrics),
                  r.get("nn_distance"), r.get("nn_distance_real")]
        cells = ("n/a" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        rows.append([r["checkpoint"].removesuffix(".pth").removeprefix("checkpoint_"), *cells, f"{r['seconds']:.1f}"])
    widths = fit_columns(rows, (0, 2))
    gap = "  " if sum(widths) + 2 * len(widths) <= LINE else " "
    lines = [gap.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*filter(str.strip, lines[:3]), "-" * len(lines[0]), *lines[3:]])


def fit_columns(rows, names, gap=1):
    """Return the widths of the columns of `rows`, lists of text, `gap` characters apart.

    Where a line would have more than LINE characters, texts in the columns `names` lose their middle, in place.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for column in names:
        excess = sum(widths) + gap * (len(widths) - 1) - LINE
        room = widths[column] = max(10, widths[column] - max(0, excess))
        for row in rows:
            if len(row[column]) > room:
                row[column] = f"{row[column][:room // 2]}…{row[column][-((room - 1) // 2):]}"
    return widths


def draw_figure(path, results):
    """Plot the Fréchet distance of checkpoints against training step and NFE, where they vary, as a PNG.

    Results that can be compared share a row of panels, whose title names their reference.
    """
    from matplotlib.figure import Figure  # here, since importing it takes a second
    from matplotlib.ticker import MaxNLocator

    rows = {}
    for result in newest_of_each(results).values():
        if result["sampler"] is not None:
            rows.setdefault(key_of(result, COMPARABLE), []).append(result)
    if not rows:
        return
    names = [name for name in AXES if any(
        len(points) > 1 for row in rows.values() for points in _lines(row, name).values())] or ["step"]
    figure = Figure(figsize=(3 + 4 * len(names), 4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(names), sharey="row", squeeze=False)
    for row_of_panels, row in zip(panels, rows.values(), strict=True):
        values = [r[main_metric(r)] for r in row]
        row_of_panels[0].set_ylabel(TITLES[main_metric(row[-1])])
        row_of_panels[0].set_title(f"compared with {row[-1]['reference']}\n{row[-1]['num_samples']:,} samples",
                                   loc="left", fontsize=9, wrap=True)
        for axes, name in zip(row_of_panels, names, strict=True):
            lines = _lines(row, name)
            for label, points in lines.items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
            axes.set_visible(bool(lines))
            if 0 < len(lines) <= 12:  # with more lines than distinct colours a legend is of no use
                axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
            axes.set_xlabel(AXES[name])
            if name == "step":
                axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
            else:
                axes.set_xscale("log")
                axes.set_xticks([], minor=True)
                nfes = sorted((nfe for points in lines.values() for nfe, _ in points), reverse=True)
                axes.set_xticks(list({f"{nfe:.1g}": nfe for nfe in nfes}.values()))  # without overlap
                axes.xaxis.set_major_formatter("{x:.3g}")
        if max(values) > 4 * min(values) > 0:
            row_of_panels[0].set_yscale("log")
            label_log_axis(row_of_panels[0].yaxis)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _lines(row, axis):
    """Return {label: [(x, distance), …]} for the axis: one line per sampler over steps, or per checkpoint over NFEs."""
    options = [{"seed": r["seeds"].get("samples"), **{name: r.get(name) for name in FURTHER}} for r in row]
    lines = {}
    for r, further in zip(row, options, strict=True):
        name = sampler_name(r) if axis == "step" else f"{r['sampler']}, step {r['step']:,}"
        differing = [f"{field} {value}" for field, value in further.items() if any(o[field] != value for o in options)]
        lines.setdefault(", ".join([name, *differing]), []).append((r[axis], r[main_metric(r)]))
    return lines if axis == "step" else {label: points for label, points in lines.items() if len(points) > 1}


def versions(device):
    """Return {name: version} of what the numbers depend on: this code, Python, torch, numpy, the device."""
    commit = git_commit()
    return {"slimflow": commit[:7] + commit[40:] if commit else "not a git checkout",
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
