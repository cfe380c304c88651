"""Make the noise-image pairs that reflow trains on: {data_root}/{seed}/z0.npy, z1.npy, label.npy and pairs.json.

z0, labels and the order are functions of (seed, index), on any machine. z1 is bit-identical in any number of processes
(torchrun --nproc_per_node=N), after any interruption and in a longer run, as long as threads, instruction set, blocks
and training.compile are the same; otherwise, and on a GPU, it is the same up to rounding (with sampling.step_control
batch, up to the tolerance in a last block that a longer run completes). The same command continues after an
interruption, and a larger sampling.total_number_of_samples extends a folder. Values of sampling.direction:
  from_z0       noise integrated to images by the network of --ckpt_path
  from_z1       images (of the data set, or --z1_path) integrated back to noise
  random_paired images paired with fresh noise; no network
  gt_v_from_z0  as from_z0, by the closed-form velocity of the data set's images; no network
  gt_v_from_z1  as from_z1, by that velocity, starting on the path at (1-eps)·z1 + eps·ξ
training.batch_size is the number of pairs solved at a time.
"""

from runtime.terminal import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import contextlib
import datetime
import pathlib

import numpy as np
import torch

from configs.command_line import config_to_dict, run_script
from configs.default import SAMPLING_READS, Field, get_field
from datasets import pair_writer
from datasets.pairs import NoiseSource, PairFolder, image_shape
from flows.rectified_flow import analytic_velocity, interpolate, velocity_from_network
from flows.samplers import COUPLINGS, SAMPLERS, create_coupling
from models.checkpoint import load_with_config
from runtime.devices import autocast, compiled, explained, gather, set_precision, start_processes
from runtime.plots import save_grid
from runtime.terminal import progress_bar

FLAGS = {
    "ckpt_path": Field("", "checkpoint (.pth, EDM's .pkl, hf://…, https://…) of from_z0 and from_z1 (EMA weights)"),
    "data_root": Field("", "folder of the pairs; they go to its sub-folder {seed}"),
    "z0_path": Field("", "npy of noise (N, C, H, W) to start from instead of drawn noise"),
    "z1_path": Field("", "npy of images (N, C, H, W) in [-1, 1] to start from instead of the data set"),
    "label_path": Field("", "npy of the classes of --z1_path: numbers (N,) or one-hot (N, num_classes)"),
}
READS = (*SAMPLING_READS, "training.batch_size", "sampling.direction", "sampling.total_number_of_samples",
         "sampling.block_size", "sampling.pair_storage", "sampling.random_flip")

BLOCK_BATCHES = 4  # batches per block: few are lost at a stop, and rk45 can refill its slots for most of the block
DRAWN = 10  # pairs in pairs.png


def main(config, args, given):
    """Make the pairs, in as many processes as torchrun started."""
    check_arguments(config, args)
    set_precision(config.training.precision)
    with start_processes(patience=datetime.timedelta(days=7)) as processes:  # one may be hours behind the others
        config, net, teacher = load_teacher(config, args, given, processes)
        row = COUPLINGS[config.sampling.direction]
        points = pair_writer.InitialPoints(config, row, args.z0_path, args.z1_path, args.label_path)
        velocity = net and velocity_from_network(compiled(net, config.training, processes.say))
        if row.velocity == "closed form":
            velocity = analytic_velocity(torch.from_numpy(np.array(points.image_set.images)).to(processes.device))
        coupling = create_coupling(config, velocity, points, processes.device)
        folder, job = pathlib.Path(args.data_root) / str(config.seed), create_job(config, given, points, teacher)
        with contextlib.ExitStack() as held:
            processes.from_main(lambda: held.enter_context(pair_writer.locked(folder)))
            offered, todo = processes.from_main(lambda: pair_writer.prepare(folder, job))
            if offered < job.count:
                make_blocks(config, folder, job, todo, coupling, processes)
                processes.from_main(lambda: complete(folder, job, config, teacher))
        done = "is complete: it holds" if offered >= job.count else "holds"
        processes.say(f"{folder} {done} {max(offered, job.count)} pairs")


def check_arguments(config, args):
    """Raise UserError for a missing flag, or one that the direction cannot use."""
    direction, row = config.sampling.direction, COUPLINGS[config.sampling.direction]
    if not args.data_root:
        raise UserError("--data_root is empty: name the folder of the pairs, such as --data_root reflow_data/pairs")
    if row.velocity == "network" and not args.ckpt_path:
        raise UserError(f"sampling.direction {direction} needs a network: give --ckpt_path")
    if args.z0_path and row.given == "image":
        raise UserError(f"sampling.direction {direction} does not start at noise: leave out --z0_path")
    if args.z1_path and (row.given == "noise" or row.velocity == "closed form"):
        raise UserError(f"sampling.direction {direction} does not start at images of a file: leave out --z1_path")
    if args.label_path and not args.z1_path:
        raise UserError("--label_path holds the classes of --z1_path: give both")
    if (args.z0_path or direction == "gt_v_from_z1") and config.sampling.init_noise_scale != 1:
        raise UserError("sampling.init_noise_scale does not apply to --z0_path and to gt_v_from_z1: leave it out")


def load_teacher(config, args, given, processes):
    """Return (config, net, origin) of --ckpt_path: its config, its network or None, and its entries of pairs.json."""
    if COUPLINGS[config.sampling.direction].velocity != "network":
        if args.ckpt_path:
            processes.say(f"sampling.direction {config.sampling.direction} uses no network: --ckpt_path is ignored")
        return config, None, {}
    config, net, digest = load_with_config(args.ckpt_path, config, given, device=processes.device, say=processes.say)
    if len(set(gather(digest))) > 1:
        raise UserError(f"{args.ckpt_path} was replaced while the processes read it: run the same command again")
    if net.licence_note:
        processes.say(net.licence_note)
    return config, net, {"checkpoint": args.ckpt_path, "checkpoint_digest": digest}


def create_job(config, given, points, teacher):
    """Return the `PairJob`: number of pairs, blocks, arrays, and everything that the values depend on."""
    settings, shape, classes = config.sampling, image_shape(config), config.data.num_classes
    count = settings.total_number_of_samples
    if points.available is not None and count > points.available:
        if "sampling.total_number_of_samples" in given:
            raise UserError(f"config.sampling.total_number_of_samples is {count}, but there are only "
                            f"{points.available} initial points: lower it")
        count = points.available
    layouts = {"z0.npy": ("<f4", shape), "z1.npy": ("<f4", shape), "label.npy": ("<f4", (classes,))}
    if settings.pair_storage == "compact":
        layouts = {"z1.npy": ("<f2", shape), "label.npy": ("<i4", ())}
        if not isinstance(points.noise, NoiseSource) or COUPLINGS[settings.direction].given == "image":
            raise UserError("config.sampling.pair_storage compact does not store z0 but draws it again from (seed, "
                            f"index), which {settings.direction} with these initial points does not: use full")
    layouts = {name: np.dtype(layout) for name, layout in layouts.items() if name != "label.npy" or classes}
    names = ["seed", "data.image_size", "data.num_channels", "data.num_classes", "sampling.direction",
             "sampling.pair_storage", "sampling.class_label", "sampling.init_noise_scale"]
    if COUPLINGS[settings.direction].velocity:
        names += ["sampling.use_ode_sampler", "flow.eps", "training.batch_size"]
        names += [f"sampling.{name}" for name in SAMPLERS[settings.use_ode_sampler].fields]
    if teacher:
        names.append("training.precision")
    block_size = settings.block_size or BLOCK_BATCHES * config.training.batch_size
    identity = {name: get_field(config, name) for name in names} | points.identity
    identity |= {"sampling.block_size": block_size, "checkpoint": teacher.get("checkpoint_digest")}
    return pair_writer.PairJob(count, block_size, layouts, identity, teacher.get("checkpoint", ""))


def make_blocks(config, folder, job, todo, coupling, processes):
    """Solve and write every world_size-th block of `todo`, from this process's rank on."""
    done = job.count - sum(len(job.block_range(block)) for block in todo)
    flips = ", images flipped at random" if config.sampling.random_flip else ", images not flipped"
    flips = flips if COUPLINGS[config.sampling.direction].given != "noise" else ""
    processes.say(f"{folder}: {job.count} pairs {config.sampling.direction}{flips}, blocks of {job.block_size}; {done} "
                  f"are done, {len(todo)} blocks to make")
    with (progress_bar(total=job.count, desc="pairs", unit="pairs", initial=done,
                       enabled=config.training.progress if processes.is_main else "false") as bar,
          explained("lower config.training.batch_size"),
          autocast(config.training.precision, processes.device)):  # the network alone; samplers sum in float64

        def finished(pairs):  # assumes that the other processes are as far
            bar.update(min(pairs * processes.world_size, job.count - bar.n))

        for block in todo[processes.rank::processes.world_size]:
            indices = job.block_range(block)
            try:
                z0, z1, label, nfe = coupling(indices, finished)
                rows = {"z0.npy": z0, "z1.npy": z1, "label.npy": label}
                pair_writer.write_block(folder, job, block, rows, nfe)
            except UserError as error:
                raise UserError(f"pairs {indices.start} to {indices.stop - 1}: {error}") from None
            bar.set_postfix(refresh=False, NFE=nfe.double().mean().item())
        gather(None)  # wait for the others
        finished(job.count)


def complete(folder, job, config, teacher):
    """Write the arrays' headers, `pairs.json`, and `pairs.png`: the first pairs as noise, midpoint and image."""
    software = {"torch": torch.__version__, "numpy": np.__version__}
    pair_writer.finish(folder, job, {**teacher, "software": software, "config": config_to_dict(config)})
    pairs, indices = PairFolder(folder), np.arange(min(DRAWN, job.count))
    if pairs.shape[0] in (1, 3):
        z0, z1 = pairs.take(indices)
        save_grid(folder / "pairs.png", torch.cat([z0, interpolate(z0, z1, 0.5), z1]), len(indices),
                  labels=["z0", "midpoint", "z1"])


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS, READS)
