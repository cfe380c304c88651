"""Tables, comparisons and plots of the table of results: `python -m experiments.report [--steps cifar]`.

    python -m experiments.report                                                  tables; docs/miniature_*.png
    python -m experiments.report --compare A:B                                    step A against step B, seed by seed

In names of steps {seed} stands for every seed. A comparison says no more than its figures: a claim needs seeds that
agree and a mean difference beyond both their spread and what another processor changes (docs/miniature.md).
"""

import csv
import pathlib
import re
import statistics

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from configs.command_line import run_program
from configs.default import Field
from runtime.errors import UserError
from runtime.files import atomic_path, write_text

COLUMNS = ("step", "kind", "seed", "digest", "commit", "processor", "seconds", "nfe", "feature_distance",
           "pixel_distance", "precision", "recall", "recognised", "nearest", "straightness", "loss", "parameters",
           "gmacs", "latency_ms")
NUMBERS = COLUMNS[6:]
FIGURES = {"NFE": "nfe", "feature distance": "feature_distance", "pixel distance": "pixel_distance",
           "precision": "precision", "recall": "recall", "recognised": "recognised", "nearest": "nearest",
           "straightness": "straightness", "parameters": "parameters", "seconds": "seconds"}
SAMPLED = {"1_flow": "1-flow", "2_flow_annealed": "small 2-flow", "distilled_guided_student": "distilled, guided"}
SAMPLERS = ("euler-1", "euler-2", "euler-4", "euler-8", "euler-16", "rk45")


def read_table(path):
    """Return {step name: row} of a results file, numbers as floats (None where a step has no such figure)."""
    path = pathlib.Path(path)
    if not path.exists():
        return {}
    with open(path, newline="") as opened:
        reader = csv.DictReader(opened)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} has the columns {', '.join(reader.fieldnames or ())}; wanted are "
                            f"{', '.join(COLUMNS)}: restore it with git, or move it away")
        rows = list(reader)
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():  # too many fields, or too few
            raise UserError(f"{path}, line {line}, does not have {len(COLUMNS)} fields: restore the file with git")
        try:
            row.update({name: float(row[name]) if row[name] else None for name in NUMBERS})
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}: restore the file with git") from None
    return {row["step"]: row for row in rows}


def write_table(path, rows):
    """Write {step name: row} sorted by name, six digits a figure; the file appears whole."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in sorted(rows):
            values = {column: rows[name].get(column) for column in COLUMNS}
            writer.writerow({column: f"{value:.6g}" if isinstance(value, float) else value
                             for column, value in values.items()})


def by_seed(rows, name, figure):
    """Return {seed: figure} of the rows whose name is `name` with {seed} filled in."""
    seeds = sorted({int(row["seed"]) for row in rows.values()})
    found = {seed: rows.get(name.format(seed=seed)) for seed in seeds}
    return {seed: row[figure] for seed, row in found.items() if row and row[figure] is not None}


def summary(values):
    """Return `mean ± standard deviation` of the values, or the one value."""
    values = list(values)
    mean = f"{statistics.mean(values):.4g}" if values else ""
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def table(rows, heads=FIGURES):
    """Return a markdown table, a line a step, its seeds together; figures that no step has are left out."""
    names = dict.fromkeys(re.sub(r"seed\d+", "seed{seed}", name) for name in rows)
    found = {name: {head: by_seed(rows, name, column) for head, column in heads.items()} for name in names}
    shown = [head for head in heads if any(cells[head] for cells in found.values())]
    lines = [f"| step | {' | '.join(shown)} | seeds |", "|" + "---|" * (len(shown) + 2)]
    for name, cells in found.items():
        count = max((len(cell) for cell in cells.values()), default=0)
        lines.append(f"| {name} | {' | '.join(summary(cells[head].values()) for head in shown)} | {count} |")
    return "\n".join(lines)


def compare(rows, first, second, figure="feature_distance"):
    """Return one line: two steps' figures on the seeds that both have, and the differences, which share much."""
    a, b = (by_seed(rows, name, figure) for name in (first, second))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise UserError(f"{first} and {second} have no seed in common; the names are those of the table, with {{seed}}")
    differences = [b[seed] - a[seed] for seed in seeds]
    agree = max(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    return (f"{first} {summary(a[s] for s in seeds)}, {second} {summary(b[s] for s in seeds)}, difference "
            f"{summary(differences)}, the same sign in {agree} of {len(seeds)} seeds")


def points(rows, names):
    """Return sorted (evaluations, distance, its spread) over the seeds of (row with the NFE, row with the distance)."""
    found = []
    for nfe_name, name in names:
        nfe, distance = by_seed(rows, nfe_name, "nfe"), by_seed(rows, name, "feature_distance")
        if nfe and distance:
            spread = statistics.stdev(distance.values()) if len(distance) > 1 else 0.0
            found.append((statistics.mean(nfe.values()), statistics.mean(distance.values()), spread))
    return sorted(found)


def draw(path, panels):
    """Draw panels side by side: (title, x label, {curve: points}), both axes logarithmic."""
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, x_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, found in curves.items():
            x, y, spread = np.array(found or [(np.nan,) * 3]).T
            axes.errorbar(x, y, spread, label=label, marker="o", markersize=4, capsize=2, linewidth=1)
        axes.set(title=title, xlabel=x_label, ylabel="Fréchet distance, classifier features", xscale="log",
                 yscale="log")
        for axis, places in ((axes.xaxis, [2**k for k in range(9)]),
                             (axes.yaxis, [digit * 10.0**k for k in range(-3, 4) for digit in (1, 2, 5)])):
            low, high = axis.get_view_interval()
            axis.set_major_locator(FixedLocator([place for place in places if low <= place <= high]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_miniature(rows, folder):
    """Write the plots of docs/miniature.md: distance against evaluations, and against what the pairs cost."""
    panels = []
    for images, title in (("digits", "Digits"), ("fashion", "Fashion-MNIST")):
        prefix = f"{images}/seed{{seed}}/"
        curves = {label: points(rows, [(f"{prefix}{run}/{sampler}",) * 2 for sampler in SAMPLERS])
                  for run, label in SAMPLED.items()}
        panels += [(title, "network evaluations a sample", curves)] if any(curves.values()) else []
    if not panels:
        return
    draw(folder / "miniature_quality.png", panels)
    prefix, curves = "digits/seed{seed}/", {}
    for kind in ("euler", "heun", "rk45"):
        solvers = {match[1] for name in rows if (match := re.fullmatch(rf".*/ablation/pairs_({kind}_.*)", name))}
        names = [(f"{prefix}ablation/pairs_{name}", f"{prefix}ablation/solver_{name}/euler-1") for name in solvers]
        curves[kind] = points(rows, names + [(f"{prefix}pairs", f"{prefix}2_flow_annealed/euler-1")] * (kind == "rk45"))
    draw(folder / "miniature_pairs.png", [("Digits: the student by the solver of its pairs",
                                           "network evaluations a pair", curves)])


def write_demo(root, rows, thresholds, largest_student):
    """Write report.md and demo.png of the demo into `root`; return whether all thresholds are met."""
    checks = [(f"{name}: pixel Fréchet distance {rows[name]['pixel_distance']:.3f}, at most {limit} wanted",
               rows[name]["pixel_distance"] <= limit) for name, limit in thresholds.items()]
    share = rows["distilled/one_step"]["parameters"] / rows["1_flow/rk45"]["parameters"]
    checks.append((f"student's share of the teacher's parameters: {share:.1%}, at most {largest_student:.0%} wanted",
                   share <= largest_student))
    text = "\n".join([
        "# SlimFlow on handwritten digits", "",
        "Fréchet distance of the pixels themselves ([-1, 1]): not FID; two random halves of the data are about 0.3 "
        "apart. `nearest` is the median distance to the nearest training image.", "", table(rows), "",
        f"{sum(row['seconds'] for row in rows.values()):.0f} seconds in all.", "",
        *(f"- {'met' if holds else 'MISSED'}: {sentence}" for sentence, holds in checks), "",
        "![data, 1-flow, 2-flow and distilled samples from the same noise](demo.png)", ""])
    draw_samples(root / "demo.png", {name: root / name for name in ("1_flow", "2_flow", "distilled")})
    write_text(root / "report.md", text)
    print(f"\n{text}\nreport: {root}/report.md, demo.png")
    return all(holds for _, holds in checks)


@torch.no_grad()
def draw_samples(path, runs, columns=16):
    """Write labelled rows: data, then the first run by rk45 and every run in one step, from the same noise."""
    from configs.command_line import load_config
    from datasets import load_images, pixels_to_float
    from flows import samplers
    from flows.rectified_flow import velocity_from_network
    from models import load_model
    from runtime.pictures import save_grid
    from runtime.seeds import index_noise

    config = load_config(next(iter(runs.values())) / "config.json")
    images = load_images(config).images
    real = images[np.arange(columns) * len(images) // columns]
    z0 = index_noise(config.seed, range(columns), real.shape[1:])
    rows = {"data": pixels_to_float(torch.from_numpy(np.array(real)))}
    for number, (name, run) in enumerate(runs.items()):
        velocity = velocity_from_network(load_model(run / "checkpoints" / "checkpoint_1.pth"))
        label = name.replace("_", "-")
        if number == 0:
            rows[f"{label}, rk45"] = samplers.create_sampler(config)(velocity, z0)[0]
        rows[f"{label}, one step"] = samplers.one_step(velocity, z0, t_start=config.flow.eps)[0]
    save_grid(path, torch.cat(list(rows.values())), columns=columns, labels=list(rows))


FLAGS = {
    "table": Field("experiments/results.csv", "table of finished steps"),
    "show": Field("", "only the steps whose names contain one of these texts, separated by commas"),
    "compare": Field("", "two steps, A:B, with {seed} for the seed"),
    "figure": Field("feature_distance", "what is compared", choices=NUMBERS),
    "plots": Field("docs", "folder of the plots"),
    "samples": Field("", "a picture to write instead: rows of samples of the runs named in --runs"),
    "runs": Field("", "folders of runs for --samples, separated by commas, the 1-flow first"),
}


def main(args):
    """Print the tables and draw the plots."""
    if args.samples:
        draw_samples(pathlib.Path(args.samples), {pathlib.Path(run).name: pathlib.Path(run)
                                                  for run in args.runs.split(",")})
        return
    rows = {name: row for name, row in read_table(args.table).items()
            if any(text in name for text in args.show.split(","))}
    if not rows:
        raise UserError(f"{args.table} has no such rows: run python -m experiments.run first")
    if args.compare:
        print(compare(rows, *args.compare.split(":", 1), args.figure))
        return
    print(table(rows))
    draw_miniature(rows, pathlib.Path(args.plots))


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS)
