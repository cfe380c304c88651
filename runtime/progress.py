"""Progress on stderr: a bar where a terminal watches, a plain line now and then where a log file does."""

import sys
import time

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between the plain lines


def progress_bar(iterable=None, *, total=None, desc="", unit="it", enabled="auto", initial=0):
    """Return a progress bar over `iterable`, or one that is moved on by `update(n)` when there is none.

    It is iterable, a context manager, and has `update(n)`, `set_postfix(**values)` and `close()`, as tqdm's bar.
    `enabled` is the config field `training.progress`: "true" draws a bar, "false" nothing, and "auto" a bar where
    stderr is a terminal and otherwise one plain line about every 30 seconds, so that a log file stays readable.
    `initial` is where a resumed task starts; `total` defaults to the length of `iterable`.
    """
    if enabled == "auto" and not sys.stderr.isatty():
        return PlainProgress(iterable, total=total, desc=desc, unit=unit, initial=initial)
    return tqdm(iterable, total=total, desc=desc, unit=unit, initial=initial, disable=enabled == "false",
                dynamic_ncols=True, file=sys.stderr)


class PlainProgress:
    """Progress as plain lines: `pairs: 1024/4000 samples (25.6 %), 310.2 samples/s, 00:09 left`."""

    def __init__(self, iterable=None, *, total=None, desc="", unit="it", initial=0):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.total, self.desc, self.unit = iterable, total, desc, unit
        self.n = self.initial = initial
        self.postfix = ""
        self.started = self.written = time.monotonic()

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update(1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def update(self, n=1):
        """Move on by `n` items; write a line when the last one is long enough ago."""
        self.n += n
        if time.monotonic() - self.written >= LINE_EVERY:
            self._write_line()

    def set_postfix(self, **values):
        """Show these values at the end of the next lines."""
        self.postfix = "".join(f", {name} {value:.4g}" if isinstance(value, float) else f", {name} {value}"
                               for name, value in values.items())

    def close(self):
        """Nothing is left open; a task shorter than the first line stays silent."""

    def _write_line(self):
        self.written = time.monotonic()
        rate = (self.n - self.initial) / max(self.written - self.started, 1e-9)
        place = f"{self.n}/{self.total} {self.unit} ({100 * self.n / self.total:.1f} %)" if self.total else (
            f"{self.n} {self.unit}")
        left = f", {tqdm.format_interval((self.total - self.n) / rate)} left" if self.total and rate else ""
        start = f"{self.desc}: " if self.desc else ""
        print(f"{start}{place}, {rate:.1f} {self.unit}/s{left}{self.postfix}", file=sys.stderr, flush=True)
