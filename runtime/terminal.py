"""Terminal output: errors as one sentence with an exit status, and progress with the time left."""

import contextlib
import errno
import os
import shutil
import signal
import sys
import textwrap

from tqdm import tqdm

# Scripts import this module first, so that Ctrl-C while torch is imported, which takes seconds, gives no traceback.
if "torch" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR,
                errno.EEXIST)  # the last two: a file where a folder is needed
LINE_EVERY = 30.0  # seconds between plain lines


class UserError(ValueError):
    """An invalid flag, file, checkpoint or data set: one sentence that names it, what was found and what to do."""


@contextlib.contextmanager
def one_sentence(name):
    """End the program with one line on stderr for a UserError, a full disk, missing permission, or Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 2
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
        return
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "interrupted; the same command continues from what is finished", 130  # as in shells
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        message = (f"cannot write {error.filename or ''}: {error.strerror}; make room or choose another folder, then "
                   "run the same command again")
    print_message(" ".join(f"{name}: {message}".split()), stderr=True)
    sys.exit(status)


def print_message(text, stderr=False):
    """Print lines of text above the progress bars: wrapped between words in a terminal, as they are elsewhere."""
    file = sys.stderr if stderr else sys.stdout
    tqdm.write(wrap_lines(text, shutil.get_terminal_size().columns) if file.isatty() else text, file)
    file.flush()


def wrap_lines(text, width, hanging=4):
    """Return `text` with each line wrapped between words; continuation lines are indented by `hanging` more."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + hanging)
        lines.append(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False,
                                   break_on_hyphens=False))
    return "\n".join(lines)


def progress_bar(iterable=None, *, total=None, desc="", unit="it", enabled="auto", initial=0):
    """Return a tqdm bar over `iterable`, or without one a bar that `update(n)` advances.

    enabled: the config field training.progress; "auto" draws a bar where stderr is a terminal, and otherwise writes a
    plain line about every 30 seconds, so that a log file stays readable. initial: where a resumed task starts.
    """
    options = {"total": total, "desc": desc, "unit": unit, "initial": initial, "file": sys.stderr}
    sizeless = sys.stderr.isatty() and not os.get_terminal_size(sys.stderr.fileno()).columns  # as in `docker exec -t`
    if enabled == "auto" and not sys.stderr.isatty():
        bar = PlainProgress(iterable, mininterval=LINE_EVERY, maxinterval=LINE_EVERY, miniters=1, smoothing=0,
                            **options)
        bar._decr_instances(bar)  # otherwise every message would be followed by another line
        return bar
    options |= {"ncols": 79, "nrows": 24} if sizeless else {"dynamic_ncols": True}
    if total or iterable is not None:  # what a narrow terminal cuts off is the rate
        options["bar_format"] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}, {rate_fmt}]"
    return tqdm(iterable, disable=enabled == "false", unit_scale=unit == "B", **options)


class PlainProgress(tqdm):
    """Progress as plain lines: `pairs: 1024/4000 samples (25.6 %), 310.2 samples/s, 00:09 left`."""

    monitor_interval = 0  # no monitor thread

    def display(self, msg=None, pos=None):
        """Write a line, once there is progress."""
        if self.n > self.initial:
            place = "{n}/{total} {unit} ({percentage:.1f} %)" if self.total else "{n} {unit}"
            left = ", {remaining} left" if self.total else ""
            line = ("{desc}: " if self.desc else "") + place + ", {rate_noinv:.1f} {unit}/s" + left + "{postfix}"
            print(self.format_meter(**self.format_dict | {"bar_format": line}), file=sys.stderr, flush=True)

    def close(self):
        """Close the bar without another line."""
        self.disable = True
