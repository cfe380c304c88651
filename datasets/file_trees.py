"""Folders and zip archives of pictures, read the same way."""

import json
import os
import zipfile

from datasets.source import identify, read_file
from runtime.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LARGEST_MEMBER = 2**30  # bytes; a picture that unpacks to more is an attack
LABEL_FILE = "dataset.json"


class FolderTree:
    """The files of a folder, recursively, links followed."""

    def __init__(self, root):
        """List the folder."""
        self.root = root
        self.names = sorted(_walk(self.root))

    def read(self, name):
        """Return the bytes of a file, by its path from the root with forward slashes."""
        return read_file(self.root / name)


class ZipTree:
    """The members of a zip archive. Nothing is ever unpacked to disk; several threads may read."""

    def __init__(self, root):
        """Open the archive. Raises `UserError` for a file that is no zip and for names that climb out of it."""
        self.root = root
        try:
            self.archive = zipfile.ZipFile(root)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{root} is no readable zip archive ({error}): download it again") from None
        self.names = sorted(n for n in self.archive.namelist() if not n.endswith("/"))
        for name in self.names:
            if name.startswith("/") or "\\" in name or ":" in name.split("/")[0] or ".." in name.split("/"):
                raise UserError(f"{root} holds a path that climbs out of it, {name!r}: do not trust this archive")

    def read(self, name):
        """Return the bytes of a member. Raises `UserError` for a damaged, encrypted or huge one."""
        size = self.archive.getinfo(name).file_size
        if size > LARGEST_MEMBER:
            raise UserError(f"{self.root}: {name} would unpack to {size} bytes; that is no picture")
        try:
            return self.archive.read(name)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{self.root}: {name} cannot be unpacked: {error}") from None


def find_tree(root):
    """Return the path of the zip that stands in for the folder `root` (its one zip, with no picture), else `root`."""
    archives = sorted(root.glob("*.zip"))
    if len(archives) == 1 and not any(p.is_dir() or _is_picture(p.name) for p in root.iterdir()):
        return archives[0]
    return root


def open_tree(root):
    """Return the tree of the folder or zip file `root`."""
    return ZipTree(root) if root.is_file() else FolderTree(root)


def tree_identity(root):
    """Return the identity of a zip file, or of a folder's pictures and labels; an archive is not opened for it."""
    if root.is_file():
        return identify([root])
    return identify([name for name in FolderTree(root).names if _is_picture(name) or name == LABEL_FILE], root)


def picture_names(tree):
    """Return the names of the tree's pictures, sorted. Raises `UserError` when there is none."""
    names = [name for name in tree.names if _is_picture(name)]
    if not names:
        raise UserError(f"{tree.root} holds no picture ({', '.join(SUFFIXES)}): put pictures there or set "
                        "--config.data.data_root to where they are")
    return names


def labels_from_json(tree, names):
    """Return the class numbers that dataset.json gives the pictures, a list of int, or None when it gives none.

    The form is that of EDM and StyleGAN: `{"labels": [["00000/img00000000.png", 6], …]}`, or `"labels": null`.
    Raises `UserError` for another form and for a picture without label.
    """
    place = f"{tree.root}: {LABEL_FILE}"
    try:
        entries = json.loads(tree.read(LABEL_FILE))["labels"]
        given = None if entries is None else dict(entries)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{place} is not of the form {{"labels": [["name", class], …]}} ({error})') from None
    if not given:
        return None
    for name in names:
        if name not in given:
            raise UserError(f"{place} has no label for {name}: add it, or remove {LABEL_FILE} to go without labels")
        if type(given[name]) is not int or given[name] < 0:
            raise UserError(f"{place} gives {name} the label {given[name]!r}: a label is a class number, 0 or more")
    return [given[name] for name in names]


def labels_from_folders(names):
    """Return class numbers by first sub-folder (sorted by name), a list of int, and the class names.

    (None, None) when some picture lies in no sub-folder.
    """
    if any("/" not in name for name in names):
        return None, None
    folders = [name.split("/")[0] for name in names]
    class_names = tuple(sorted(set(folders)))
    numbers = {name: number for number, name in enumerate(class_names)}
    return [numbers[folder] for folder in folders], class_names


def _walk(root):
    """Yield the paths of the files under `root`, from it, with forward slashes; each folder once, links or not."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        inner = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from files if inner == "." else (f"{inner}/{name}" for name in files)


def _is_picture(name):
    """Return whether a name is a picture's; what macOS adds to folders and archives is none."""
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and parts[0] != "__MACOSX" and not parts[-1].startswith(".")
