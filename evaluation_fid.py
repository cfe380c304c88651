"""Measure samples: the Fréchet distance (FID) and its companions, for a sweep of checkpoints, one .pth, or files.

Results go to {ckpt_dir}/eval/results.jsonl, one line per checkpoint and sampler; those already there are not
computed again. torchrun splits the samples over its processes.
"""

from runtime.terminal import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import datetime
import functools
import hashlib
import json
import pathlib
import time

import numpy as np
import torch

from configs.command_line import run_script
from configs.default import SAMPLING_READS, Field
from datasets.batches import check_finite, one_hot
from datasets.pairs import image_shape
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler, sampler_values
from metrics import results
from metrics.scores import compare, nearest_distances
from metrics.statistics import Reference, evenly_spread, measure, measure_source, open_images, quantise, share_of
from models.checkpoint import config_of_run, is_remote, network_of, read_checkpoint
from models.create import model_fields
from models.describe import cost_line, cost_of
from runtime.devices import compiled, explained, gather, in_precision, set_precision, start_processes
from runtime.files import atomic_path, state_digest
from runtime.run_folder import RESULTS, checkpoint_folder, run_folder, sweep
from runtime.seeds import EVALUATION, index_labels, index_noise
from runtime.terminal import print_message, progress_bar

FLAGS = {
    "ckpt_dir": Field("", "run folder (or one checkpoint, .pth or .pkl) whose checkpoints are sampled and measured"),
    "data_dir": Field("", "images to measure instead: npy (NCHW in [-1, 1]), npz, folder or zip"),
    "target_path": Field("", "what to compare with: npz of mu and sigma, or images as npy, npz, folder or zip (empty: "
                         "CIFAR-10's published statistics; the training images for pixels)"),
    "use_ema": Field(True, "sample with the EMA weights (false: the raw ones)"),
    "force": Field(False, "repeat evaluations that results.jsonl has"),
}
READS = (*SAMPLING_READS, "work_dir", "eval.")

BATCHES_AT_ONCE = 4  # per call of the sampler, so that rk45's slots are seldom empty
PATIENCE = datetime.timedelta(days=7)  # of processes for one that waits for a checkpoint or compares features


def main(config, args, given):
    """Measure what the flags name and print a table and the line to quote."""
    if bool(args.ckpt_dir) == bool(args.data_dir):
        raise UserError("name either --ckpt_dir (checkpoints to sample) or --data_dir (images to measure)")
    set_precision(config.training.precision)
    advice = "lower config.eval.batch_size, or free memory of the GPU"
    with start_processes(PATIENCE) as processes, explained(advice):
        path, done = (measure_files if args.data_dir else measure_checkpoints)(config, args, given, processes)
        name = results.main_metric(done[0])
        best = min(done, key=lambda result: result[name])
        if processes.is_main:
            print(results.table(done), flush=True)  # not wrapped: its columns would be lost
        processes.say(f"best: {best['checkpoint']}, {results.TITLES[name]} {best[name]:.4g}; results in {path}")


def measure_checkpoints(config, args, given, processes):
    """Measure the checkpoints of --ckpt_dir that have no result yet; return (results file, results of the sweep)."""
    path, say_once = run_folder(args.ckpt_dir, config.work_dir) / RESULTS, functools.cache(processes.say)
    reference, cost, done = None, {}, []
    for checkpoint in read_checkpoints(args.ckpt_dir, config.eval, processes):
        own, remarks = config_of_run(config, checkpoint, given)
        for remark in remarks:
            say_once(f"{args.ckpt_dir}: {remark}")
        if reference is None or reference.config.data != own.data:
            reference = Reference(own, args.target_path, processes)
        identity = {"checkpoint": pathlib.Path(checkpoint["path"]).name, "digest": checkpoint["digest"],
                    "weights": "EMA" if args.use_ema else "raw", **sampling_identity(own, processes.world_size),
                    **reference.identity}
        needed = samples_path(path, identity) if own.eval.save_samples else path
        result = earlier_result(path, identity, args.force, processes, needed)
        if result is None:
            net = network_of(model_fields(own), checkpoint, args.use_ema, processes.device)
            if not cost:
                cost = cost_of(net)
                processes.say(cost_line(cost))
            found, images = measure_network(net, pathlib.Path(identity["checkpoint"]).stem, own, reference)
            result = identity | {"step": int(checkpoint.get("step", 0))} | cost | found
            publish(result, path, processes, images)
        done.append(result)
    return path, done


def read_checkpoints(ckpt_dir, settings, processes):
    """Yield the checkpoints that --ckpt_dir and config.eval (`settings`) ask for: process 0 decides, as in `sweep`."""
    read = functools.lru_cache(maxsize=1)(read_checkpoint)  # process 0 has read it already to see that it is complete
    paths = iter([ckpt_dir])
    if not is_remote(ckpt_dir) and not pathlib.Path(ckpt_dir).is_file():
        limit = settings.wait_limit * 3600 if settings.wait else 0.0
        found = sweep(checkpoint_folder(ckpt_dir), settings.begin_ckpt, settings.end_ckpt, limit,
                      lambda path: read(str(path)))
        paths = (checkpoint["path"] for checkpoint in found)
    while (path := processes.from_main(lambda: next(paths, None))) is not None:
        checkpoint = read(path)
        if len(set(gather(checkpoint["digest"]))) > 1:
            raise UserError(f"{path} was replaced while the processes read it: run the same command again")
        yield checkpoint


def measure_files(config, args, given, processes):
    """Measure the images of --data_dir; return (results file, list of one result)."""
    source = open_images(args.data_dir, config)
    path, count = source.path.parent / RESULTS, min(config.eval.num_samples, len(source))
    processes.say(f"measuring {count} of the {len(source)} images in {args.data_dir}, evenly spread")
    reference = Reference(config, args.target_path, processes)
    if reference.source is not None and source.shape[1:] != reference.source.shape[1:]:
        ours, theirs = ("×".join(map(str, images.shape[1:])) for images in (source, reference.source))
        processes.say(f"{source.name}: its images are {ours}, those they are compared with {theirs}: "
                      "Inception resizes both, which the distance includes")
    identity = {"checkpoint": source.path.name, "digest": state_digest(source.path), "sampler": None,
                "num_samples": count, "seeds": {"subsets": config.seed}, **reference.identity}
    result = earlier_result(path, identity, args.force, processes, path)
    if result is None:
        target, started = reference.statistics, time.monotonic()
        samples = measure_source(source, reference.extractor, config.eval.batch_size, processes, count,
                                 keep=evenly_spread(min(config.eval.nearest, count), count))  # of all class folders
        found = metrics_of(samples, samples.images, target, reference, started)
        result = identity | {"step": None, "nfe": None} | found
        publish(result, path, processes)
    return path, [result]


def sampling_identity(config, world_size=1):
    """Return what a result of sampling depends on: sampler, steps, tolerance, noise, classes and shared step sizes."""
    sampling = config.sampling
    shared = sampler_values(config)["step_control"] == "batch"  # one step size for a batch
    return {
        "sampler": sampling.use_ode_sampler, **sampler_values(config), "eps": config.flow.eps,
        "arithmetic": config.training.precision, "init_noise_scale": sampling.init_noise_scale,
        "class_label": sampling.class_label, "num_classes": config.data.num_classes,
        "batch_size": config.eval.batch_size if shared else None,
        "batch_processes": world_size if shared and world_size > 1 else None,
        "num_samples": config.eval.num_samples, "seeds": {"samples": config.seed, "subsets": config.seed},
    }


def measure_network(net, title, config, reference):
    """Sample from `net`; return metrics, and with config.eval.save_samples the samples of this process, else None."""
    count, processes, nfes = config.eval.num_samples, reference.processes, []
    target, started = reference.statistics, time.monotonic()
    batches = sample_batches(net, config, processes, title, nfes.append)
    samples = measure(batches, reference.extractor, count, processes, title,
                      keep=range(count if config.eval.save_samples else min(config.eval.nearest, count)))
    asked = samples.images[: max(0, config.eval.nearest - share_of(processes, count).start)]
    nfe = sum(gather(sum(nfe.sum().item() for nfe in nfes))) / count
    found = {"nfe": nfe} | metrics_of(samples, asked, target, reference, started)
    return found, samples.images if config.eval.save_samples else None


def sample_batches(net, config, processes, title, count_evaluations):
    """Yield this process's samples as uint8 (N, C, H, W) on the device, config.eval.batch_size at a time.

    Noise and class of sample i depend on (config.seed, i) alone, not on batch size and number of processes, so the
    batch size is halved where the memory of the GPU is too small for it.
    """
    sample, size, device, low, velocity = create_sampler(config), config.eval.batch_size, processes.device, 0, None
    indices = share_of(processes, config.eval.num_samples)
    with progress_bar(total=len(indices), desc=f"sampling {title}", unit="images",
                      enabled=config.training.progress if processes.is_main else "false") as bar:
        while low < len(indices):
            velocity = velocity or velocity_from_network(in_precision(
                compiled(net, config.training, processes.say), config.training.precision, device))
            part = indices[low : low + size * BATCHES_AT_ONCE]
            z = index_noise(config.seed, part, image_shape(config), EVALUATION)
            z = z.to(device) * config.sampling.init_noise_scale
            numbers = index_labels(config.seed, part, config.data.num_classes, config.sampling.class_label)
            label = None if numbers is None else one_hot(numbers.to(device), config.data.num_classes)
            try:
                with torch.autocast(device.type, enabled=False):  # the outer context keeps in_precision's cast weights
                    x, nfe = sample(velocity, z, label, indices=part, batch_size=size, finished=bar.update)
            except torch.OutOfMemoryError:
                if size == 1 or sampling_identity(config)["batch_size"]:
                    raise
                size, bar.n, velocity = size // 2, low, None  # a compiled network keeps its batch size
                print_message(f"config.eval.batch_size {2 * size} does not fit the GPU: trying {size}", stderr=True)
                continue
            count_evaluations(nfe)
            check_finite(x, part, f"{title}: sample", "the network diverged, or needs config.training.precision fp32")
            yield from quantise(x).split(size)
            low += len(part)


def metrics_of(samples, asked, target, reference, started):
    """Return {name: value} of the metrics of two `Statistics`; asked: images whose nearest ones are searched."""
    config, processes, training_images = reference.config, reference.processes, reference.training_images
    distances = [torch.zeros(0)]
    if training_images is not None and len(asked) and asked.shape[1:] == training_images.images.shape[1:]:
        distances += [nearest_distances(part.to(processes.device), training_images.images).cpu()
                      for part in asked.split(config.eval.batch_size)]
    distances = torch.cat(gather(torch.cat(distances)))
    return processes.from_main(lambda: {
        **compare(samples, target, reference.extractor, config.seed, reference.radii, config.training.progress),
        "nn_distance": distances.median().item() if len(distances) else None,
        "nn_distance_real": reference.nn_distance_real, "reference": target.name,
        "protocol": reference.extractor.protocol, "seconds": round(time.monotonic() - started, 2),
        "processes": processes.world_size, "versions": results.versions(processes.device),
    })


def samples_path(path, identity):
    """Return the file of the samples of a result in the file `path`; other options or weights give another name."""
    stem, sampler = pathlib.Path(identity["checkpoint"]).stem, results.sampler_name(identity).split()[0]
    digest = hashlib.sha256(results.key_of(identity).encode()).hexdigest()[:8]
    return path.with_name(f"{stem}_{sampler}_{digest}.npy")


def earlier_result(path, identity, force, processes, needed):
    """Return to all processes the result in the file `path` with this identity; None without `needed` or by --force."""
    found = None if force else processes.from_main(lambda: results.newest_of_each(
        results.read_results(path) if needed.exists() else []).get(results.key_of(identity)))
    if found is not None:
        processes.say(f"{identity['checkpoint']}: already measured ({path}); --force measures it again")
    return found


def publish(result, path, processes, images=None):
    """Print a result, append it to its file (or print it whole if that fails), and save all processes' `images`."""
    processes.say(results.protocol_line(result))
    if images is not None:
        images = torch.cat(gather(images)).numpy()
        result["samples"] = samples_path(path, result).name

    def write():
        try:
            results.append_result(path, result)
            results.draw_figure(path.with_name("fid.png"), results.read_results(path))
        except OSError:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            raise
        if images is not None:
            with atomic_path(path.with_name(result["samples"])) as temporary:
                np.save(temporary, images)

    processes.from_main(write)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS, READS)
