"""List the runs in a folder: updates, loss, newest checkpoint and last result of evaluation_fid.py.

    python -m tools.runs logs
"""

import pathlib
import time

from configs.command_line import load_config, run_program
from configs.default import Field
from metrics.results import TITLES, fit_columns, main_metric, read_results, sampler_name
from runtime.files import read_json_lines
from runtime.run_folder import CHECKPOINTS, CONFIG, LOG, RESULTS, numbered_checkpoints
from runtime.terminal import UserError

FLAGS = {"work_dir": Field("logs", "folder of the runs, searched recursively")}


def describe_run(path, root):
    """Return a row of the table, {column: text}, for the run folder `path` below `root`."""
    last, figure = (read_json_lines(path / LOG) or [{}])[-1], "-"
    try:
        updates = load_config(path / CONFIG).training.n_iters
    except UserError:  # another program's, or damaged: the other columns are still of use
        updates = "?"
    for result in read_results(path / RESULTS)[-1:]:
        metric, checkpoint = main_metric(result), pathlib.Path(result["checkpoint"]).stem
        figure = f"{TITLES[metric]} {result[metric]:.4g} ({checkpoint}, {sampler_name(result).split()[0]})"
    written = max(p.stat().st_mtime for p in path.iterdir())
    return {"run": str(path.relative_to(root)), "step": f"{last.get('step', 0)} of {updates}",
            "loss": "-" if last.get("loss") is None else f"{last['loss']:.4g}",
            "images/s": "-" if last.get("images_per_second") is None else f"{last['images_per_second']:.0f}",
            "newest": ["-", *map(str, numbered_checkpoints(path / CHECKPOINTS))][-1],
            "last figure": figure, "last written": time.strftime("%m-%d %H:%M", time.localtime(written))}


def main(args):
    """Print the table, in the order in which the configs were written."""
    root = pathlib.Path(args.work_dir)
    configs = sorted((p for p in root.rglob(CONFIG) if (p.parent / CHECKPOINTS).is_dir()),
                     key=lambda p: p.stat().st_mtime)
    if not configs:
        raise UserError(f"no runs in {root}; name their folder with --work_dir")
    rows = [describe_run(path.parent, root) for path in configs]
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = fit_columns(lines, [lines[0].index(name) for name in ("run", "last figure")], gap=2)
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("work_dir",))
