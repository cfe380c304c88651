"""The report's plots: distance against evaluations, and the student against what its pairs cost."""

import statistics

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.findings import by_seed, of_common_seeds
from runtime.files import atomic_path

SAMPLED = {"1_flow": "1-flow", "2_flow_annealed": "small 2-flow", "distilled_guided_student": "distilled, guided"}
SAMPLERS = ("euler-1", "euler-2", "euler-4", "euler-8", "euler-16", "rk45")


def points(rows, names, x_name, y_name):
    """Return sorted (x, y, spread of y) over the seeds of the rows `names`, those that are there."""
    found = []
    for x_row, y_row in names:
        x, y = by_seed(rows, x_row, x_name), by_seed(rows, y_row, y_name)
        if x and y:
            spread = statistics.stdev(y.values()) if len(y) > 1 else 0.0
            found.append((statistics.mean(x.values()), statistics.mean(y.values()), spread))
    return sorted(found)


def draw(path, panels):
    """Draw panels side by side: (title, x label, [(label, points)], {label: level}), both axes logarithmic."""
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, x_label, curves, levels) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                                      strict=True):
        for label, found in curves:
            if found:
                x, y, spread = zip(*found, strict=True)
                axis.errorbar(x, y, spread, label=label, marker="o", markersize=4, capsize=2, linewidth=1)
        for label, level in levels.items():
            axis.axhline(level, label=label, linestyle="--", linewidth=1, color="grey")
        axis.set(title=title, xlabel=x_label, ylabel="Fréchet distance, classifier features", xscale="log",
                 yscale="log")
        plain_ticks(axis.xaxis, (1, 2, 4, 8, 16, 32, 64, 128, 256))
        plain_ticks(axis.yaxis, [digit * 10**power for power in range(-3, 4) for digit in (1, 2, 5)])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def plain_ticks(axis, places):
    """Put ticks at those of `places` that a logarithmic axis shows, written as plain numbers."""
    low, high = axis.get_view_interval()
    shown = [place for place in places if low <= place <= high]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def quality_panel(rows, name, title, level):
    """Return the panel of distance against evaluations of the image set `name`; `level` is that of real images."""
    prefix = f"{name}/seed{{seed}}/"
    curves = [(label, points(rows, [(f"{prefix}{run}/{s}", f"{prefix}{run}/{s}") for s in SAMPLERS], "nfe",
                             "feature_distance")) for run, label in SAMPLED.items()]
    return title, "network evaluations a sample", curves, {"real images": level}


def solver_panel(rows, solvers, level):
    """Return the panel of the student's distance against the evaluations that a pair cost, a curve a solver."""
    prefix = "digits/seed{seed}/"
    names = {kind: [(f"{prefix}ablation/pairs_{name}", f"{prefix}ablation/solver_{name}/euler-1")
                    for name in solvers if name.startswith(kind)] for kind in ("euler", "heun", "rk45")}
    names["rk45"].append((f"{prefix}pairs", f"{prefix}2_flow_annealed/euler-1"))
    rows = of_common_seeds(rows, [student for found in names.values() for _, student in found])
    curves = [(kind, points(rows, found, "nfe", "feature_distance")) for kind, found in names.items()]
    return "Digits: the student by what solved its pairs", "network evaluations a pair", curves, {"real images": level}
