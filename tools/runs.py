"""List the runs of a folder with their step, loss and last sample: `python -m tools.runs [--work_dir logs]`."""

import json
import pathlib
import time

from configs.command_line import run_program
from configs.default import Field
from models.checkpoint import numbered_checkpoints
from runtime.errors import UserError
from runtime.files import read_json_lines

FLAGS = {"work_dir": Field("logs", "folder of the runs, searched with its sub-folders")}

COLUMNS = ("run", "step", "of", "loss", "images/s", "skipped", "newest checkpoint", "last sample", "last written")


def describe_run(path, root):
    """Return the texts of one row for the run folder `path` below `root`."""
    entries = read_json_lines(path / "log.jsonl")
    last = entries[-1] if entries else {}
    config = json.loads((path / "config.json").read_text())
    samples = sorted((path / "samples").glob("*.png"), key=lambda p: p.stat().st_mtime)
    checkpoints = list(numbered_checkpoints(path / "checkpoints").values())
    written = max((p.stat().st_mtime for p in path.iterdir()), default=0)
    loss = last.get("loss")
    return [str(path.relative_to(root)), str(last.get("step", 0)), str(config["training"]["n_iters"]),
            "-" if loss is None else f"{loss:.4f}", f"{last.get('images_per_second', 0):.0f}",
            str(last.get("skipped", 0)), checkpoints[-1].name if checkpoints else "-",
            str(samples[-1]) if samples else "-", time.strftime("%Y-%m-%d %H:%M", time.localtime(written))]


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
