"""Sample images from every checkpoint of a run, or from one file, all from the same noise.

Into {run}/eval_sample/{checkpoint}/ go a grid for each sampler, {sampler}_sample_{nfe}.png; where there are several,
contact_sheet.png, which compares them; pixel_trajectories.png, the values of a few pixels from noise to image; and
samples.json with sampler, NFE, seconds, straightness, seed and checkpoint of each grid. What else makes an image
another is in the name, as in euler_sample_2_seed7_class3.png. Checkpoints are those of the folder, or from
eval.begin_ckpt to eval.end_ckpt where these are given. With --config.sampling.use_ode_sampler that sampler is used;
otherwise a survey: rk45, then Euler with 1, 2, 5, 10, 20, 50 and 100 steps. A grid has eval.batch_size images where
that is given, 64 otherwise, or with --classes a row of ten for each class.
"""

from runtime.errors import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import json
import math
import pathlib
import time
import zlib

import torch

from configs.command_line import run_script
from configs.default import FIELDS, Field, get_field
from datasets import load_images, one_hot
from flows.rectified_flow import velocity_from_network
from flows.samplers import SAMPLERS, Trajectories, create_sampler, euler, sampler_values, straightness
from metrics.sweep import checkpoint_folder, run_folder, sweep
from models.checkpoint import is_remote, load_with_config, numbered_checkpoints
from runtime.devices import in_precision, set_precision, start_processes
from runtime.files import write_json
from runtime.pictures import save_grid, save_lines
from runtime.progress import progress_bar
from runtime.seeds import index_labels, index_noise

FLAGS = {
    "sampling_dir": Field("", "run folder whose checkpoints are sampled, or one .pth or .pkl (hf:// and https:// too)"),
    "use_ema": Field(True, "sample with the EMA weights (false: the raw ones)"),
    "classes": Field("", "class-conditional models: a grid row for each of these classes: 0,3,7 or cat,dog or all"),
}

IMAGES = 64  # in a grid, unless eval.batch_size is given
ROW = 10  # images in a row of the contact sheet, and of a class
SURVEY_STEPS = (1, 2, 5, 10, 20, 50, 100)  # of Euler's rule, after rk45
STRAIGHTNESS_STEPS = 100
TRACED_SAMPLES, TRACED_PIXELS = 4, 6  # in the plot of pixels over time
# Fields beside the sampler's own that make an image another where they are given, and their words in a file's name.
NAMED = {"seed": "seed", "sampling.class_label": "class", "sampling.init_noise_scale": "scale", "flow.eps": "eps",
         "training.precision": ""}


def main(config, args, given):
    """Sample the checkpoints that the flags name and say where the pictures are."""
    paths = checkpoint_paths(args.sampling_dir, config.eval, given)
    set_precision(config.training.precision)
    with start_processes() as processes:
        if processes.world_size > 1:
            raise UserError("image_sampling.py uses one process; start it with python, not torchrun")
        for path in paths:
            sample_checkpoint(path, config, args, given, processes.device)


def checkpoint_paths(place, settings, given):
    """Return the checkpoint files that --sampling_dir and config.eval (`settings`) ask for, at least one.

    eval.begin_ckpt and end_ckpt count only where they were given: their defaults are for FID sweeps.
    """
    if not place:
        raise UserError("name a run folder or a .pth or .pkl file with --sampling_dir")
    if is_remote(place) or pathlib.Path(place).is_file():
        return [place]
    if not pathlib.Path(place).is_dir():
        raise UserError(f"--sampling_dir {place} is neither a run folder nor a .pth or .pkl file")
    folder = checkpoint_folder(place)
    begin = settings.begin_ckpt if "eval.begin_ckpt" in given else 0
    end = settings.end_ckpt if "eval.end_ckpt" in given else 0
    if not numbered_checkpoints(folder):
        raise UserError(f"--sampling_dir {place} has no checkpoint_{{k}}.pth in {folder}; train first, or name a "
                        "run folder")
    return list(sweep(folder, begin, end, read=lambda path: path))


def sample_checkpoint(path, config, args, given, device):
    """Sample one checkpoint and write everything about it; nothing is written before all of it is sampled."""
    config, net, digest = load_with_config(path, config, given, args.use_ema, device)
    velocity = velocity_from_network(in_precision(net, config.training.precision, device))
    classes, titles = class_rows(args.classes, config, given)
    z, label = start_of_samples(config, classes, given, device)
    name = pathlib.Path(path).stem + ("" if args.use_ema else "_raw")
    choices = chosen_samplers(config, given)
    with progress_bar(total=len(z) * len(choices), desc=f"sampling {name}", unit="images",
                      enabled=config.training.progress) as bar:
        grids = [sample_grid(velocity, z, label, choice, bar.update) for choice in choices]

    bend, trajectories = None, None
    if config.flow.flow_t_schedule != "t0" and max(entry["nfe"] for _, entry in grids) > 1:
        # A one-step model knows no time but the first: it has no trajectory.
        first = slice(0, min(len(z), config.sampling.batch_size))
        bend = straightness(velocity, z[first], None if label is None else label[first], steps=STRAIGHTNESS_STEPS,
                            t_start=config.flow.eps).mean().item()
        trajectories = trace_pixels(velocity, z, label, config.flow.eps)

    folder = (pathlib.Path() if is_remote(path) else run_folder(path)) / "eval_sample" / name
    suffix = file_suffix(NAMED, config, given) + suffix_of_images(classes, len(z))
    columns = ROW if titles else math.isqrt(len(z) - 1) + 1
    for images, entry in grids:
        own = {f"sampling.{field}": field for field in SAMPLERS[entry["sampler"]].fields if field != "sample_N"}
        stem = f"{entry['sampler']}_sample_{round(entry['nfe'])}"  # the evaluations tell sample_N
        entry["file"] = stem + file_suffix(own, config, given) + suffix + ".png"
        save_grid(folder / entry["file"], images, columns, titles)
    if len(grids) > 1:  # of one sampler the grid tells as much, and the sheet of an earlier survey stays
        sheet = torch.cat([images[:ROW] for images, _ in grids])
        save_grid(folder / f"contact_sheet{suffix}.png", sheet, min(ROW, len(z)), [title_of(e) for _, e in grids])
    if trajectories:
        save_lines(folder / f"pixel_trajectories{suffix}.png", trajectories,
                   f"{name}: {TRACED_PIXELS} pixels a sample, {STRAIGHTNESS_STEPS} Euler steps",
                   "time t (0: noise, 1: image)", "pixel value (images: -1 to 1)")
    about = {"checkpoint": str(path), "digest": digest, "weights": "EMA" if args.use_ema else "raw",
             "seed": config.seed, "images": len(z), "straightness": bend}
    write_entries(folder / "samples.json", [about | entry for _, entry in grids])
    print(f"{folder}: {', '.join(title_of(entry) for _, entry in grids)}"
          + ("" if bend is None else f"; straightness {bend:.4g}"), flush=True)


def file_suffix(words, config, given):
    """Return `_seed7_scale2`: {field: its word} of the given fields that differ from their default, for file names."""
    values = {name: get_field(config, name) for name in words if name in given}
    return "".join(f"_{words[name]}{value}" for name, value in values.items() if value != FIELDS[name].default)


def suffix_of_images(classes, count):
    """Return what the rows of --classes, or another number of images than usual, add to the name of a file."""
    if not classes:
        return "" if count == IMAGES else f"_{count}images"
    text = "-".join(map(str, classes))
    return "_classes" + (text if len(text) < 60 else f"{len(classes)}-{zlib.crc32(text.encode()):08x}")


def start_of_samples(config, classes, given, device):
    """Return noise z `(N, C, H, W)` and one-hot label `(N, K)` or None; `classes` has the class of each row of ten."""
    count = config.eval.batch_size if "eval.batch_size" in given else IMAGES
    if classes:
        count = ROW * len(classes)
    data, chosen = config.data, config.sampling.class_label
    z = index_noise(config.seed, range(count), (data.num_channels, data.image_size, data.image_size))
    z = (z * config.sampling.init_noise_scale).to(device)
    if not data.num_classes:
        if "sampling.class_label" in given:
            raise UserError(f"config.sampling.class_label is {chosen}, but this model has no classes")
        return z, None
    if chosen >= data.num_classes:
        raise UserError(f"config.sampling.class_label is {chosen}, but the classes are 0 to {data.num_classes - 1}")
    if classes:
        numbers = torch.tensor(classes).repeat_interleave(ROW)
    elif chosen >= 0:
        numbers = torch.full((count,), chosen)
    else:
        numbers = index_labels(config.seed, range(count), data.num_classes)
    return z, one_hot(numbers.to(device), data.num_classes)


def class_rows(asked, config, given):
    """Return the classes that --classes asks for and a title for each; ([], None) without the flag.

    Names are those of the data set that the model was trained on, which is read only where they are asked for.
    """
    if not asked:
        return [], None
    count = config.data.num_classes
    if not count:
        raise UserError(f"--classes {asked}: this model has no classes; leave the flag out")
    if "sampling.class_label" in given:
        raise UserError("--classes and --config.sampling.class_label are both given; give one of them")
    words = [str(k) for k in range(count)] if asked == "all" else [word.strip() for word in asked.split(",")]
    names = [f"class {k}" for k in range(count)]
    if not all(word.isdecimal() for word in words):
        try:
            names = load_images(config).class_names or names
        except UserError as error:
            raise UserError(f"--classes {asked}: the classes' names are not known ({error}); give numbers") from None
    wrong = [word for word in words if word not in names and not (word.isdecimal() and int(word) < count)]
    if wrong:
        raise UserError(f"--classes {asked}: {wrong[0]!r} is no class; the classes are 0 to {count - 1}, or all, or "
                        f"names: {', '.join(names[:12])}{', …' if count > 12 else ''}")
    numbers = [int(word) if word.isdecimal() else names.index(word) for word in words]
    return numbers, [names[number] for number in numbers]


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
    with torch.autocast(z.device.type, enabled=False):  # while it lasts, in_precision's autocast keeps cast weights
        x, nfe = sample(velocity, z, label, batch_size=min(settings.batch_size, len(z)), finished=finished)
    images = x.float().cpu()
    seconds = time.perf_counter() - started
    bad = (~images.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        raise UserError(f"{name}: sample {bad[0].item()} is not finite; the network has diverged, or needs "
                        "--config.training.precision fp32")
    about = {"sampler": name, "nfe": nfe.double().mean().item(), "seconds": round(seconds, 4)}
    return images, about | sampler_values(config)


def title_of(entry):
    """Return a few words for the contact sheet: `euler, NFE 10`."""
    return f"{entry['sampler']}, NFE {entry['nfe']:.4g}"


def trace_pixels(velocity, z, label, eps):
    """Return (times, values, title) of a few pixels of a few samples; reflow straightens these curves."""
    trajectories, samples = Trajectories(), torch.arange(min(len(z), TRACED_SAMPLES))
    with torch.no_grad():
        euler(velocity, z[:len(samples)], None if label is None else label[:len(samples)], steps=STRAIGHTNESS_STEPS,
              t_start=eps, record=lambda t, x: trajectories(samples, t, x))
    curves = []
    for sample in samples.tolist():
        t, states = trajectories.of(sample)
        pixels = states.flatten(1)
        for place in torch.linspace(0, pixels.shape[1] - 1, TRACED_PIXELS + 2).long()[1:-1].tolist():
            curves.append((t.tolist(), pixels[:, place].tolist(), f"sample {sample}"))
    return curves


def write_entries(path, entries):
    """Write the entries, and keep those of earlier calls whose pictures were not replaced."""
    new = {entry["file"] for entry in entries}
    try:
        old = json.loads(path.read_text(errors="replace")) if path.is_file() else []
        old = [entry for entry in old if isinstance(entry["file"], str)]
    except (ValueError, TypeError, KeyError):
        print(f"{path} is damaged: what it says of earlier images is dropped", flush=True)
        old = []
    kept = [entry for entry in old if entry["file"] not in new and (path.parent / entry["file"]).exists()]
    write_json(path, kept + entries)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
