"""Results of evaluations: one JSON object a line in eval/results.jsonl, a table, a protocol to quote, a figure."""

import json
import os
import pathlib

from flows.samplers import sampler_fields, sampler_title
from metrics.features import TITLES

# What makes two evaluations the same: with all of these equal, and the sampler's fields, the second is not computed.
IDENTITY = ("checkpoint", "digest", "weights", "sampler", "eps", "arithmetic", "init_noise_scale", "class_label",
            "seeds", "num_samples", "features", "inception_path", "target", "target_state")


def results_path(folder):
    """Return the results file of the run folder."""
    return pathlib.Path(folder) / "eval" / "results.jsonl"


def read_results(path):
    """Return the list of finished evaluations; a last line torn by a crash is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    results = []
    for line in path.read_text().splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [result for result in results if isinstance(result, dict)]


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
    same = [r for r in results if all(r.get(key) == wanted.get(key) for key in (*IDENTITY, *sampler_fields()))]
    return same[-1] if same else None


def newest_of_each(results):
    """Return `results` without those that a later line of the same identity replaced, in order."""
    latest = {json.dumps([result.get(key) for key in (*IDENTITY, *sampler_fields())]): result for result in results}
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
        rows.append([r["checkpoint"], _text(r["step"]), sampler_name(r), _text(r["nfe"]), str(r["num_samples"]),
                     *(_text(r.get(m)) for m in metrics), _text(r["nn_distance"]), _text(r["nn_distance_real"]),
                     f"{r['seconds']:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(value):
    if value is None:
        return "n/a"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
