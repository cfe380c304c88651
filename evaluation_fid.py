"""Measure samples: the Fréchet distance (FID) and its companions, for a sweep of checkpoints, one .pth, or files.

Results go to {ckpt_dir}/eval/results.jsonl, one line for each checkpoint and sampler; what is there already is
not computed again. torchrun splits the samples over its processes.
"""

import dataclasses
import datetime
import pathlib
import time

import torch

from configs.command_line import run_script
from configs.default import Field
from datasets.batch import one_hot
from datasets.images import ImageSet, load_images
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler, sampler_values
from metrics import results as results_file
from metrics.compare import compare
from metrics.cost import cost_line, cost_of
from metrics.features import FeatureExtractor, check_finite, check_shape, create_extractor, quantise
from metrics.figure import draw_figure
from metrics.gather import gather_rows, share_of, sum_over_processes
from metrics.image_files import open_images
from metrics.neighbours import leave_one_out_distances, nearest_distances
from metrics.reference import load_reference, read_batches
from metrics.sample_store import sample_store
from metrics.statistics import Statistics, measure
from metrics.sweep import checkpoint_folder, run_folder, sweep, sweep_and_wait
from metrics.versions import versions
from models.checkpoint import HUB, config_of_run, local_file, network_of, read_checkpoint
from models.describe import measure as count_operations
from runtime.devices import start_processes, stop_processes
from runtime.errors import UserError
from runtime.files import file_digest, state_digest
from runtime.progress import progress_bar
from runtime.seeds import EVALUATION, index_labels, index_noise
from training.update import in_precision, set_precision

FLAGS = {
    "ckpt_dir": Field("", "run folder (or one .pth) whose checkpoints are sampled and measured"),
    "data_dir": Field("", "images to measure instead: npy (NCHW in [-1, 1]), npz, folder or zip"),
    "target_path": Field("", "what to compare with: npz of mu and sigma, or images as npy, npz, folder or zip (empty: "
                         "CIFAR-10's published statistics; the training images for pixels)"),
    "use_ema": Field(True, "sample with the EMA weights (false: the raw ones)"),
    "force": Field(False, "compute again what results.jsonl has"),
}

BATCHES_AT_ONCE = 4  # handed to the sampler together, so that rk45's slots seldom run empty
PATIENCE = datetime.timedelta(days=7)  # of processes for one that waits for training or compares the features


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What samples are held against: features, reference statistics, training images (None: not there)."""

    extractor: FeatureExtractor
    reference: Statistics
    training_images: ImageSet | None
    nn_distance_real: float | None


def main(config, args, given):
    """Measure what the flags name and print a table and the line to quote."""
    if bool(args.ckpt_dir) == bool(args.data_dir):
        raise UserError("name either --ckpt_dir (checkpoints to sample) or --data_dir (images to measure)")
    processes = start_processes(PATIENCE)
    set_precision(config.training.precision)
    try:
        if args.data_dir:
            path, done = measure_files(config, args, processes)
        else:
            path, done = measure_checkpoints(config, args, given, processes)
        if processes.is_main:
            report(path, done)
    finally:
        stop_processes()


def measure_checkpoints(config, args, given, processes):
    """Measure every checkpoint of --ckpt_dir that has no result yet; return (results file, results of the sweep)."""
    path = results_file.results_path(results_folder(args.ckpt_dir, config.work_dir))
    paths = checkpoint_paths(config, args.ckpt_dir, processes)
    yardstick, cost, done, said = None, None, [], set()
    while (checkpoint := processes.share(next(paths, None))) is not None:
        content = read_checkpoint(checkpoint)
        config, remarks = config_of_run(config, content, given, checkpoint)
        for remark in [remark for remark in remarks if remark not in said]:
            say(processes, f"{checkpoint}: {remark}")
        said.update(remarks)
        identity = {"checkpoint": pathlib.Path(checkpoint).name, "digest": file_digest(local_file(checkpoint)),
                    "weights": "EMA" if args.use_ema else "raw", **sampling_identity(config),
                    **measuring_identity(config, args.target_path)}
        earlier = None if args.force else results_file.find_result(results_file.read_results(path), identity)
        earlier = processes.share(earlier)
        if earlier is not None:
            say(processes, f"{identity['checkpoint']}: already measured ({path}); --force measures it again")
            done.append(earlier)
            continue
        net = network_of(config, content, checkpoint, args.use_ema, processes.device)
        if yardstick is None:
            yardstick = create_yardstick(config, args.target_path, processes)
            multiplications = sum(count_operations(net, 1).macs.values())
            cost = cost_of(net, multiplications / 1e9, processes.device)
            say(processes, cost_line(cost))
        result = identity | {"step": int(content.get("step", 0))} | cost
        result |= measure_network(net, pathlib.Path(checkpoint).stem, config, yardstick, path, processes)
        done.append(result)
        publish(result, path, processes)
    return path, done


def checkpoint_paths(config, ckpt_dir, processes):
    """Return an iterator over the checkpoint files that --ckpt_dir and config.eval ask for."""
    if ckpt_dir.endswith(".pth"):
        if not pathlib.Path(local_file(ckpt_dir)).is_file():
            raise UserError(f"--ckpt_dir {ckpt_dir} does not exist")
        return iter([ckpt_dir])
    if not pathlib.Path(ckpt_dir).is_dir() and not config.eval.wait:
        raise UserError(f"--ckpt_dir {ckpt_dir} is neither a run folder nor a .pth file")
    folder, settings = checkpoint_folder(ckpt_dir), config.eval
    if settings.wait:
        return sweep_and_wait(folder, max(1, settings.begin_ckpt), settings.end_ckpt, settings.wait_limit * 3600,
                              why_unreadable, last_checkpoint)
    return sweep(folder, settings.begin_ckpt, settings.end_ckpt,
                 lambda k: say(processes, f"checkpoint_{k}.pth is not in {folder}: passed over"))


def results_folder(ckpt_dir, work_dir):
    """Return the folder whose eval/ takes the results: the run folder, also of a single .pth.

    What comes from Hugging Face has none: its results go to a folder of its name in config.work_dir.
    """
    if ckpt_dir.startswith(HUB):
        return pathlib.Path(work_dir, pathlib.Path(ckpt_dir).stem)
    return run_folder(ckpt_dir) if ckpt_dir.endswith(".pth") else pathlib.Path(ckpt_dir)


def why_unreadable(path):
    """Return None for a complete checkpoint, otherwise a sentence: it may still be on its way."""
    try:
        read_checkpoint(path)
    except UserError as error:
        return str(error)
    return None


def last_checkpoint(path):
    """Return the number of the last checkpoint that the run of this one will write, None if it does not say."""
    training = read_checkpoint(path).get("config", {}).get("training")
    return training and training["n_iters"] // training["snapshot_freq"]


def sampling_identity(config):
    """Return what of the sampling makes a result another: rule, steps, tolerance, noise and class of sample i."""
    sampling = config.sampling
    return {
        "sampler": sampling.use_ode_sampler,
        **sampler_values(config),
        "eps": config.flow.eps,
        "arithmetic": config.training.precision,
        "init_noise_scale": sampling.init_noise_scale,
        "class_label": sampling.class_label,
    }


def measuring_identity(config, target_path):
    """Return what of the measuring makes a result another. Raises UserError if there is no --target_path."""
    found, data = config.eval, config.data
    pixels = found.feature_extractor == "pixels"  # they are compared with the training images themselves
    target, state = " ".join(filter(None, [data.dataset, pixels and (data.data_root or data.custom_data_root)])), None
    if target_path:
        if not pathlib.Path(target_path).exists():
            raise UserError(f"--target_path {target_path} does not exist")
        target, state = target_path, state_digest(target_path)
    return {"seeds": {"samples": config.seed, "subsets": config.seed}, "num_samples": found.num_samples,
            "features": found.feature_extractor, "inception_path": None if pixels else found.inception_path,
            "target": target, "target_state": state}


def create_yardstick(config, target_path, processes):
    """Return the `Yardstick` that config.eval and --target_path ask for."""
    extractor = create_extractor(config, processes.device)
    training_images, distance = None, None
    try:
        training_images = load_images(config)
    except UserError as error:
        if extractor.name == "pixels" and not target_path:
            raise
        say(processes, f"no distance to the nearest training image: {error}")
    reference = load_reference(target_path, config, extractor, processes, training_images)
    if training_images is not None and config.eval.nearest:
        distances = leave_one_out_distances(training_images.images, config.eval.nearest, processes.device)
        distance = distances.median().item()
    return Yardstick(extractor, reference, training_images, distance)


def measure_network(net, stem, config, yardstick, path, processes):
    """Sample from `net` and return the measured part of a result."""
    count, shape = config.eval.num_samples, (config.data.num_channels, config.data.image_size, config.data.image_size)
    first, last = share_of(processes.rank, processes.world_size, count)
    nfes = [torch.zeros(0, dtype=torch.int64)]
    batches = sample_batches(net, config, shape, range(first, last), processes, stem, nfes.append)
    if config.eval.save_samples:
        sampler = results_file.sampler_name(sampling_identity(config)).split()[0]
        stored = path.with_name(f"{stem}_{sampler}.npy")
        with sample_store(stored, count, shape, processes) as keep:
            measured = measure_images(batches, first, count, stem, config, yardstick, processes, [keep])
    else:
        measured = measure_images(batches, first, count, stem, config, yardstick, processes)
    evaluations = sum_over_processes(torch.cat(nfes).sum().to(processes.device)).item()
    return {"nfe": evaluations / count} | measured


def sample_batches(net, config, shape, indices, processes, title, count_evaluations):
    """Yield the samples `indices` as uint8 (N, C, H, W) on the device, config.eval.batch_size at a time.

    Noise and class of sample i belong to (config.seed, i): batch size and number of processes change nothing.
    """
    sample, size = create_sampler(config), config.eval.batch_size
    velocity = velocity_from_network(in_precision(net, config.training.precision, processes.device))
    with progress_bar(total=len(indices), desc=f"sampling {title}", unit="images",
                      enabled=config.training.progress if processes.is_main else "false") as bar:
        for low in range(0, len(indices), size * BATCHES_AT_ONCE):
            part = indices[low : low + size * BATCHES_AT_ONCE]
            z = index_noise(config.seed, part, shape, EVALUATION).to(processes.device)
            x, nfe = sample(velocity, z * config.sampling.init_noise_scale, draw_labels(config, part, processes.device),
                            indices=part, batch_size=size, finished=bar.update)
            count_evaluations(nfe)
            check_finite(x, part, title, "the network has diverged, or needs config.training.precision fp32")
            yield from quantise(x).split(size)


def draw_labels(config, indices, device):
    """Return the one-hot classes of the samples `indices`: drawn, or config.sampling.class_label for all."""
    classes, chosen = config.data.num_classes, config.sampling.class_label
    if classes == 0:
        return None
    if chosen >= classes:
        raise UserError(f"config.sampling.class_label is {chosen}, but the classes are 0 to {classes - 1}")
    labels = index_labels(config.seed, indices, classes)
    return one_hot((labels if chosen < 0 else torch.full_like(labels, chosen)).to(device), classes)


def measure_files(config, args, processes):
    """Measure the images of --data_dir; return (results file, list of one result)."""
    source = open_images(args.data_dir, config.data.num_channels)
    path = results_file.results_path(source.path.parent)
    count = min(config.eval.num_samples, len(source))
    say(processes, f"{count} of the {len(source)} images in {args.data_dir} are measured")
    identity = {"checkpoint": source.path.name, "digest": state_digest(source.path), "sampler": None,
                **measuring_identity(config, args.target_path), "num_samples": count}
    earlier = None if args.force else results_file.find_result(results_file.read_results(path), identity)
    earlier = processes.share(earlier)
    if earlier is not None:
        say(processes, f"{source.path.name}: already measured ({path}); --force measures it again")
        return path, [earlier]
    yardstick = create_yardstick(config, args.target_path, processes)
    check_shape(source, yardstick.extractor)
    first, last = share_of(processes.rank, processes.world_size, count)
    batches = read_batches(source, first, last, config.eval.batch_size, processes, source.path.name)
    result = identity | {"step": None, "nfe": None}
    result |= measure_images(batches, first, count, source.path.name, config, yardstick, processes)
    publish(result, path, processes)
    return path, [result]


def measure_images(batches, first, count, name, config, yardstick, processes, observers=()):
    """Bring uint8 images through all metrics; return {what: value}.

    `first` is the number of this process's first image; `observers` see every batch (`metrics.statistics.measure`).
    """
    started = time.monotonic()
    distances, training_images = [torch.zeros(0)], yardstick.training_images

    def find_nearest(number, images):
        asked = images[: max(0, config.eval.nearest - number)]
        if training_images is not None and len(asked) and images.shape[1:] == training_images.images.shape[1:]:
            distances.append(nearest_distances(asked, training_images.images).cpu())

    samples = measure(batches, yardstick.extractor, first, count, processes.device, name, [find_nearest, *observers])
    distances = gather_rows(torch.cat(distances), processes.device)
    return processes.from_main(lambda: {
        **compare(samples, yardstick.reference, yardstick.extractor, processes.device, config.seed),
        "nn_distance": distances.median().item() if len(distances) else None,
        "nn_distance_real": yardstick.nn_distance_real,
        "reference": yardstick.reference.name,
        "protocol": yardstick.extractor.protocol,
        "seconds": round(time.monotonic() - started, 2),
        "processes": processes.world_size,
        "versions": versions(processes.device),
    })


def publish(result, path, processes):
    """Write a result to its file and say it on the terminal."""
    def write():
        results_file.append_result(path, result)
        draw_figure(path.with_name("fid.png"), results_file.newest_of_each(results_file.read_results(path)))

    processes.from_main(write)
    say(processes, results_file.protocol_line(result))


def report(path, done):
    """Print the table of this command's results, and name the best checkpoint and the file."""
    print(results_file.table(done))
    best = results_file.best_of(done)
    name = results_file.main_metric(best)
    print(f"best: {best['checkpoint']}, {results_file.TITLES[name]} {best[name]:.4g}; results in {path}")


def say(processes, message):
    """Print a remark once, not once a process."""
    if processes.is_main:
        print(message, flush=True)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
