"""The demo's report: a table of every stage's figures, one picture, and the verdict on the thresholds."""

import pathlib

import torch

from datasets import load_images, pixels_to_float
from flows import samplers
from flows.rectified_flow import velocity_from_network
from metrics.results import newest_of_each, read_results, results_path
from models import load_model
from runtime.files import write_json, write_text
from runtime.pictures import save_grid
from runtime.seeds import index_noise

COLUMNS = 16
RUN_OF_STAGE = {"1-flow": "1_flow", "2-flow": "2_flow", "distilled": "distilled"}


def report_rows(folder, seconds):
    """Return the rows of report.json: one per stage and sampler, from the runs' eval/results.jsonl.

    seconds: {stage: seconds of training}. The key `seconds` is the time of sampling and measuring, which grows with
    nfe; `training_seconds` that of the stage's training.
    """
    rows = []
    for stage, run in RUN_OF_STAGE.items():
        for result in newest_of_each(read_results(results_path(folder / run))):
            rows.append({
                "stage": stage,
                "sampler": result["sampler"] if result["sampler"] != "euler" else f"euler-{result['sample_N']}",
                "parameters": result["parameters"],
                "nfe": result["nfe"],
                "frechet_distance": result["pixel_frechet_distance"],
                "seconds": result["seconds"],
                "training_seconds": seconds[stage],
                "nearest_training_image": result["nn_distance"],
                "nearest_among_real": result["nn_distance_real"],
                "samples": result["num_samples"],
            })
    return rows


def verdict(rows, thresholds, largest_student):
    """Return a list of (sentence, whether it holds): the thresholds, and the student's share of parameters."""
    found = {(row["stage"], row["sampler"]): row for row in rows}
    checks = [
        (f"{stage} {sampler}: {found[stage, sampler]['frechet_distance']:.3f}, at most {limit} wanted",
         found[stage, sampler]["frechet_distance"] <= limit)
        for (stage, sampler), limit in thresholds.items()
    ]
    share = found["distilled", "one_step"]["parameters"] / found["1-flow", "rk45"]["parameters"]
    checks.append((f"student's share of the teacher's parameters: {share:.1%}, at most {largest_student:.0%} wanted",
                   share <= largest_student))
    return checks


def markdown(rows, seconds, checks, total):
    """Return the report as markdown."""
    lines = [
        "# SlimFlow on handwritten digits", "",
        "Fréchet distance of the pixels themselves (uint8, mapped to [-1, 1]): no FID, smaller is better; two random "
        "halves of the data are about 0.3 apart. The nearest-image columns are medians of the Euclidean distance of a "
        "sample, and of a real image, to the nearest (other) training image: samples much nearer than real images "
        "are to each other would be copies.", "",
        "| stage | sampler | parameters | NFE | Fréchet distance | seconds | nearest training image | "
        "real to real |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {r['stage']} | {r['sampler']} | {r['parameters']:,} | {r['nfe']:.4g} | {r['frechet_distance']:.3f} | "
          f"{r['seconds']:.1f} | {r['nearest_training_image']:.2f} | {r['nearest_among_real']:.2f} |" for r in rows),
        "", f"`seconds` is the time to sample and measure {rows[0]['samples']:,} images.", "",
        "| step of the method | seconds |", "|---|---|",
        *(f"| {name} | {seconds[name]:.0f} |" for name in ("1-flow", "pairs", "2-flow", "distilled")),
        f"| everything, evaluation and pictures included | {total:.0f} |", "",
        *(f"- {'met' if holds else 'MISSED'}: {sentence}" for sentence, holds in checks),
        "", "![data, 1-flow, 2-flow and distilled samples from the same noise](demo.png)", "",
    ]
    return "\n".join(lines)


@torch.no_grad()
def draw(folder, config):
    """Write demo.png: data, then the stages from the same noise, in labelled rows."""
    real = load_images(config).images[:COLUMNS]
    shape = real.shape[1:]
    z0 = index_noise(config.seed, range(COLUMNS), shape)
    velocities = {run: velocity_from_network(load_model(newest_checkpoint(folder / run)))
                  for run in RUN_OF_STAGE.values()}
    eps = config.flow.eps
    adaptive = samplers.create_sampler(config)
    rows = {
        "data": pixels_to_float(torch.tensor(real)),
        "1-flow, one step": samplers.one_step(velocities["1_flow"], z0, t_start=eps)[0],
        "1-flow, rk45": adaptive(velocities["1_flow"], z0)[0],
        "2-flow, one step": samplers.one_step(velocities["2_flow"], z0, t_start=eps)[0],
        "distilled, one step": samplers.one_step(velocities["distilled"], z0, t_start=eps)[0],
    }
    save_grid(folder / "demo.png", torch.cat(list(rows.values())), columns=COLUMNS, labels=list(rows))


def newest_checkpoint(run):
    """Return the path of the only checkpoint of a demo run."""
    return pathlib.Path(run) / "checkpoints" / "checkpoint_1.pth"


def write_report(folder, config, seconds, total, thresholds, largest_student):
    """Write report.json, report.md and demo.png into `folder`; return (markdown, whether all thresholds hold)."""
    rows = report_rows(folder, seconds)
    checks = verdict(rows, thresholds, largest_student)
    text = markdown(rows, seconds, checks, total)
    draw(folder, config)
    write_json(folder / "report.json", rows)
    write_text(folder / "report.md", text)
    return text, all(holds for _, holds in checks)
