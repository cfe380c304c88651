"""Files that are fetched once into the user's own cache: Inception's weights, EDM's networks, statistics."""

import pathlib
import shutil
import urllib.request

import torch
from tqdm.utils import CallbackIOWrapper

from runtime.errors import UserError
from runtime.files import atomic_path, file_digest
from runtime.progress import progress_bar

TIMEOUT = 30  # seconds without an answer


def cached_file(url, setting, name=None):
    """Return the path of the copy of `url` in torch.hub's cache, fetching it the first time and printing its digest.

    setting: the flag or field with which the user can name a file of his own, told by the UserError of a failure.
    name: the copy's, by default the last part of the address.
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
                raise OSError(f"only {written.tell()} of {size} bytes came")
    except OSError as error:  # URLError and timeouts are kinds of it
        raise UserError(f"{path.name} could not be fetched ({getattr(error, 'reason', error)}): download {url} on "
                        f"another machine and put it at {path}, or name it with {setting}") from None
    print(f"fetched {url} to {path}; digest {file_digest(path)} (SHA-256, 16 digits)", flush=True)
    return path
