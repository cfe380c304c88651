"""Files that are fetched once into the user's own cache: Inception's weights, EDM's networks, statistics."""

import pathlib
import urllib.error
import urllib.request

import torch

from runtime.errors import UserError
from runtime.files import atomic_path, file_digest
from runtime.progress import progress_bar

TIMEOUT = 30  # seconds without an answer


def cache_folder():
    """Return the folder of fetched files: torch.hub's, `~/.cache/torch/hub/checkpoints` unless TORCH_HOME says else."""
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints"


def cached_file(url, setting, name=None):
    """Return the path of the cached copy of `url`, fetching it the first time and printing its digest.

    `setting` names the flag or field with which the user can name a file of his own; `name` is the copy's, by default
    the last part of the address. Raises UserError, saying which file to put where, if the fetching fails.
    """
    path = cache_folder() / (name or url.rpartition("/")[2])
    if path.is_file():
        return path
    try:
        with atomic_path(path) as temporary:
            _fetch(url, temporary)
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        raise UserError(f"{path.name} could not be fetched ({getattr(error, 'reason', error)}): download {url} on "
                        f"another machine and put it at {path}, or name it with {setting}") from None
    print(f"fetched {url} to {path}; digest {file_digest(path)} (SHA-256, 16 digits)", flush=True)
    return path


def _fetch(url, path):
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as written:
        size = int(answer.headers.get("Content-Length") or 0) or None
        with progress_bar(None, total=size, desc=f"fetching {path.name}", unit="B") as bar:
            while block := answer.read(1 << 20):
                written.write(block)
                bar.update(len(block))
        if size is not None and written.tell() < size:
            raise OSError(f"only {written.tell()} of {size} bytes came")
