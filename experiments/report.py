"""Tables, comparisons and plots of the table of results.

    python -m experiments.report [--show cifar]                      tables; docs/miniature_*.png
    python -m experiments.report --compare A:B                       step A against step B, seed by seed
    python -m experiments.report --samples PNG --runs A,B            samples of runs from the same noise

In names of steps {seed} stands for all seeds. docs/miniature.md says when a difference counts as a finding.
"""

import csv
import pathlib
import re
import statistics

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from configs.command_line import load_config, run_program
from configs.default import Field
from datasets import load_images, pixels_to_float
from flows import samplers
from flows.rectified_flow import velocity_from_network
from models.checkpoint import load_model
from runtime.files import atomic_path, write_text
from runtime.plots import label_log_axis, save_grid
from runtime.run_folder import CONFIG, checkpoint_path
from runtime.seeds import index_noise
from runtime.terminal import UserError

COLUMNS = ("step", "kind", "seed", "digest", "commit", "processor", "seconds", "nfe", "feature_distance",
           "pixel_distance", "precision", "recall", "recognised", "nearest", "straightness", "loss", "parameters",
           "gmacs", "latency_ms")
NUMBERS = COLUMNS[6:]
SHOWN = (*COLUMNS[7:15], "parameters", "seconds")  # in tables
CURVES = {"1_flow": "1-flow", "2_flow_annealed": "small 2-flow", "distilled_guided_student": "distilled, guided"}
SOLVERS = {"euler": (4, 8, 16), "heun": (2, 4, 8), "rk45": (0.001, 0.0001)}  # of pairs, besides the main line's
SAMPLERS = ("euler-1", "euler-2", "euler-4", "euler-8", "euler-16", "rk45")

# Success of the demo: largest pixel Fréchet distances, and largest share of the teacher's parameters in the student.
THRESHOLDS, LARGEST_STUDENT = {"1_flow/rk45": 0.25, "2_flow/one_step": 0.42, "distilled/one_step": 0.31}, 0.26


def read_table(path):
    """Return {step name: row} of a results file, numbers as floats, or None where a step has none."""
    rows = list(csv.DictReader(pathlib.Path(path).read_text().splitlines())) if pathlib.Path(path).exists() else []
    if any(tuple(row) != COLUMNS or None in row.values() for row in rows):
        raise UserError(f"{path} is not a whole table of results of {len(COLUMNS)} columns: restore it with git")
    return {row["step"]: row | {name: float(row[name]) if row[name] else None for name in NUMBERS} for row in rows}


def write_table(path, rows):
    """Write {step name: row}, sorted by name, with six digits, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for _, row in sorted(rows.items()):
            writer.writerow({column: f"{value:.6g}" if isinstance(value, float) else value
                             for column, value in row.items()})


def by_seed(rows, name, figure):
    """Return {seed: value} of the column `figure` in the rows called `name`, with {seed} filled in."""
    names = {name.format(seed=row["seed"]) for row in rows.values()}
    found = {int(rows[name]["seed"]): rows[name].get(figure) for name in sorted(names & rows.keys())}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def summary(values):
    """Return `mean ± standard deviation` of the values as text, or a single value."""
    values = list(values)
    if not values:
        return ""
    mean = statistics.mean(values)
    text = f"{mean:,.0f}" if mean >= 10000 else f"{mean:.4g}"  # of parameters: not 7.487e+05
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 1 else text


def table(rows):
    """Return a markdown table, a line per step over its seeds, without empty columns."""
    names = dict.fromkeys(re.sub(r"seed\d+", "seed{seed}", name) for name in rows)
    found = {name: {column: by_seed(rows, name, column) for column in SHOWN} for name in names}
    shown = [column for column in SHOWN if any(cells[column] for cells in found.values())]
    heads = [column.replace("_", " ").replace("nfe", "NFE") for column in shown]
    lines = [f"| step | {' | '.join(heads)} | seeds |", "|" + "---|" * (len(shown) + 2)]
    lines += [f"| {name} | {' | '.join(summary(cells[column].values()) for column in shown)} | "
              f"{max(map(len, cells.values()))} |" for name, cells in found.items()]
    return "\n".join(lines)


def compare(rows, first, second, figure="feature_distance"):
    """Return one line: `figure` of two steps on their common seeds, and the paired differences."""
    a, b = (by_seed(rows, name, figure) for name in (first, second))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise UserError(f"--compare {first}:{second}: no seed in common; name steps as in the table, with {{seed}}")
    differences = [b[seed] - a[seed] for seed in seeds]
    agree = max(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    return (f"{first} {summary(a[s] for s in seeds)}, {second} {summary(b[s] for s in seeds)}, difference "
            f"{summary(differences)}, the same sign in {agree} of {len(seeds)} seeds")


def points(rows, images, pairs):
    """Return arrays: NFE of the first step of each pair, distance of the second, its standard deviation over seeds."""
    found = [[list(by_seed(rows, f"{images}/seed{{seed}}/{step}", column).values())
              for step, column in zip(pair, ("nfe", "feature_distance"), strict=True)] for pair in pairs]
    return np.array(sorted((np.mean(nfe), np.mean(distance), np.std(distance, ddof=1) if len(distance) > 1 else 0.0)
                           for nfe, distance in found if nfe and distance)).reshape(-1, 3).T


def draw(path, x_label, panels):
    """Plot the panels that have points, {title: {curve: points}}, side by side, on logarithmic axes."""
    panels = {title: curves for title, curves in panels.items() if any(x.size for x in curves.values())}
    if not panels:
        return
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (x, y, spread) in curves.items():
            axes.errorbar(x, y, spread, label=label, marker="o", markersize=4, capsize=2, linewidth=1)
        axes.set(title=title, xlabel=x_label, ylabel="Fréchet distance, classifier features", xscale="log",
                 yscale="log")
        label_log_axis(axes.yaxis)
        axes.xaxis.set(major_locator=LogLocator(2), major_formatter="{x:g}", minor_locator=NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_miniature(rows, folder):
    """Write the plots of docs/miniature.md: distance against evaluations of a sample, and of a pair."""
    draw(folder / "miniature_quality.png", "network evaluations per sample", {
        title: {label: points(rows, images, [(f"{run}/{sampler}",) * 2 for sampler in SAMPLERS])
                for run, label in CURVES.items()}
        for images, title in (("digits", "Digits"), ("fashion", "Fashion-MNIST"))})
    pairs = {kind: [(f"ablation/pairs_{kind}_{n}", f"ablation/solver_{kind}_{n}/euler-1") for n in parameters]
             for kind, parameters in SOLVERS.items()}
    pairs["rk45"].append(("pairs", "2_flow_annealed/euler-1"))
    draw(folder / "miniature_pairs.png", "network evaluations per pair", {
        "Digits: small 2-flow, one step, by solver of its pairs": {k: points(rows, "digits", pairs[k]) for k in pairs}})


def write_demo(root, rows):
    """Write report.md and demo.png of the demo into `root`; return whether it meets all thresholds."""
    checks = [(f"{name}: pixel Fréchet distance {rows[name]['pixel_distance']:.3f}, required: at most {limit}",
               rows[name]["pixel_distance"] <= limit) for name, limit in THRESHOLDS.items()]
    share = rows["distilled/one_step"]["parameters"] / rows["1_flow/rk45"]["parameters"]
    checks.append((f"student's share of the teacher's parameters: {share:.1%}, required: at most {LARGEST_STUDENT:.0%}",
                   share <= LARGEST_STUDENT))
    text = "\n".join([
        "# SlimFlow on handwritten digits", "",
        "Fréchet distance of pixels in [-1, 1], not FID; between two random halves of the data it is about 0.3. "
        "`nearest` is the median distance to the nearest training image.", "", table(rows), "",
        f"{sum(row['seconds'] for row in rows.values()):.0f} seconds in all.", "",
        *(f"- {'met' if holds else 'MISSED'}: {sentence}" for sentence, holds in checks), "",
        "![data, 1-flow, 2-flow and distilled samples from the same noise](demo.png)", ""])
    print(f"drawing samples: {root}/demo.png", flush=True)
    draw_samples(root / "demo.png", [root / name for name in ("1_flow", "2_flow", "distilled")])
    write_text(root / "report.md", text)
    print(f"\n{text}\nreport: {root}/report.md, demo.png")
    return all(holds for _, holds in checks)


@torch.no_grad()
def draw_samples(path, runs, columns=16):
    """Write labelled rows: data, then the first run by rk45 and every run in one step, from the same noise."""
    config = load_config(runs[0] / CONFIG)
    images = load_images(config).images
    real = images[np.arange(columns) * len(images) // columns]
    z0 = config.sampling.init_noise_scale * index_noise(config.seed, range(columns), real.shape[1:])
    rows = [("data", pixels_to_float(torch.from_numpy(np.array(real))))]
    for run in runs:
        velocity = velocity_from_network(load_model(checkpoint_path(run, 1)))
        label = run.name.replace("_", "-")
        if run == runs[0]:
            rows.append((f"{label}, rk45", samplers.create_sampler(config)(velocity, z0)[0]))
        rows.append((f"{label}, one step", samplers.one_step(velocity, z0, t_start=config.flow.eps)[0]))
    labels, samples = zip(*rows, strict=True)
    save_grid(path, torch.cat(samples), columns, labels)


FLAGS = {
    "table": Field("experiments/results.csv", "table of finished steps"),
    "show": Field("", "only steps whose names contain one of these strings, separated by commas"),
    "compare": Field("", "two steps, A:B, with {seed} for the seed"),
    "figure": Field("feature_distance", "column to compare", choices=NUMBERS),
    "plots": Field("docs", "folder of the plots"),
    "samples": Field("", "image file to write instead: rows of samples of --runs"),
    "runs": Field("", "folders of runs for --samples, the 1-flow first, separated by commas"),
}


def main(args):
    """Print tables and draw plots."""
    if args.samples:
        draw_samples(pathlib.Path(args.samples), [pathlib.Path(run) for run in args.runs.split(",")])
        return
    rows = {name: row for name, row in read_table(args.table).items()
            if any(text in name for text in args.show.split(","))}
    if not rows:
        raise UserError(f"{args.table} has no such rows: run python -m experiments.run first")
    if args.compare:
        first, _, second = args.compare.partition(":")
        print(compare(rows, first, second, args.figure))
        return
    print(table(rows))
    if not args.show:  # plots are of the whole table
        draw_miniature(rows, pathlib.Path(args.plots))


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS)
