"""results.csv: a row for each finished step, kept in the repository so that nobody has to run it again."""

import csv
import pathlib

from runtime.errors import UserError
from runtime.files import atomic_path

COLUMNS = ("step", "kind", "seed", "digest", "commit", "seconds", "nfe", "feature_distance", "pixel_distance",
           "nearest", "straightness", "loss", "parameters", "gmacs", "latency_ms")
NUMBERS = COLUMNS[5:]


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
            raise UserError(f"{path}, line {line}, has not {len(COLUMNS)} fields: restore the file with git")
        try:
            row.update({name: float(row[name]) if row[name] else None for name in NUMBERS})
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}: restore the file with git") from None
    return {row["step"]: row for row in rows}


def write_table(path, rows):
    """Write {step name: row} sorted by name, four to six digits a figure; the file appears whole."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in sorted(rows):
            writer.writerow({column: _text(rows[name].get(column)) for column in COLUMNS})


def _text(value):
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
