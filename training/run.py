"""The folder of a run: whose it is, how it was made, what it logs, and how a signal ends it."""

import contextlib
import importlib.util
import json
import os
import resource
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from configs.command_line import config_to_dict
from configs.default import get_field
from datasets import one_hot
from datasets.sources import DATASETS, root_of
from flows import samplers
from flows.objective import check_config
from flows.rectified_flow import velocity_from_network
from models.create import create_model
from runtime import run_folder
from runtime.files import file_lock, read_json, read_json_lines, state_digest, write_json, write_text
from runtime.plots import save_grid, save_lines
from runtime.run_folder import CHECKPOINTS, CONFIG, DATA, LOG, SAMPLES, run_path
from runtime.seeds import index_labels, index_noise
from runtime.terminal import UserError, print_message, progress_bar

COLUMNS = 10  # of a sample grid
EULER_STEPS = (2, 10)  # below the one-step row


def check_training(config, world_size=1):
    """Raise UserError for an invalid name of the run, and for fields that contradict each other."""
    if not config.expr.strip() or config.expr.startswith("/") or ".." in config.expr.split("/"):
        raise UserError(f"config.expr is {config.expr!r}: name the run, a folder inside config.work_dir, for instance "
                        "--config.expr 1_rectified_flow")
    channels = DATASETS[config.data.dataset].channels
    if channels not in (None, config.data.num_channels):
        raise UserError(f"config.data.num_channels is {config.data.num_channels}, but {config.data.dataset} has "
                        f"{channels}")
    if config.training.snapshot_sampling and config.data.num_channels not in (1, 3):
        raise UserError(f"config.data.num_channels is {config.data.num_channels}, and sample grids show grey or colour "
                        "images only: set config.training.snapshot_sampling to 0")
    if config.training.batch_size % (world_size * config.training.accumulation_steps):
        raise UserError(f"config.training.batch_size {config.training.batch_size} cannot be split into {world_size} "
                        f"processes × {config.training.accumulation_steps} accumulation steps")
    if config.training.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("config.training.wandb needs the package wandb: run pip install wandb, or leave it out")
    with torch.device("meta"):
        create_model(config)
    check_config(config)


def locked(path):
    """Lock the run in `path` inside a `with` block; UserError if another process trains in it."""
    folder = path.resolve()  # the lock file is beside it: a start that fails later must not create the folder
    return file_lock(folder.with_name(f".{folder.name}.lock"), "training", f"another process is training in {path}: "
                     "wait for it, or choose another --config.expr")


def open_run(config):
    """Create the run folder and the files that say how the run was made; return messages about changed data.

    command.txt gets a line per start; versions.json has the commit, packages and names of untracked files (whose
    content may be secret); uncommitted.patch the changes of tracked ones; data.json a digest of the data.
    """
    path, data = run_path(config), config.data
    for name in (CHECKPOINTS, SAMPLES):
        (path / name).mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG, config_to_dict(config))
    with open(path / "command.txt", "a") as opened:
        opened.write(shlex.join([sys.executable, *sys.argv]) + "\n")
    patch, untracked = run_folder.uncommitted_changes()
    write_json(path / "versions.json",
               {"commit": run_folder.git_commit(), "untracked": untracked, **run_folder.versions()})
    (path / "uncommitted.patch").write_bytes(patch)
    trained_on = data.reflow_data_root or root_of(data)
    found = {root: state_digest(root) for root in (trained_on, data.real_pairs_root) if root and os.path.exists(root)}
    before = read_json(path / DATA) if (path / DATA).exists() else {}
    write_json(path / DATA, found)
    return [f"the files in {root} changed since this run was last started (names, sizes or times): it continues "
            "with the new ones" for root in found if before.get(root, found[root]) != found[root]]


def endless_schedules(config):
    """Return a sentence for each of warm-up and annealing that is longer than the run."""
    lengths = {"optim.warmup": 0 if config.flow.pre_train_model else config.optim.warmup}
    if config.data.reflow_data_root and config.training.x0_randomness.startswith("warmup_"):
        lengths["training.x0_randomness"] = int(config.training.x0_randomness.rpartition("_")[2])
    return [f"config.{name} {get_field(config, name)} is longer than the run of {config.training.n_iters} updates, "
            "which ends before it does" for name, length in lengths.items() if length > config.training.n_iters]


class RunLogger:
    """The log of a run, written by the main process only (`active`); in the others it does nothing.

    log.jsonl has an entry per training.record_iters updates, log.txt the messages, tensorboard/ curves and grids.
    """

    def __init__(self, config, *, start, active):
        self.path, self.active, self.batch_size = run_path(config), active, config.training.batch_size
        self._since, self._step = time.perf_counter(), start
        self.bar = progress_bar(total=config.training.n_iters, initial=start, desc="training", unit="updates",
                                enabled=config.training.progress if active else "false")
        if active:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            kept = [entry for entry in read_json_lines(self.path / LOG) if entry.get("step", start) <= start]
            write_text(self.path / LOG, "".join(json.dumps(entry) + "\n" for entry in kept))  # later ones come again
            if config.training.wandb:
                import wandb  # optional

                try:
                    wandb.init(project=config.training.wandb, name=config.expr, dir=str(self.path),
                               sync_tensorboard=True)
                except wandb.Error as error:  # no key, no network
                    raise UserError(f"config.training.wandb: {error} Or set WANDB_MODE=offline.") from error
            self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=start + 1)

    def write(self, step, stats, *, lr, beta, device):
        """Log the means over the finite updates since the last call; stats: what `UpdateStats.read` returned."""
        if not self.active:
            return
        now = time.perf_counter()
        speed = (step - self._step) * self.batch_size / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        count = stats["finite"]
        memory = (torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)  # peak resident memory
        entry = {
            "step": step, "loss": stats["loss_sum"] / count if count else None, "lr": lr,
            "grad_norm": stats["norm_sum"] / count if count else None, "beta": beta,
            "skipped": int(stats["nonfinite"]), "images_per_second": round(speed, 2), "memory_mb": round(memory, 1),
        }
        with open(self.path / LOG, "a") as opened:
            opened.write(json.dumps(entry) + "\n")
        self.bar.set_postfix(refresh=False, loss=f"{entry['loss']:.4g}" if count else "none")
        for name in ("loss", "grad_norm", "lr", "beta", "images_per_second"):
            if entry[name] is not None:
                self.board.add_scalar(name, entry[name], step)

    def image(self, path, step):
        """Show the image file `path` in TensorBoard."""
        self.board.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def draw(self):
        """Draw loss.png: the loss and the gradient norm of log.jsonl against the update."""
        if self.active:
            entries = [e for e in read_json_lines(self.path / LOG) if e.get("loss") is not None]
            curves = [([e["step"] for e in entries], [e[name] for e in entries], name.replace("_", " "))
                      for name in ("loss", "grad_norm")]
            save_lines(self.path / "loss.png", curves, str(self.path), "update", "loss; gradient norm", "log")

    def say(self, text):
        """Write one line above the progress bar and into log.txt."""
        if self.active:
            print_message(text, stderr=True)
            with open(self.path / "log.txt", "a") as opened:
                opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self):
        """Close the progress bar, draw loss.png and flush TensorBoard."""
        self.bar.close()
        self.draw()
        if self.active:
            self.board.close()


@torch.no_grad()
def sample_grid(network, ema, config, shape, step):
    """Write the grid of one-step and few-step samples of the averaged weights, a row per sampler; return its path.

    Rows, and grids of other steps, share the noise of (config.seed, 0, 1, …). Training is not affected. The network is
    never compiled here: 13 evaluations of ten images take less time than the compiler.
    """
    device, classes = next(network.parameters()).device, config.data.num_classes
    velocity, path = velocity_from_network(ema.averaged(network)), run_path(config) / SAMPLES / f"step_{step}.png"
    z0 = index_noise(config.seed, range(COLUMNS), shape).to(device) * config.sampling.init_noise_scale
    label = one_hot(index_labels(config.seed, range(COLUMNS), classes).to(device), classes) if classes else None
    network.eval()
    rows = [samplers.one_step(velocity, z0, label, t_start=config.flow.eps)[0]]
    rows += [samplers.euler(velocity, z0, label, steps=n, t_start=config.flow.eps)[0] for n in EULER_STEPS]
    network.train()
    save_grid(path, torch.cat(rows), columns=COLUMNS, labels=["one step", *(f"Euler {n}" for n in EULER_STEPS)])
    return path


@contextlib.contextmanager
def stop_requests(world_size):
    """Catch SIGINT and SIGTERM in the `with` block; yield a function that returns the signal to stop on, or 0.

    A second Ctrl-C interrupts a single process at once, but not one of several: torchrun forwards the Ctrl-C that the
    terminal has already sent to each. These agree on a signal at each call, on the host, without reading the device.
    """
    received, group = [], dist.new_group(backend="gloo") if world_size > 1 else None

    def remember(number, frame):
        if group is None and received == [signal.SIGINT] and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    def agreed():
        vote = torch.tensor(received[0] if received else 0)
        if group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=group)
        return int(vote)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield agreed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
