"""Checkpoints: reading and writing files, ours and the released ones, and what the scripts need to know of them.

A checkpoint is a dict: `model` (state dict), `ema` (see models/ema.py), `optimizer`, `step`, and in ours `config`, the
config of the run as a nested dict. A file of the released layout is translated as it is read, so that the rest of
the program knows one layout only.
"""

import hashlib
import pathlib
import pickle
import re
import urllib.parse
import warnings
import zipfile

import torch

from configs.provenance import take_run_fields
from models import edm, edm_pickle, infer, released
from models.create import create_from_fields, create_model, tuple_of
from models.safe_pickle import SAFE_GLOBALS
from runtime.downloads import cached_file
from runtime.errors import UserError
from runtime.files import atomic_path

REMOTE = ("hf://", "https://")


def write_checkpoint(path, state):
    """Write a checkpoint dict atomically: a crash leaves the old file or the new one, never half of one.

    Raises OSError, naming the file, where it cannot be written.
    """
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as opened:
            torch.save(state, opened)
    except (OSError, RuntimeError) as error:
        said = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides what the system said
        if not isinstance(said, OSError):
            raise
        raise OSError(said.errno, said.strerror, str(path)) from None


def numbered_checkpoints(folder):
    """Return {k: path} of the files checkpoint_{k}.pth in `folder`, in the order of k."""
    found = ((re.fullmatch(r"checkpoint_(\d+)\.pth", path.name), path) for path in pathlib.Path(folder).glob("*.pth"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_checkpoint(path):
    """Return the checkpoint at `path` (a file, or hf://owner/repo/file) in our layout, its tensors on the CPU.

    Beside `model`, `ema`, `optimizer`, `step` and, in ours, `config`, the result has `fields`: the dotted config
    fields of the architecture as far as the file tells them. Nothing in the file is executed. The tensors are mapped
    from the file, not read, so entries that are not used cost nothing. Raises UserError for a file that is missing,
    damaged, no checkpoint, or holds more than tensors and numbers.
    """
    file = local_file(path)
    if pathlib.Path(file).is_file() and edm_pickle.is_snapshot(file):
        return edm.read_checkpoint(file, path, create_from_fields)
    checkpoint = load_safely(path)
    check_entries(checkpoint, path)
    if not infer.is_released(checkpoint["model"]):
        return dict(checkpoint, fields=saved_fields(checkpoint, path))
    if "config" in checkpoint:  # one of ours, exported in the released layout
        fields = saved_fields(checkpoint, path)
    else:
        fields = {"model.preconditioning": "none"} | infer.released_fields(checkpoint["model"], path)
    with torch.device("meta"):
        net = create_from_fields(infer.with_image_size(fields))
    checkpoint = dict(checkpoint, model=infer.with_usual_prefix(checkpoint["model"]))
    try:
        return dict(released.from_released(checkpoint, net), fields=fields)
    except (LookupError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: its weights, EMA and optimiser do not belong together") from error


def check_entries(checkpoint, path):
    """Raise UserError unless a dict has the weights and averages of a checkpoint."""
    model, ema = checkpoint.get("model"), checkpoint.get("ema")
    if not isinstance(model, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        raise UserError(f"{path} is no checkpoint of this program: it has no state dict under 'model'")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not all(isinstance(tensor, torch.Tensor) for tensor in shadow):
        raise UserError(f"{path} is no checkpoint of this program: it has no averaged weights under 'ema'")


def load_safely(path):
    """Return the dict that `torch.save` wrote to `path`: tensors, numbers and text only.

    Raises UserError for anything else, in one sentence.
    """
    file = local_file(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; what cannot be read is an error below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}); name a checkpoint file, "
                        "hf://owner/repo/file or https://…/file") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ArithmeticError, LookupError, TypeError,
            ValueError, AttributeError) as error:
        raise UserError(f"{path} {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def why_unreadable(error):
    """Return the rest of a sentence about a file that `torch.load` refused."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return (f"is refused: it names {foreign[1]}, which is neither a tensor nor a number and could run code; "
                "nothing was executed")
    return "cannot be read as a checkpoint; it is cut short, damaged or another kind of file"


def is_remote(path):
    """Whether `path` is an address: hf://owner/repo/file or https://…/file."""
    return str(path).startswith(REMOTE)


def local_file(path):
    """Return the file that `path` means; hf://owner/repo/file and https://…/file are fetched into the user's caches.

    Raises UserError if it cannot be fetched.
    """
    path = str(path)
    if not is_remote(path):
        return path
    if path.startswith("https://"):
        name = urllib.parse.unquote(urllib.parse.urlsplit(path).path).rpartition("/")[2]
        if not name:
            raise UserError(f"{path} is incomplete; it must be https://host/…/file")
        address = hashlib.sha256(path.encode()).hexdigest()[:8]  # files of one name are not mixed up
        return str(cached_file(path, "a path in its place", f"{address}-{name}"))
    owner, _, rest = path.removeprefix("hf://").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{path} is incomplete; it must be hf://owner/repo/file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{path} needs the package huggingface_hub; run pip install huggingface_hub") from error
    try:
        return hf_hub_download(f"{owner}/{repository}", file)
    except Exception as error:  # the library raises a dozen kinds, from its own, requests, httpx and the system
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} could not be fetched: {first_line}") from error


def load_model(path, use_ema=True, device="cpu", fields=None):
    """Return the network of the checkpoint at `path`, ours or released, in eval mode on `device`.

    use_ema: the averaged weights rather than the raw ones. fields: dotted config fields of the architecture that the
    file cannot tell, for instance {"data.image_size": 64}; they must not contradict it. Raises UserError (see
    `read_checkpoint`), also if the image size can neither be told nor is given.
    """
    checkpoint = read_checkpoint(path)
    fields = fields or {}
    net = create_from_fields(infer.UNTOLD | fields | complete_fields(checkpoint["fields"], fields, path))
    load_weights(net, checkpoint, use_ema, path)
    return ready(net, device)


def load_with_config(path, config, given, use_ema=True, device="cpu", say=print):
    """Return (config, net): the config of the checkpoint's run (`config_of_run`), and its network as `load_model`.

    say: takes the remarks about differences, one sentence each.
    """
    checkpoint = read_checkpoint(path)
    config, remarks = config_of_run(config, checkpoint, given, path)
    for remark in remarks:
        say(f"{path}: {remark}")
    return config, network_of(config, checkpoint, path, use_ema, device)


def network_of(config, checkpoint, path, use_ema=True, device="cpu"):
    """Return the network of a config of `config_of_run` with a checkpoint's weights, as `load_model` returns it."""
    net = create_model(config)
    load_weights(net, checkpoint, use_ema, path)
    return ready(net, device)


def ready(net, device):
    """Return the network in eval mode on `device`; on a CPU with the memory layout that convolves fastest there."""
    net = net.eval().to(device)
    return net.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else net


def load_weights(net, checkpoint, use_ema, path):
    """Copy a checkpoint's weights into a network of the same architecture; `path` is for the error's sentence."""
    check_same_network(net, checkpoint, path)
    net.load_state_dict(checkpoint["model"])
    net.licence_note = checkpoint.get("licence_note", "")
    if use_ema:
        trained = [p for p in net.parameters() if p.requires_grad]
        with torch.no_grad():
            torch._foreach_copy_(trained, list(checkpoint["ema"]["shadow_params"]))


def check_same_network(net, checkpoint, path):
    """Raise UserError with the difference if a checkpoint's tensors are not those of `net`."""
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["model"].items()}
    trained = [tuple(p.shape) for p in net.parameters() if p.requires_grad]
    shadow = [tuple(s.shape) for s in checkpoint["ema"]["shadow_params"]]
    if ours == theirs and trained == shadow:
        return
    different = contradictions(net.config_fields, checkpoint["fields"])
    if different:
        raise UserError(f"{path} belongs to another network: {'; '.join(different)}")
    name = next((n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n)), "the EMA")
    raise UserError(f"{path} does not fit the network: {name} is {theirs.get(name, 'missing')} there and "
                    f"{ours.get(name, 'missing')} here")


def load_matching(net, path):
    """Copy every raw weight of the checkpoint at `path` whose name and shape match into `net`.

    Returns (matched, unmatched): names of the network's tensors that were and were not copied.
    """
    checkpoint = read_checkpoint(path)
    edm.check_start(net, checkpoint["fields"], path)
    theirs, ours = checkpoint["model"], net.state_dict()
    matched = [name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape]
    net.load_state_dict({name: theirs[name] for name in matched}, strict=False)
    return matched, [name for name in ours if name not in matched]


# The architecture of a checkpoint, as config fields.


def saved_fields(checkpoint, path):
    """Return the dotted architecture fields of a checkpoint of ours, from the config saved in it."""
    config = checkpoint.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{path} has neither a config nor the names of a released checkpoint, so its network is "
                        "unknown")
    flat = {f"{group}.{name}": value for group in ("model", "data") for name, value in config.get(group, {}).items()}
    with torch.device("meta"):
        return create_from_fields(flat).config_fields


def contradictions(ours, theirs):
    """Return a phrase for each dotted field that both have with different values."""
    return [f"{name} is {plain(theirs[name])} in the checkpoint and {plain(ours[name])} here"
            for name in theirs if name in ours and plain(ours[name]) != plain(theirs[name])]


def plain(value):
    """Return tuples as lists, so that they compare."""
    return list(value) if isinstance(value, tuple) else value


def complete_fields(told, chosen, path, configured=None):
    """Return the architecture fields `told` by a checkpoint, with the image size that a released NCSN++ leaves open.

    chosen: fields that the user gave; one that contradicts the checkpoint raises UserError with the difference.
    configured: fields of a config file; where they fit the checkpoint they decide the image size.
    """
    if infer.ATTENTION_LEVELS in told:
        told = infer.choose_image_size(told, image_size(told, chosen, configured or {}, path))
    different = contradictions(chosen, told)
    if different:
        raise UserError(f"{path}: {'; '.join(different)}; leave the field out or name another checkpoint")
    return told


def image_size(told, chosen, configured, path):
    """Return the image size of a released NCSN++, which tells only the levels that have attention."""
    levels = told[infer.ATTENTION_LEVELS]
    if "data.image_size" in chosen:
        return chosen["data.image_size"]
    if chosen.get("model.attn_resolutions") and levels:
        return max(chosen["model.attn_resolutions"]) << min(levels)
    size = configured.get("data.image_size")
    if size and levels and plain(configured.get("model.attn_resolutions")) == [size >> level for level in levels]:
        return size
    size = infer.usual_image_size(told)
    if size is None:
        raise UserError(f"{path} does not tell its image size; give it with data.image_size")
    return size


def config_of_run(config, checkpoint, given, path):
    """Return (config, remarks): a copy of a config with all that a checkpoint (`read_checkpoint(path)`) knows.

    That is its architecture and, from the config in it, data set, flow.eps and noise scale of its run; of a released
    checkpoint the architecture alone. given: the dotted fields on the command line. One that contradicts the
    architecture raises UserError with the difference; one that contradicts the rest wins, which a remark says.
    """
    config = apply_architecture(config, checkpoint["fields"], given, path)
    return config, take_run_fields(config, checkpoint.get("config", {}), given, path)


def apply_architecture(config, checkpoint_fields, given, path="the checkpoint"):
    """Return a copy of a config with the architecture of a checkpoint (`read_checkpoint(path)["fields"]`).

    given: the dotted fields that the user set himself. Raises UserError with the difference, naming `path`, if one
    of them contradicts the checkpoint.
    """
    configured = {f"{group}.{name}": value for group in ("model", "data") for name, value in config[group].items()}
    chosen = {name: value for name, value in configured.items() if name in given}
    result = config.copy_and_resolve_references()
    for name, value in complete_fields(checkpoint_fields, chosen, path, configured).items():
        group, field = name.split(".")
        result[group][field] = tuple_of(value)
    return result
