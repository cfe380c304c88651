"""Files: atomic writes, locks between processes, downloads, JSON and digests."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
import urllib.request

import torch
from tqdm.utils import CallbackIOWrapper

from runtime.terminal import CANNOT_WRITE, UserError, print_message, progress_bar

STALE_AFTER = 86400.0  # seconds since the last write after which a temporary file counts as left by a killed process
TIMEOUT = 30  # seconds without an answer of a server


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    After an exception `path` is unchanged; temporary files of killed processes are removed later. The suffix is that of
    `path`, since writers depend on it. An OSError of a full or read-only disk names `path`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    start, end = f".{path.stem[:200]}.", f".tmp{path.suffix}"
    for left in path.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_AFTER:
                left.unlink()
    temporary = path.with_name(f"{start}{secrets.token_hex(4)}{end}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the system's error
        if (not isinstance(cause, OSError) or cause.errno not in CANNOT_WRITE
                or cause.filename not in (None, str(temporary))):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path, doing, refusal=None):
    """Hold the lock file `path` in the `with` block and yield its descriptor; wait while another process holds it.

    doing: what the other process does, for the message while waiting. refusal: raise a UserError with this text instead
    of waiting. The system frees the lock when the process, and children that inherited the descriptor, have ended. The
    empty file is kept: without it two processes could hold the lock.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal:
                raise UserError(refusal) from None
            print_message(f"waiting for another process that is {doing} ({path})", stderr=True)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened.fileno()


def write_text(path, text):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path, value):
    """Write `value` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Return the JSON object in the file `path`; raise UserError, naming it, if there is none."""
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(pathlib.Path(path).read_text())
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; restore or remove it")
    return value


def read_json_lines(path):
    """Return the JSON objects of a file with one per line, [] without the file; damaged lines are skipped."""
    path, found = pathlib.Path(path), []
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def is_hidden(name):
    """Whether a path with forward slashes leads to a hidden file or one that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def walk_files(root):
    """Yield the paths of all files under `root` outside hidden folders, each folder once; UserError if unreadable."""
    def refuse(error):
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}")

    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        real, inner = os.path.realpath(folder), pathlib.Path(folder).relative_to(root)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name) and real not in visited)
        if real not in visited:
            yield from ((inner / name).as_posix() for name in files)
        visited.add(real)


def state_digest(path):
    """Return 16 hexadecimal digits of name, size and time (not content) of a file, or of all files in a folder."""
    path = pathlib.Path(path)
    files = sorted(path / name for name in walk_files(path)) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
              for file in files if file.is_file()]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def file_digest(path):
    """Return the first 16 hexadecimal digits of the SHA-256 of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def cached_file(url, setting, name=None):
    """Return the path of the copy of `url` in torch.hub's cache; download it the first time and print its digest.

    setting: flag or field that names a local file instead, for the UserError of a failed download. name: of the copy,
    by default the last part of the address.
    """
    path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rpartition("/")[2])
    if path.is_file():
        return path
    try:
        with (atomic_path(path) as temporary, urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
              open(temporary, "wb") as written):
            size = int(answer.headers.get("Content-Length") or 0) or None
            with progress_bar(total=size, desc=f"fetching {path.name}", unit="B") as bar:
                shutil.copyfileobj(answer, CallbackIOWrapper(bar.update, written, "write"), 1 << 20)
            if size is not None and written.tell() < size:
                raise OSError(f"only {written.tell()} of {size} bytes arrived")
    except OSError as error:  # among them URLError and timeouts
        raise UserError(f"{path.name} could not be fetched ({getattr(error, 'reason', error)}): download {url} on "
                        f"another machine and put it at {path}, or name it with {setting}") from None
    print_message(f"fetched {url} to {path}; digest {file_digest(path)} (SHA-256, 16 digits)")
    return path
