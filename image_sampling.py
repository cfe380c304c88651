"""Sample images from every checkpoint of a run, or from one file, all from the same noise.

{run}/eval_sample/{checkpoint}/ receives a grid for each sampler, {sampler}_sample_{nfe}.png; contact_sheet.png, which
compares several; pixel_trajectories.png, the values of a few pixels from noise to image; and samples.json with sampler,
NFE, seconds, straightness, seed and checkpoint of each grid. File names include other options that were given, as in
euler_sample_2_seed7_class3.png. Without --config.sampling.use_ode_sampler the samplers are rk45 and Euler with 1, 2, 5,
10, 20, 50 and 100 steps. eval.begin_ckpt and eval.end_ckpt select among the checkpoints of a folder. A grid has
eval.batch_size images if that is given, otherwise 64, or with --classes a row of ten for each class.
"""

from runtime.terminal import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import functools
import json
import math
import pathlib
import time
import zlib

import torch

from configs.command_line import run_script
from configs.default import SAMPLING_READS, Field, get_field
from datasets import load_images, one_hot
from datasets.batches import check_finite
from datasets.pairs import image_shape
from flows.rectified_flow import velocity_from_network
from flows.samplers import SAMPLERS, create_sampler, sampler_values, straightness
from models.checkpoint import is_remote, load_with_config
from runtime.devices import compiled, explained, in_precision, set_precision, start_processes
from runtime.files import write_json
from runtime.plots import save_grid, save_lines
from runtime.run_folder import GRIDS, checkpoint_folder, numbered_checkpoints, run_folder
from runtime.seeds import index_labels, index_noise
from runtime.terminal import print_message, progress_bar

FLAGS = {
    "sampling_dir": Field("", "run folder whose checkpoints are sampled, or one .pth or .pkl (also hf://, https://)"),
    "use_ema": Field(True, "sample with the EMA weights (false: the raw ones)"),
    "classes": Field("", "class-conditional models: a grid row for each of these classes: 0,3,7 or cat,dog or all"),
}
READS = (*SAMPLING_READS, "work_dir", "flow.flow_t_schedule", "sampling.batch_size", "eval.begin_ckpt", "eval.end_ckpt",
         "eval.batch_size")

IMAGES = 64  # per grid, unless eval.batch_size is given
ROW = 10  # images per row of the contact sheet, and per class
SURVEY = [("rk45", 1), *(("euler", steps) for steps in (1, 2, 5, 10, 20, 50, 100))]
STRAIGHTNESS_STEPS, TRACED_SAMPLES, TRACED_PIXELS = 100, 4, 6  # the last two of pixel_trajectories.png
# Fields other than the sampler's own that change an image, and their labels in file names.
NAMED = {"seed": "seed", "sampling.class_label": "class", "sampling.init_noise_scale": "scale", "flow.eps": "eps",
         "training.precision": ""}


def main(config, args, given):
    """Sample the checkpoints that the flags select."""
    paths = checkpoint_paths(args.sampling_dir, config.eval, given)
    set_precision(config.training.precision)
    with start_processes() as processes, explained("lower config.sampling.batch_size"):
        if processes.world_size > 1:
            raise UserError("image_sampling.py uses one process; start it with python, not torchrun")
        for path in paths:
            sample_checkpoint(path, config, args, given, processes.device)


def checkpoint_paths(sampling_dir, settings, given):
    """Return the checkpoint files of --sampling_dir, in the range of config.eval where that is given."""
    if is_remote(sampling_dir) or pathlib.Path(sampling_dir).is_file():
        return [sampling_dir]
    if not sampling_dir or not pathlib.Path(sampling_dir).is_dir():
        raise UserError(f"--sampling_dir {sampling_dir!r} is neither a run folder nor a .pth or .pkl file: name one")
    begin, end = (settings[name] if f"eval.{name}" in given else 0 for name in ("begin_ckpt", "end_ckpt"))
    found = numbered_checkpoints(checkpoint_folder(sampling_dir))
    paths = [path for k, path in found.items() if begin <= k <= (end or k)]
    if not paths:
        raise UserError(f"--sampling_dir {sampling_dir} has no checkpoint_{{k}}.pth with k in eval.begin_ckpt {begin} "
                        f"to eval.end_ckpt {end or 'the last'}; found: {', '.join(map(str, found)) or 'none at all'}")
    return paths


def sample_checkpoint(path, config, args, given, device):
    """Sample one checkpoint and write all its files, once everything is sampled."""
    config, net, digest = load_with_config(path, config, given, args.use_ema, device)
    network = compiled(net, config.training, print_message)
    velocity = velocity_from_network(in_precision(network, config.training.precision, device))
    classes, class_titles = class_rows(args.classes, config, given)
    z, label = initial_points(classes, config, given, device)
    name, grids, survey = pathlib.Path(path).stem + ("" if args.use_ema else "_raw"), [], SURVEY
    if "sampling.use_ode_sampler" in given:
        survey = [(config.sampling.use_ode_sampler, config.sampling.sample_N)]
    batches = -(-len(z) // config.sampling.batch_size)
    left = [batches * (steps if "sample_N" in SAMPLERS[sampler].fields else 1) for sampler, steps in survey]  # at least
    with progress_bar(total=sum(left), desc=f"sampling {name}", unit="evaluations",
                      enabled=config.training.progress) as bar:
        for sampler, steps in survey:
            config.sampling.update(use_ode_sampler=sampler, sample_N=steps)
            grids.append(sample_grid(functools.partial(count, bar, velocity), z, label, config))
            bar.total = bar.n + sum(left[len(grids):])

    straight = curves = None
    if config.flow.flow_t_schedule != "t0" and max(entry["nfe"] for _, entry in grids) > 1:
        # A one-step model is trained at the first time only and has no trajectory.
        straight, curves = trace(velocity, z, label, config)

    folder = run_folder(path, config.work_dir) / GRIDS / name
    suffix, columns = file_suffix(NAMED, config, given), ROW if classes else math.isqrt(len(z) - 1) + 1
    if classes or len(z) != IMAGES:
        listed = "-".join(map(str, classes))  # too many for a file name: their number and a digest
        listed = listed if len(listed) <= 100 else f"{len(classes)}_{zlib.crc32(listed.encode()):08x}"
        suffix += f"_classes{listed}" if classes else f"_{len(z)}images"
    for images, entry in grids:
        own = {f"sampling.{field}": field for field in SAMPLERS[entry["sampler"]].fields if field != "sample_N"}
        stem = f"{entry['sampler']}_sample_{round(entry['nfe'])}"  # its NFE implies sample_N
        entry |= {"file": stem + file_suffix(own, config, given) + suffix + ".png", "checkpoint": str(path),
                  "digest": digest, "weights": "EMA" if args.use_ema else "raw", "seed": config.seed,
                  "images": len(z), "straightness": straight}
        save_grid(folder / entry["file"], images, columns, class_titles)
    titles = [f"{entry['sampler']}, NFE {entry['nfe']:.4g}" for _, entry in grids]
    if len(grids) > 1:  # for one sampler the grid shows the same; an earlier sheet is kept
        sheet = torch.cat([images[:ROW] for images, _ in grids])
        save_grid(folder / f"contact_sheet{suffix}.png", sheet, min(ROW, len(z)), titles)
    if curves:
        save_lines(folder / f"pixel_trajectories{suffix}.png", curves,
                   f"{name}: {TRACED_PIXELS} pixels a sample, {STRAIGHTNESS_STEPS} Euler steps",
                   "time t (0: noise, 1: image)", "pixel value (images: -1 to 1)")
    write_entries(folder / "samples.json", [entry for _, entry in grids])
    print_message(f"{folder}: {'; '.join(titles)}{'' if straight is None else f'; straightness {straight:.4g}'}")


def class_rows(asked, config, given):
    """Return the class numbers of --classes and their names; ([], []) without the flag."""
    count = config.data.num_classes
    if not asked:
        return [], []
    if not count or "sampling.class_label" in given:
        raise UserError(f"--classes {asked}: this model has no classes; leave the flag out" if not count else
                        "--classes and --config.sampling.class_label are both given; give one of them")
    wanted = [str(k) for k in range(count)] if asked == "all" else [name.strip() for name in asked.split(",")]
    names = [f"class {k}" for k in range(count)]
    if not all(name.isdecimal() for name in wanted):  # the names of the data set, which is read only for them
        try:
            names = load_images(config).class_names or names
        except UserError as error:
            raise UserError(f"--classes {asked}: the classes' names are not known ({error}); give numbers") from None
    numbers = {name: k for k, name in enumerate(names)} | {str(k): k for k in range(count)}
    unknown = [name for name in wanted if name not in numbers]
    if unknown:
        raise UserError(f"--classes {asked}: {unknown[0]!r} is no class; the classes are 0 to {count - 1}, or all, or "
                        f"names: {', '.join(names[:12])}{', …' if count > 12 else ''}")
    return [numbers[name] for name in wanted], [names[numbers[name]] for name in wanted]


def initial_points(classes, config, given, device):
    """Return noise z `(N, C, H, W)` and one-hot label `(N, K)` or None; `classes`: those of the rows of ten, or []."""
    count = ROW * len(classes) or (config.eval.batch_size if "eval.batch_size" in given else IMAGES)
    z = index_noise(config.seed, range(count), image_shape(config)) * config.sampling.init_noise_scale
    numbers = (torch.tensor(classes).repeat_interleave(ROW) if classes else
               index_labels(config.seed, range(count), config.data.num_classes, config.sampling.class_label))
    return z.to(device), None if numbers is None else one_hot(numbers.to(device), config.data.num_classes)


def count(bar, velocity, *point):
    """Return the velocity at a point, a batch `(x, t, label)`, and count the evaluation."""
    bar.total = max(bar.total, bar.n + 1)
    bar.update()
    return velocity(*point)


def sample_grid(velocity, z, label, config):
    """Return the images sampled from z, on the CPU, and the entries of samples.json about the sampler."""
    sample, settings, name = create_sampler(config), config.sampling, config.sampling.use_ode_sampler
    started = time.perf_counter()
    with torch.autocast(z.device.type, enabled=False):  # this context keeps in_precision's cast weights
        x, nfe = sample(velocity, z, label, batch_size=min(settings.batch_size, len(z)))
    images = x.float().cpu()
    seconds = time.perf_counter() - started
    check_finite(images, range(len(images)), f"{name}: sample",
                 "the network has diverged, or needs --config.training.precision fp32")
    return images, {"sampler": name, "nfe": nfe.double().mean().item(), "seconds": round(seconds, 4),
                    **sampler_values(config)}


def trace(velocity, z, label, config):
    """Return the mean straightness, and curves (times, values, label) of a few pixels, which reflow straightens."""
    z, label = (part if part is None else part[: config.sampling.batch_size] for part in (z, label))
    with progress_bar(total=STRAIGHTNESS_STEPS, desc="straightness", unit="evaluations",
                      enabled=config.training.progress) as bar:
        values, times, states = straightness(functools.partial(count, bar, velocity), z, label,
                                             steps=STRAIGHTNESS_STEPS, t_start=config.flow.eps)
    pixels = states[:, :TRACED_SAMPLES].flatten(2).cpu()
    places = torch.linspace(0, pixels.shape[2] - 1, TRACED_PIXELS + 2).long()[1:-1]
    return values.mean().item(), [(times.tolist(), pixels[:, sample, place].tolist(), f"sample {sample}")
                                  for sample in range(pixels.shape[1]) for place in places]


def file_suffix(labels, config, given):
    """Return `_seed7_scale2`, for file names: the fields of `labels` that were given."""
    return "".join(f"_{labels[name]}{get_field(config, name)}" for name in labels if name in given)


def write_entries(path, entries):
    """Write the entries to samples.json, which keeps those of earlier calls whose images still exist."""
    new = {entry["file"] for entry in entries}
    try:
        old = json.loads(path.read_text(errors="replace")) if path.is_file() else []
        kept = [entry for entry in old if entry["file"] not in new and (path.parent / entry["file"]).exists()]
    except (ValueError, TypeError, KeyError, RecursionError):
        print_message(f"{path} is damaged: its entries for earlier images are dropped")
        kept = []
    write_json(path, kept + entries)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS, READS)
