"""Which software made a number: what answers most 'your FID differs' questions."""

import importlib.metadata
import pathlib
import platform
import subprocess

import torch


def versions(device):
    """Return {name: version} of what the numbers depend on: this code, Python, torch, numpy, the device."""
    found = {"slimflow": _commit(), "python": platform.python_version(), "torch": torch.__version__,
             "numpy": importlib.metadata.version("numpy"), "device": device_name(device)}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def device_name(device):
    """Return the name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _commit():
    """Return the short commit of the checkout this file is in, with a + when files differ from it."""
    here = pathlib.Path(__file__).parent

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
