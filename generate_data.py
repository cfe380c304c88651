"""Make the noise-image pairs that reflow trains on: {data_root}/{seed}/z0.npy, z1.npy, label.npy and pairs.json.

Pair i under a seed is the same on any machine, in any number of processes (torchrun --nproc_per_node=N) and after
any interruption: the same command goes on where it stopped, and a larger sampling.total_number_of_samples extends
what is there. sampling.direction says what the pairs are:
  from_z0       noise integrated to images by the network of --ckpt_path
  from_z1       images (of the data set, or --z1_path) integrated back to noise, unflipped unless
                sampling.random_flip is set
  random_paired images paired with fresh noise; no network
  gt_v_from_z0, gt_v_from_z1   as the first two, by the closed-form velocity of the data set's images; no network;
                gt_v_from_z1 starts on the path, at (1-eps)·z1 + eps·ξ
sampling.train_subset (all, a class name, random_N) chooses the images; training.batch_size is the number of pairs
solved at a time.
"""

import contextlib
import datetime
import pathlib

import numpy as np
import torch

from configs.command_line import config_to_dict, run_script
from configs.default import Field, get_field
from datasets import pair_starts, pair_writer
from datasets.pair_folder import PairFolder
from flows.analytic import analytic_velocity
from flows.couplings import create_coupling
from flows.rectified_flow import interpolate, velocity_from_network
from flows.samplers import SAMPLERS, sampler_values
from models.checkpoint import load_with_config, local_file
from runtime import devices
from runtime.devices import autocast, set_precision
from runtime.errors import UserError
from runtime.files import file_digest
from runtime.pictures import save_grid
from runtime.progress import progress_bar

FLAGS = {
    "ckpt_path": Field("", "checkpoint (.pth, EDM's .pkl, hf://…, https://…) of from_z0 and from_z1; its EMA "
                       "weights are used"),
    "data_root": Field("", "folder of the pairs; they go to its sub-folder {seed}"),
    "z0_path": Field("", "npy of noise (N, C, H, W) to start from instead of drawn noise"),
    "z1_path": Field("", "npy of images (N, C, H, W) in [-1, 1] to start from instead of the data set"),
    "label_path": Field("", "npy of the classes of --z1_path, numbers (N,) or one-hot (N, num_classes)"),
}

WITH_NETWORK = ("from_z0", "from_z1")
BLOCK_BATCHES = 4  # batches in a block: a stop loses little, and rk45's slots are refilled for most of it
PICTURED = 10


def main(config, args, given):
    """Make the pairs, in as many processes as torchrun started."""
    processes = devices.start_processes(patience=datetime.timedelta(days=7))  # a slow one may be hours behind
    try:
        make_pairs(config, args, given, processes)
    finally:
        devices.stop_processes()


def make_pairs(config, args, given, processes):
    """Make this process's share of the blocks; the main process prepares and completes the folder."""
    check_arguments(config, args)
    set_precision(config.training.precision)
    config, velocity = create_velocity(config, args, given, processes)
    starts = pair_starts.create_starts(config, args.z0_path, args.z1_path, args.label_path)
    folder = pathlib.Path(args.data_root) / str(config.seed)
    task = create_task(config, args, given, starts)
    coupling = create_coupling(config, velocity, starts, processes.device)

    with contextlib.ExitStack() as held:
        offered, todo = processes.from_main(lambda: lock_and_prepare(held, folder, task))
        if offered >= task.count:
            say(processes, f"{folder} is complete: it holds {offered} pairs")
            return
        say(processes, describe(config, folder, task, todo))
        with autocast(config.training.precision, processes.device):  # the network; samplers add in float64
            make_blocks(folder, task, todo, coupling, processes, config.training.progress)
        processes.barrier()
        processes.from_main(lambda: complete(folder, task, config, args))
        say(processes, f"{folder} holds {task.count} pairs")


def check_arguments(config, args):
    """Raise UserError for flags that the direction lacks or cannot use."""
    direction = config.sampling.direction
    if not args.data_root:
        raise UserError("--data_root is empty: name the folder of the pairs, such as --data_root reflow_data/pairs")
    if direction in WITH_NETWORK and not args.ckpt_path:
        raise UserError(f"sampling.direction {direction} needs a network: give --ckpt_path")
    if direction not in WITH_NETWORK and args.ckpt_path:
        raise UserError(f"sampling.direction {direction} uses no network: leave out --ckpt_path")
    if args.z0_path and direction in ("from_z1", "gt_v_from_z1"):
        raise UserError(f"sampling.direction {direction} does not start at noise: leave out --z0_path")
    if args.z1_path and direction in ("from_z0", "gt_v_from_z0"):
        raise UserError(f"sampling.direction {direction} does not start at images: leave out --z1_path")
    if args.label_path and not args.z1_path:
        raise UserError("--label_path holds the classes of --z1_path: give both")


def create_velocity(config, args, given, processes):
    """Return (config, velocity): the network's, with what its run was in the config; the closed form; or None."""
    direction, device = config.sampling.direction, processes.device
    if direction in WITH_NETWORK:
        config, net = load_with_config(args.ckpt_path, config, given, device=device, say=lambda s: say(processes, s))
        return config, velocity_from_network(net)
    if direction == "random_paired":
        return config, None
    images = pair_starts.chosen_images(config).images
    images = torch.from_numpy(images if images.flags.writeable else np.array(images))  # torch wants no read-only map
    return config, analytic_velocity(images.to(device))


def create_task(config, args, given, starts):
    """Return the `Task`: how many pairs, in which blocks and arrays, and all that their values depend on."""
    count, available = config.sampling.total_number_of_samples, starts.available
    if available is not None and count > available:
        if "sampling.total_number_of_samples" in given:
            raise UserError(f"config.sampling.total_number_of_samples is {count}, but there are only {available} "
                            "starting points: ask for no more")
        count = available
    block_size = config.sampling.block_size or BLOCK_BATCHES * config.training.batch_size
    layouts = create_layouts(config, starts)
    return pair_writer.Task(count, block_size, available, layouts, create_identity(config, args, starts, block_size))


def create_layouts(config, starts):
    """Return the `ArrayLayout`s of the files that the config's storage has."""
    shape, classes = pair_starts.image_shape(config), config.data.num_classes
    if config.sampling.pair_storage == "full":
        layouts = {"z0.npy": (shape, "<f4"), "z1.npy": (shape, "<f4"), "label.npy": ((classes,), "<f4")}
    elif isinstance(starts.noise, pair_starts.NoiseStarts) and config.sampling.direction != "gt_v_from_z1":
        layouts = {"z1.npy": (shape, "<f2"), "label.npy": ((), "<i4")}
    else:
        raise UserError("config.sampling.pair_storage compact stores no z0 but draws it again from (seed, index); in "
                        f"direction {config.sampling.direction} with these starting points it is not drawn: use full")
    if starts.labels is None:
        del layouts["label.npy"]
    return {name: pair_writer.ArrayLayout(*layout) for name, layout in layouts.items()}


def create_identity(config, args, starts, block_size):
    """Return {name: value} of all that a pair's values depend on, to the last bit."""
    names = ["seed", "data.image_size", "data.num_channels", "data.num_classes", "sampling.direction",
             "sampling.pair_storage", "sampling.class_label", "sampling.init_noise_scale"]
    if config.sampling.direction != "random_paired":
        names += ["sampling.use_ode_sampler", "flow.eps", "training.batch_size"]
        names += [f"sampling.{name}" for name in SAMPLERS[config.sampling.use_ode_sampler].fields]
    identity = {name: get_field(config, name) for name in names} | {"sampling.block_size": block_size}
    if args.ckpt_path:
        identity["checkpoint"] = file_digest(local_file(args.ckpt_path))
        identity["training.precision"] = config.training.precision
    if config.sampling.direction.startswith("gt_v"):
        images = pair_starts.chosen_images(config)
        identity["closed form of"] = pair_starts.images_digest(images.images, images.labels)
    return identity | starts.identity()


def lock_and_prepare(held, folder, task):
    """Lock `folder` for as long as `held` lives and make it ready; return (pairs it offers, blocks to make)."""
    held.enter_context(pair_writer.locked(folder))
    return pair_writer.prepare(folder, task)


def say(processes, text):
    """Print one line, once."""
    if processes.is_main:
        print(text, flush=True)


def describe(config, folder, task, todo):
    """Return a line about what is going to be made."""
    done = task.count - sum(task.kept(block) for block in todo)
    flips = "" if config.sampling.direction in ("from_z0", "gt_v_from_z0") else (
        ", images flipped at random" if config.sampling.random_flip else ", images as they are, unflipped")
    return (f"{folder}: {task.count} pairs {config.sampling.direction}{flips}, blocks of {task.block_size}; {done} are "
            f"there, {len(todo)} blocks to make")


def make_blocks(folder, task, todo, coupling, processes, progress):
    """Solve and write this process's blocks of `todo`: every world_size-th."""
    done = task.count - sum(task.kept(block) for block in todo)
    enabled = progress if processes.is_main else "false"
    with (pair_writer.BlockWriter(folder, task, processes.rank) as writer,
          progress_bar(total=task.count, desc="pairs", unit="pairs", initial=done, enabled=enabled) as bar):
        meter = Meter(bar, task.count, done)
        for block in todo[processes.rank::processes.world_size]:
            indices = task.block_range(block)
            try:
                z0, z1, label, nfe = coupling(indices, meter.finished)
                pair_writer.require_finite(indices, z0, z1)
            except UserError as error:
                raise UserError(f"pairs {indices.start} to {indices.stop - 1}: {error}") from None
            writer.write(block, {"z0.npy": z0, "z1.npy": z1, "label.npy": label}, nfe)
            meter.written(pair_writer.pairs_of_this_session(folder, task), nfe)


class Meter:
    """Moves the progress bar: by this process's pairs as they are solved, by the others' as they are written."""

    def __init__(self, bar, count, done):
        self.bar, self.count, self.at_start, self.others_and_written = bar, count, done, 0
        self.solving, self.nfe_sum, self.pairs = 0, 0, 0

    def finished(self, pairs):
        """Take note of more solved pairs of the block in work."""
        self.solving += pairs
        self._move()

    def written(self, pairs_of_this_session, nfe):
        """Take note of a written block, and of what all processes have written."""
        self.others_and_written, self.solving = pairs_of_this_session, 0
        self.nfe_sum, self.pairs = self.nfe_sum + int(nfe.sum()), self.pairs + len(nfe)
        self.bar.set_postfix(NFE=self.nfe_sum / self.pairs)
        self._move()

    def _move(self):
        place = min(self.count, self.at_start + self.others_and_written + self.solving)
        self.bar.update(max(0, place - self.bar.n))


def complete(folder, task, config, args):
    """Complete the folder: headers, `pairs.json`, picture."""
    settings = config.sampling
    solved = settings.direction != "random_paired"
    record = {"seed": config.seed, "shape": list(pair_starts.image_shape(config)), "direction": settings.direction,
              "sampler": settings.use_ode_sampler if solved else None,
              "sampler_settings": sampler_values(config) if solved else None,
              "checkpoint": args.ckpt_path or None, "checkpoint_digest": task.identity.get("checkpoint"),
              "storage": settings.pair_storage, "noise_digest": task.identity.get("noise"),
              "software": {"torch": torch.__version__, "numpy": np.__version__},
              "config": config_to_dict(config)}
    pair_writer.finish(folder, task, record)
    save_picture(PairFolder(folder))


def save_picture(folder):
    """Write `pairs.png`: the first pairs of a `PairFolder`, each a column of noise, midpoint and image."""
    if folder.shape[0] not in (1, 3):
        return
    indices = np.arange(min(PICTURED, len(folder)))
    z0, z1 = folder.take_z0(indices), folder.take_z1(indices)
    rows = torch.cat([z0, interpolate(z0, z1, 0.5), z1])
    save_grid(folder.path / "pairs.png", rows, columns=len(indices), labels=["z0", "midpoint", "z1"])


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
