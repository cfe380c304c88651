"""The folder of a run: whose it is, how it was made, what it logs, and how a signal ends it."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from configs.command_line import load_config, save_config
from configs.default import field_names, get_field
from datasets import one_hot
from flows import samplers
from runtime.errors import UserError
from runtime.files import atomic_path, file_lock, read_json, read_json_lines, state_digest, write_json, write_text
from runtime.pictures import save_grid
from runtime.progress import progress_bar
from runtime.seeds import index_labels, index_noise
from runtime.versions import git_commit, uncommitted_changes, versions

# What may change when a run is continued: how long, how often it reports, and how it uses the machine.
FREE_FIELDS = {
    "work_dir", "training.n_iters", "training.snapshot_sampling", "training.snapshot_freq_for_preemption",
    "training.record_iters", "training.progress", "training.keep_checkpoints", "training.max_skipped",
    "training.resume_from", "training.accumulation_steps", "training.compile", "training.compile_mode",
    "training.deterministic", "data.on_device", "data.cache_dir", "data.skip_corrupt", "data.data_root",
    "data.custom_data_root",
}
FREE_GROUPS = ("sampling.", "eval.")
SAID_FIELDS = ("training.precision", "optim.lr")  # may change, too, and the log says so
# Pairs and models that a run was started from may be moved or named otherwise; a change of these two is refused
# all the same, since they say what is learnt.
PATH_FIELDS = ("expr", "data.reflow_data_root", "data.real_pairs_root", "flow.pre_train_model", "flow.teacher_model")
COLUMNS = 10  # of a sample grid
EULER_STEPS = (2, 10)  # below the one-step row
CURVES = ("loss", "grad_norm")


def run_path(config):
    """Return the folder of the run, {work_dir}/{expr}."""
    return pathlib.Path(config.work_dir) / config.expr


@contextlib.contextmanager
def lock_run(path):
    """Keep every other process out of the run folder `path`; one that nothing was written to is removed at the end.

    Raises UserError where another process trains this run, and for a place that cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(path / ".lock", "training", refusal=(
                f"another process is training in {path}: wait for it, or choose another --config.expr")))
        except OSError as error:
            raise UserError(f"the run folder {str(path)[:200]} cannot be written ({error.strerror}): choose another "
                            "--config.work_dir or --config.expr") from None
        try:
            yield
        finally:
            if os.listdir(path) == [".lock"]:
                (path / ".lock").unlink()
                path.rmdir()


def describe_changes(before, config):
    """Return a phrase for each field that decides what is learnt and differs between two configs."""

    def plain(config, name):
        value = get_field(config, name)
        return os.path.normpath(value) if value and name in PATH_FIELDS else value

    return [f"{name} ({get_field(before, name)!r} there, {get_field(config, name)!r} here)" for name in field_names()
            if name not in FREE_FIELDS and name != "expr" and not name.startswith(FREE_GROUPS)
            and plain(before, name) != plain(config, name)]


def check_same_run(config, path):
    """Return what changed since the last start in `path` and may change, a phrase each.

    Raises UserError, naming the fields, if `path` holds a run whose config differs in anything else that matters.
    """
    saved = path / "config.json"
    if not saved.exists():
        return []
    changed = describe_changes(load_config(saved), config)
    said = [phrase for phrase in changed if phrase.startswith(SAID_FIELDS)]
    if said != changed:
        refused = ", ".join(phrase for phrase in changed if phrase not in said)
        raise UserError(f"{path} holds a run with another config: {refused}; choose another --config.expr (with "
                        f"--config.training.resume_from {path} it goes on from this run's last state), or remove that "
                        "folder")
    return said


def open_run(config):
    """Create the run folder with all that says how the run was made; return what to tell about its data.

    config.json is what the run is; command.txt gains a line at each start; versions.json and git.json describe the
    code, uncommitted.patch holds the tracked changes (untracked files, which may hold secrets, by name alone);
    data.json tells whether the data are still those of the last start.
    """
    path = run_path(config)
    for name in ("checkpoints", "checkpoints-meta", "samples"):
        (path / name).mkdir(parents=True, exist_ok=True)
    save_config(config, path / "config.json")
    with open(path / "command.txt", "a") as opened:
        opened.write(shlex.join([sys.executable, *sys.argv]) + "\n")
    write_json(path / "versions.json", versions())
    patch, untracked = uncommitted_changes()
    write_json(path / "git.json", {"commit": git_commit(), "uncommitted": bool(patch), "untracked": untracked})
    with atomic_path(path / "uncommitted.patch") as temporary:
        temporary.write_bytes(patch)
    return _changed_data(config, path / "data.json")


def _changed_data(config, record):
    """Return a sentence for each folder of data whose files changed since `record` was written; write it anew."""
    data = config.data
    roots = [data.reflow_data_root, data.real_pairs_root]
    if not data.reflow_data_root:
        roots += [data.data_root or data.custom_data_root or f"data/{data.dataset}"]
    found = {root: state_digest(root) for root in roots if root and os.path.exists(root)}
    before = read_json(record) if record.exists() else {}
    write_json(record, found)
    return [f"the files in {root} changed since this run was last started (names, sizes or times): it goes on with "
            "what is there now" for root in found if before.get(root, found[root]) != found[root]]


class RunLogger:
    """The log of a run, written by the main process only; the others hold one that is silent.

    log.jsonl has an object per record: step, loss, lr, grad_norm, images_per_second, memory_mb, beta, skipped
    (updates left out so far) and skipped_steps (the numbers of the last of them). log.txt has what was said.
    """

    def __init__(self, run, *, start, total, progress, active):
        self.run, self.active = pathlib.Path(run), active
        self.path = self.run / "log.jsonl"
        self._since, self._step, self._first = time.perf_counter(), start, start + 1
        self._board = None
        if active:
            _forget_after(self.path, start)
            self.bar = progress_bar(total=total, initial=start, desc="training", unit="updates", enabled=progress)

    def tick(self):
        """Count one update on the progress bar."""
        if self.active:
            self.bar.update(1)

    def write(self, step, stats, *, lr, beta, batch_size, device):
        """Write the means of the finite updates since the last record; `stats` is what `UpdateStats` read."""
        now = time.perf_counter()
        speed = (step - self._step) * batch_size / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        count = stats["finite"]
        entry = {
            "step": step,
            "loss": stats["loss_sum"] / count if count else None,
            "lr": lr,
            "grad_norm": stats["norm_sum"] / count if count else None,
            "beta": beta,
            "skipped": int(stats["nonfinite"]),
            "skipped_steps": stats["steps"],
            "images_per_second": round(speed, 2),
            "memory_mb": _memory_mb(device),
        }
        if not self.active:
            return
        with open(self.path, "a") as opened:
            opened.write(json.dumps(entry) + "\n")
        shown = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
        self.bar.set_postfix(loss=shown, speed=f"{speed:.0f} images/s")
        for name in (*CURVES, "lr", "beta", "images_per_second"):
            if entry[name] is not None:
                self.board.add_scalar(name, entry[name], step)

    @property
    def board(self):
        """The TensorBoard writer of the run; events after the step of a restart are dropped."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # a second of import time, only where it is used

            self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._first)
        return self._board

    def image(self, name, path, step):
        """Show the image file `path` in TensorBoard."""
        self.board.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def draw(self):
        """Refresh loss.png from log.jsonl."""
        if self.active:
            draw_loss(self.path, self.run / "loss.png")

    def say(self, text):
        """Write one line above the progress bar and into log.txt."""
        if self.active:
            tqdm.write(text, file=sys.stderr)
            with open(self.run / "log.txt", "a") as opened:
                opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self):
        """End the progress bar and flush TensorBoard."""
        if self.active:
            self.bar.close()
            if self._board is not None:
                self._board.close()


def _forget_after(path, step):
    """Drop the records that come after `step`, from which the run goes on: it will write them again."""
    entries = read_json_lines(path)
    kept = [entry for entry in entries if entry.get("step", step) <= step]
    if len(kept) < len(entries) or (entries and not path.read_text().endswith("\n")):
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _memory_mb(device):
    """Return the peak memory of the process in MB: the device's on CUDA, the resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def draw_loss(log, path):
    """Draw the loss and the gradient norm of a log.jsonl against the step, both axes logarithmic in height."""
    entries = [e for e in read_json_lines(log) if e.get("loss") is not None]
    if not entries:
        return
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, 2), CURVES, strict=True):
        axis.plot([e["step"] for e in entries], [e[name] for e in entries])
        axis.set(xlabel="update", ylabel=name.replace("_", " "), yscale="log")
        axis.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


@torch.no_grad()
def sample_grids(network, ema, velocity, config, shape, path):
    """Write an image with a labelled row per sampler to `path` and return the path.

    Row after row the same noise, the samples 0, 1, … of config.seed, so that grids of different steps compare.
    `network` (that `velocity` calls) has its training weights and mode again afterwards, and no global random
    number is drawn. shape: (C, H, W).
    """
    device = next(network.parameters()).device
    z0 = index_noise(config.seed, range(COLUMNS), shape).to(device) * config.sampling.init_noise_scale
    label, classes = None, config.data.num_classes
    if classes:
        label = one_hot(index_labels(config.seed, range(COLUMNS), classes).to(device), classes)
    network.eval()
    with ema.average_parameters():
        rows = [samplers.one_step(velocity, z0, label, t_start=config.flow.eps)[0]]
        rows += [samplers.euler(velocity, z0, label, steps=n, t_start=config.flow.eps)[0] for n in EULER_STEPS]
    network.train()
    save_grid(path, torch.cat(rows), columns=COLUMNS, labels=["one step", *(f"Euler {n}" for n in EULER_STEPS)])
    return path


class StopRequest:
    """Remembers SIGINT or SIGTERM while it is entered (`with`), so that the update at hand ends with its state written.

    A second Ctrl-C interrupts a single process at once. Several processes never are: torchrun passes a Ctrl-C on that
    the terminal has sent them already. The exit status of a stopped run is 128 + signal: 130 after SIGINT, 143 after
    SIGTERM.
    """

    LONGEST = 10  # updates between two questions whether any process was told to stop
    PATIENCE = 2.0  # seconds, likewise; torchrun kills 30 seconds after it has sent a signal

    def __init__(self, world_size):
        self.signal = 0
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._asked, self._next, self._since = 0, 1, time.monotonic()

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        if self.signal == number == signal.SIGINT and self._group is None:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def agreed(self, done):
        """Return the signal on which all processes stop after `done` updates of this start, or 0.

        Several processes ask each other on the host every few updates, as many as the slowest does in PATIENCE seconds:
        the device is not read.
        """
        if self._group is None:
            return self.signal
        if done < self._next:
            return 0
        pace = (time.monotonic() - self._since) / max(done - self._asked, 1)
        votes = torch.tensor([self.signal, pace], dtype=torch.float64)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        self._asked, self._since = done, time.monotonic()
        self._next = done + max(1, min(self.LONGEST, int(self.PATIENCE / max(float(votes[1]), 1e-3))))
        return int(votes[0])


def endless_schedules(config):
    """Return a sentence for a warm-up or an annealing that is longer than the run."""
    n_iters, annealing = config.training.n_iters, re.fullmatch(r"warmup(?:_cos)?_(\d+)", config.training.x0_randomness)
    said = []
    if config.optim.warmup > n_iters and not config.flow.pre_train_model:
        said.append(f"config.optim.warmup {config.optim.warmup} is longer than the run of {n_iters} updates: the "
                    "learning rate never reaches config.optim.lr")
    if annealing and int(annealing[1]) > n_iters and config.data.reflow_data_root:
        said.append(f"config.training.x0_randomness {annealing[0]} is longer than the run of {n_iters} updates: the "
                    "noise of the pairs is never used alone")
    return said
