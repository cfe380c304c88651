"""Sample pictures from every checkpoint of a run, or from one .pth, all from the same noise.

Into {run}/eval_sample/{checkpoint}/ go a grid for each sampler, {sampler}_sample_{nfe}.png; where there are several,
the sheet that compares them, contact_sheet.png; ways of a few pixels from noise to image, pixel_trajectories.png; and
samples.json with sampler, NFE, seconds, straightness, seed and checkpoint of each grid. Checkpoints are those of the
folder, or from eval.begin_ckpt to eval.end_ckpt where these are given. With --config.sampling.use_ode_sampler given,
that sampler is used; otherwise a survey: rk45, then Euler with 1, 2, 5, 10, 20, 50 and 100 steps. A grid has
eval.batch_size images where that is given, 64 otherwise, or with --classes a row of ten for each class.
"""

import json
import math
import pathlib
import time

import torch

from configs.command_line import run_script
from configs.default import Field
from datasets import one_hot
from flows.rectified_flow import velocity_from_network
from flows.samplers import Trajectories, create_sampler, euler, sampler_values, straightness
from metrics.sweep import checkpoint_folder, run_folder, sweep
from models.checkpoint import is_remote, load_with_config, numbered_checkpoints
from runtime.devices import in_precision, set_precision, start_processes, stop_processes
from runtime.errors import UserError
from runtime.files import write_json
from runtime.pictures import save_grid, save_lines
from runtime.progress import progress_bar
from runtime.seeds import index_labels, index_noise

FLAGS = {
    "sampling_dir": Field("", "run folder whose checkpoints are sampled, or one .pth or .pkl (hf:// and https:// too)"),
    "use_ema": Field(True, "sample with the EMA weights (false: the raw ones)"),
    "classes": Field("", "class-conditional models: a grid row for each of these classes, as 0,3,7 or all"),
}

IMAGES = 64  # in a grid, unless eval.batch_size is given
ROW = 10  # images in a row of the contact sheet, and of a class
SURVEY_STEPS = (1, 2, 5, 10, 20, 50, 100)  # of Euler's rule, after rk45
STRAIGHTNESS_STEPS = 100
TRACED_SAMPLES, TRACED_PIXELS = 4, 6  # in the plot of pixels over time


def main(config, args, given):
    """Sample the checkpoints that the flags name and say where the pictures are."""
    paths = checkpoint_paths(args.sampling_dir, config.eval, given)
    processes = start_processes()
    if processes.world_size > 1:
        raise UserError("image_sampling.py uses one process; start it with python, not torchrun")
    set_precision(config.training.precision)
    try:
        for path in paths:
            sample_checkpoint(path, config, args, given, processes.device)
    finally:
        stop_processes()


def checkpoint_paths(place, settings, given):
    """Return the checkpoint files that --sampling_dir and config.eval (`settings`) ask for, at least one.

    eval.begin_ckpt and end_ckpt count only where they were given: their defaults are for FID sweeps.
    """
    if not place:
        raise UserError("name a run folder or a .pth or .pkl file with --sampling_dir")
    if is_remote(place) or (place.endswith((".pth", ".pkl")) and pathlib.Path(place).is_file()):
        return [place]
    if not pathlib.Path(place).is_dir():
        raise UserError(f"--sampling_dir {place} is neither a run folder nor a .pth or .pkl file")
    folder = checkpoint_folder(place)
    begin = settings.begin_ckpt if "eval.begin_ckpt" in given else 0
    end = settings.end_ckpt if "eval.end_ckpt" in given else 0
    if not numbered_checkpoints(folder):
        raise UserError(f"--sampling_dir {place} has no checkpoint_{{k}}.pth in {folder}; train first, or name a "
                        "run folder")
    return list(sweep(folder, begin, end, skipped=lambda first, last: None))


def sample_checkpoint(path, config, args, given, device):
    """Sample one checkpoint and write everything about it; nothing is written before all of it is sampled."""
    config, net, digest = load_with_config(path, config, given, args.use_ema, device)
    velocity = velocity_from_network(in_precision(net, config.training.precision, device))
    z, label, row_labels = start_of_samples(config, args.classes, given, device)
    name = pathlib.Path(path).stem + ("" if args.use_ema else "_raw")
    about = {"checkpoint": str(path), "digest": digest,
             "weights": "EMA" if args.use_ema else "raw", "seed": config.seed, "images": len(z)}

    choices = chosen_samplers(config, given)
    with progress_bar(total=len(z) * len(choices), desc=f"sampling {name}", unit="images",
                      enabled=config.training.progress) as bar:
        grids = [sample_grid(velocity, z, label, choice, bar.update) for choice in choices]
    first = slice(0, min(len(z), config.sampling.batch_size))
    bend = straightness(velocity, z[first], None if label is None else label[first], steps=STRAIGHTNESS_STEPS,
                        t_start=config.flow.eps).mean().item()

    folder = output_folder(path) / "eval_sample" / name
    columns = ROW if row_labels else math.isqrt(len(z) - 1) + 1
    for images, entry in grids:
        save_grid(folder / entry["file"], images, columns, row_labels)
    if len(grids) > 1:  # of one sampler the grid tells as much, and the sheet of an earlier survey stays
        sheet = torch.cat([images[:ROW] for images, _ in grids])
        save_grid(folder / "contact_sheet.png", sheet, min(ROW, len(z)), [title_of(entry) for _, entry in grids])
    draw_trajectories(folder / "pixel_trajectories.png", velocity, z, label, config.flow.eps, name)
    write_entries(folder / "samples.json", [about | {"straightness": bend} | entry for _, entry in grids])
    print(f"{folder}: {', '.join(title_of(entry) for _, entry in grids)}; straightness {bend:.4g}", flush=True)


def output_folder(path):
    """Return the folder that gets eval_sample/: the run's, or the current one for a checkpoint from elsewhere."""
    return pathlib.Path() if is_remote(path) else run_folder(path)


def start_of_samples(config, classes, given, device):
    """Return noise z `(N, C, H, W)`, one-hot label `(N, K)` or None, and a text per grid row or None."""
    count = config.eval.batch_size if "eval.batch_size" in given else IMAGES
    rows = class_rows(classes, config, given)
    if rows:
        count = ROW * len(rows)
    data = config.data
    z = index_noise(config.seed, range(count), (data.num_channels, data.image_size, data.image_size))
    z = (z * config.sampling.init_noise_scale).to(device)
    chosen = config.sampling.class_label
    if not data.num_classes:
        if "sampling.class_label" in given:
            raise UserError(f"config.sampling.class_label is {chosen}, but this model has no classes")
        return z, None, None
    if chosen >= data.num_classes:
        raise UserError(f"config.sampling.class_label is {chosen}, but the classes are 0 to {data.num_classes - 1}")
    if rows:
        numbers = torch.tensor(rows).repeat_interleave(ROW)
    elif chosen >= 0:
        numbers = torch.full((count,), chosen)
    else:
        numbers = index_labels(config.seed, range(count), data.num_classes)
    return z, one_hot(numbers.to(device), data.num_classes), [f"class {k}" for k in rows] or None


def class_rows(classes, config, given):
    """Return the classes of --classes, a row each; an empty list without the flag."""
    if not classes:
        return []
    if not config.data.num_classes:
        raise UserError(f"--classes {classes}: this model has no classes; leave the flag out")
    if "sampling.class_label" in given:
        raise UserError("--classes and --config.sampling.class_label are both given; give one of them")
    if classes == "all":
        return list(range(config.data.num_classes))
    words = [word.strip() for word in classes.split(",")]
    wrong = next((word for word in words if not word.isdecimal() or int(word) >= config.data.num_classes), None)
    if wrong is not None:
        raise UserError(f"--classes {classes}: {wrong!r} is no class; the classes are 0 to "
                        f"{config.data.num_classes - 1}, or all")
    return [int(word) for word in words]


def chosen_samplers(config, given):
    """Return a config for each sampler: the one that was asked for, or those of the survey."""
    if "sampling.use_ode_sampler" in given:
        return [config]
    survey = [("rk45", config.sampling.sample_N)] + [("euler", steps) for steps in SURVEY_STEPS]
    choices = []
    for name, steps in survey:
        choice = config.copy_and_resolve_references()
        choice.sampling.update(use_ode_sampler=name, sample_N=steps)
        choices.append(choice)
    return choices


def sample_grid(velocity, z, label, config, finished):
    """Return the images from noise z on the CPU and what samples.json says of their sampler."""
    sample, settings, name = create_sampler(config), config.sampling, config.sampling.use_ode_sampler
    started = time.perf_counter()
    x, nfe = sample(velocity, z, label, batch_size=min(settings.batch_size, len(z)), finished=finished)
    images = x.float().cpu()
    seconds = time.perf_counter() - started
    bad = (~images.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        raise UserError(f"{name}: sample {bad[0].item()} is not finite; the network has diverged, or needs "
                        "--config.training.precision fp32")
    mean_nfe = nfe.double().mean().item()
    entry = {
        "file": f"{name}_sample_{round(mean_nfe)}.png",
        "sampler": name,
        "nfe": mean_nfe,
        "seconds": round(seconds, 4),
    } | sampler_values(config)
    return images, entry


def title_of(entry):
    """Return a few words for the contact sheet: `euler, NFE 10`."""
    return f"{entry['sampler']}, NFE {entry['nfe']:.4g}"


def draw_trajectories(path, velocity, z, label, eps, name):
    """Plot the values of a few pixels of a few samples over t: straight lines are what reflow is after."""
    few, ways = slice(0, TRACED_SAMPLES), Trajectories()
    samples = torch.arange(len(z[few]))
    with torch.no_grad():
        euler(velocity, z[few], None if label is None else label[few], steps=STRAIGHTNESS_STEPS, t_start=eps,
              record=lambda t, x: ways(samples, t, x))
    curves = []
    for sample in samples.tolist():
        t, states = ways.of(sample)
        pixels = states.flatten(1)
        for place in torch.linspace(0, pixels.shape[1] - 1, TRACED_PIXELS + 2).long()[1:-1].tolist():
            curves.append((t.tolist(), pixels[:, place].tolist(), f"sample {sample}"))
    save_lines(path, curves, f"{name}: pixels on their way ({STRAIGHTNESS_STEPS} Euler steps)", "t", "pixel value")


def write_entries(path, entries):
    """Write the entries, and keep those of earlier calls whose pictures were not replaced."""
    new = {entry["file"] for entry in entries}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [entry for entry in old if entry["file"] not in new and (path.parent / entry["file"]).exists()]
    write_json(path, kept + entries)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
