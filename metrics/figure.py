"""The picture of a run's results: the Fréchet distance against the training step and against NFE."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from metrics.features import TITLES
from metrics.results import main_metric, sampler_name
from runtime.files import atomic_path

COMPARABLE = ("features", "inception_path", "target", "target_state", "num_samples")  # fields of results


def draw_figure(path, results):
    """Write `results` of checkpoints as a PNG: one line a sampler, one a checkpoint.

    Drawn are those that can be compared with the newest: with its features, target and number of samples.
    """
    sampled = [r for r in results if r["sampler"] is not None]
    if not sampled:
        return
    sampled = [r for r in sampled if all(r.get(key) == sampled[-1].get(key) for key in COMPARABLE)]
    metric = main_metric(sampled[-1])
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, sampled, metric, label=sampler_name, place=lambda r: r["step"])
    _lines(right, sampled, metric, label=lambda r: f"step {r['step']}", place=lambda r: r["nfe"])
    left.set(xlabel="training step", ylabel=f"{TITLES[metric]} (log)", yscale="log")
    right.set(xlabel="function evaluations (NFE, log)", xscale="log")
    for axis in (left.yaxis, right.xaxis):  # 48 and 2, not 4.8 × 10¹ and 2 × 10⁰
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _lines(axes, results, metric, label, place):
    """Draw one line for each label, its points in order of place."""
    groups = {}
    for result in results:
        groups.setdefault(f"{label(result)}, {result['weights']}", []).append((place(result), result[metric]))
    for name, points in groups.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.grid(alpha=0.3)
    if len(groups) <= 12:  # more lines than colours to tell them by need no legend
        axes.legend(fontsize=7)
