"""What a run tells: log.jsonl, the progress bar, TensorBoard, loss.png."""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from runtime.files import atomic_path, write_text
from runtime.progress import progress_bar


class Record:
    """The log of a run, written by the main process only; the others hold one that is silent.

    log.jsonl has an object per record: step, loss, lr, grad_norm, images_per_second, memory_mb, beta, skipped
    (updates left out so far) and skipped_steps (the numbers of the last of them).
    """

    def __init__(self, run, *, start, total, progress, active):
        self.run, self.active, self.total = pathlib.Path(run), active, total
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

    def write(self, step, found, *, lr, beta, batch_size, device):
        """Write the means of the finite updates since the last record; `found` is what the guard read."""
        now = time.perf_counter()
        speed = (step - self._step) * batch_size / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        count = max(found["count"], 1.0)
        entry = {
            "step": step,
            "loss": found["loss_sum"] / count if found["count"] else None,
            "lr": lr,
            "grad_norm": found["norm_sum"] / count if found["count"] else None,
            "beta": beta,
            "skipped": int(found["skipped"]),
            "skipped_steps": found["steps"],
            "images_per_second": round(speed, 2),
            "memory_mb": _memory_mb(device),
        }
        if not self.active:
            return
        with open(self.path, "a") as opened:
            opened.write(json.dumps(entry) + "\n")
        shown = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
        self.bar.set_postfix(loss=shown, speed=f"{speed:.0f} images/s")
        for name in ("loss", "lr", "grad_norm", "beta", "images_per_second"):
            if entry[name] is not None:
                self.board.add_scalar(name, entry[name], step)

    @property
    def board(self):
        """The TensorBoard writer of the run; events after the step of a restart are dropped."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # a second of import time, only where it is used

            self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self._first)
        return self._board

    def picture(self, name, path, step):
        """Show the picture file `path` in TensorBoard."""
        if self.active:
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


def read_log(path):
    """Return the entries of a log.jsonl; a last line cut off by a crash is left out."""
    entries = []
    path = pathlib.Path(path)
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _forget_after(path, step):
    """Drop the records that come after `step`, from which the run goes on: it will write them again."""
    entries = read_log(path)
    kept = [entry for entry in entries if entry["step"] <= step]
    if len(kept) < len(entries) or (entries and not path.read_text().endswith("\n")):
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _memory_mb(device):
    """Return the peak memory of the process in MB: the device's on CUDA, the resident set on a CPU."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def draw_loss(log, picture):
    """Draw the loss and the gradient norm of a log.jsonl against the step, both axes logarithmic in height."""
    entries = [e for e in read_log(log) if e["loss"] is not None]
    if not entries:
        return
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, 2), ("loss", "grad_norm"), strict=True):
        axis.plot([e["step"] for e in entries], [e[name] for e in entries])
        axis.set(xlabel="update", ylabel=name.replace("_", " "), yscale="log")
        axis.grid(alpha=0.3)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110)
