"""Progress on stderr: a bar where a terminal watches, a plain line now and then where a log file does."""

import sys

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between the plain lines


def progress_bar(iterable=None, *, total=None, desc="", unit="it", enabled="auto", initial=0):
    """Return tqdm's bar over `iterable`, or one that is moved on by `update(n)` when there is none.

    enabled: the config field training.progress; "auto" draws a bar where stderr is a terminal, and otherwise writes a
    plain line about every 30 seconds, so that a log file stays readable. initial: where a resumed task starts.
    """
    options = {"total": total, "desc": desc, "unit": unit, "initial": initial, "file": sys.stderr}
    if enabled == "auto" and not sys.stderr.isatty():
        return PlainProgress(iterable, mininterval=LINE_EVERY, maxinterval=LINE_EVERY, miniters=1, smoothing=0,
                             **options)
    return tqdm(iterable, disable=enabled == "false", dynamic_ncols=True, **options)


class PlainProgress(tqdm):
    """Progress as plain lines: `pairs: 1024/4000 samples (25.6 %), 310.2 samples/s, 00:09 left`."""

    monitor_interval = 0  # no thread that watches

    def display(self, msg=None, pos=None):
        """Write a line; none before the task has moved on."""
        if self.n > self.initial:
            place = "{n}/{total} {unit} ({percentage:.1f} %)" if self.total else "{n} {unit}"
            left = ", {remaining} left" if self.total else ""
            line = ("{desc}: " if self.desc else "") + place + ", {rate_noinv:.1f} {unit}/s" + left + "{postfix}"
            print(self.format_meter(**self.format_dict | {"bar_format": line}), file=sys.stderr, flush=True)

    def close(self):
        """End the task without another line."""
        self.disable = True
        self._decr_instances(self)
