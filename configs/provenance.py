"""The origin of a result: commit, packages, and the config in its checkpoint."""

import contextlib
import pathlib
import platform
import subprocess
from importlib import metadata

from configs.default import FIELDS, get_field, set_field
from datasets.pairs import METADATA, open_folders

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "ml_collections", "absl-py", "lpips", "clean-fid")
CHECKOUT = pathlib.Path(__file__).parent.parent
# Fields without effect once a network is trained: places of data on this machine, and augmentation.
NOT_OF_THE_RUN = ("data.cache_dir", "data.on_device", "data.random_flip", "data.use_aug", "data.reflow_data_root",
                  "data.real_pairs_root")
RUN_FIELDS = ("flow.eps", "flow.flow_t_schedule", "sampling.init_noise_scale",
              *(name for name in FIELDS if name.startswith("data.") and name not in NOT_OF_THE_RUN))
ROOTS = {"data.data_root", "data.custom_data_root"}


def git(*arguments):
    """Return what git prints about this checkout, as bytes; empty outside of one."""
    try:
        return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def git_commit():
    """Return the commit of this checkout, with a + if tracked files differ from it; None outside git."""
    commit = git("rev-parse", "HEAD").decode().strip()
    return commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None


def uncommitted_changes():
    """Return (the patch of the tracked files, as bytes; the names of untracked files, which may be secret or large)."""
    listed = git("ls-files", "--others", "--exclude-standard", "-z").decode(errors="replace")
    return git("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD"), listed.split("\0")[:-1]


def versions():
    """Return the versions of Python and of the packages that decide results; None for one that is not installed."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def take_pair_fields(config, given):
    """Set the fields data.*, unless given, to those of the run that made data.reflow_data_root; return remarks."""
    root, fields = config.data.reflow_data_root, [name for name in RUN_FIELDS if name.startswith("data.")]
    for folder in open_folders(root) if root else ():
        if folder.metadata:  # not for pairs without pairs.json
            path, saved = folder.path / METADATA, folder.metadata.get("config", {})
            return [f"{path}: {remark}" for remark in take_run_fields(config, saved, given, path, fields)]
    return []


def take_run_fields(config, saved, given, path, fields=RUN_FIELDS):
    """Set `fields` of `config`, about data and noise of the training, to those of a checkpoint's run, unless given.

    saved: the config in the checkpoint at `path` as a nested dict; fields may be missing. given: dotted names of the
    fields on the command line, which take precedence. Returns remarks about differences from command line and config
    file.
    """
    run = {}
    for name in fields:
        group, field = name.split(".")
        members = saved.get(group)
        if isinstance(members, dict) and field in members:
            run[name] = members[field]
            FIELDS[name].check(f"{path}: config.{name}", run[name])
    before = {name: get_field(config, name) for name in run}
    different = [name for name in run if run[name] != before[name]]
    kept = set(given)
    if kept & ROOTS or "data.dataset" in kept.intersection(different):
        kept |= ROOTS  # the run's folder is that of the run's data set
    elif "data.dataset" not in different:  # without a root in the run, keep this config's
        kept |= {name for name in ROOTS if not run.get(name)}
    taken = [name for name in different if name not in kept]
    for name in taken:
        set_field(config, name, run[name])
    remarks = [f"trained with {name} {run[name]!r}, but {before[name]!r} of the command line is used"
               for name in different if name in given]
    if taken:
        phrases = [f"{name} {run[name]!r} (not {before[name]!r})" for name in taken]
        remarks.append(f"as in training, not as in the config file: {', '.join(phrases)}")
    return remarks
