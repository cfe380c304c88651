"""List the runs of a folder: updates done, loss, newest checkpoint and the last figure measured.

    python -m tools.runs --work_dir logs
"""

import pathlib
import time

from configs.command_line import load_config, run_program
from configs.default import Field
from metrics.results import TITLES, main_metric, read_results, results_path, sampler_name
from models.checkpoint import numbered_checkpoints
from runtime.errors import UserError
from runtime.files import read_json_lines

FLAGS = {"work_dir": Field("logs", "folder of the runs, searched with its sub-folders")}

COLUMNS = ("run", "step", "loss", "images/s", "newest", "last figure", "last written")


def describe_run(path, root):
    """Return the texts of one row for the run folder `path` below `root`."""
    entries, figures = read_json_lines(path / "log.jsonl"), read_results(results_path(path))
    last = entries[-1] if entries else {}
    try:
        updates = load_config(path / "config.json").training.n_iters
    except UserError:  # of another program, or damaged: the rest of the table is of use all the same
        updates = "?"
    newest = list(numbered_checkpoints(path / "checkpoints").values())[-1:]
    written = max(p.stat().st_mtime for p in path.iterdir())
    return [str(path.relative_to(root)), f"{last.get('step', 0)} of {updates}",
            f"{last['loss']:.4f}" if last.get("loss") is not None else "-",
            f"{last['images_per_second']:.0f}" if last.get("images_per_second") is not None else "-",
            newest[0].stem if newest else "-", figure_of(figures[-1]) if figures else "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(written))]


def figure_of(result):
    """Return a result's metric with what it is of: `FID 4.53 (checkpoint_16, euler-1)`."""
    metric = main_metric(result)
    return f"{TITLES[metric]} {result[metric]:.4g} ({pathlib.Path(result['checkpoint']).stem}, {sampler_name(result)})"


def find_runs(root):
    """Return the run folders below `root`, the one written last at the end."""
    return sorted((p.parent for p in root.rglob("config.json") if (p.parent / "checkpoints").is_dir()),
                  key=lambda p: p.stat().st_mtime)


def main(args):
    """Print the table."""
    root = pathlib.Path(args.work_dir)
    runs = find_runs(root) if root.is_dir() else []
    if not runs:
        raise UserError(f"no runs in {root}; name their folder with --work_dir")
    rows = [COLUMNS, *(describe_run(run, root) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS)
