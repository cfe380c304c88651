"""Writing files so that a crash never leaves half of one."""

import contextlib
import hashlib
import json
import os
import pathlib


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    After an exception (a full disk, Ctrl-C) the temporary file is removed and `path` is as it was before.
    The suffix of `path` is kept, since savers such as `np.save` and matplotlib look at it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path, value):
    """Write `value` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def state_digest(path):
    """Return 16 hexadecimal digits that change when a file, or any file in a folder, is written, added or removed.

    They come from names, sizes and times, not from the content: they are for files too large to be read twice.
    """
    path = pathlib.Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = ((str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(repr(list(states)).encode()).hexdigest()[:16]


def file_digest(path):
    """Return the first 16 hexadecimal digits of the SHA-256 of a file's content."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
