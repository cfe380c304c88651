"""Checkpoints: reading and writing files, ours and released ones, and loading networks from them.

A checkpoint is a dict: `model` (state dict), `ema` (see training/update.py), `optimizer`, `step`, and in ours `config`,
the config of the run as a nested dict. A file may also hold only weights: a dict with `model`, or the bare state dict;
an entry `weights` "EMA" marks averaged ones. A file of the released layout is translated once its network is known, so
that the rest of the program has to know one layout only.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request
from multiprocessing.pool import ThreadPool

import torch

from configs.default import FIELDS, get_field, set_field
from models import edm, edm_pickle, released
from models.create import create_from_fields, model_fields, tuple_of
from models.safe_load import PART_BYTES, read_file
from runtime.files import atomic_path, cached_file, file_digest
from runtime.terminal import UserError, print_message

# Fields without effect once a network is trained: places of data on this machine, and augmentation.
NOT_OF_THE_RUN = ("data.cache_dir", "data.on_device", "data.random_flip", "data.use_aug", "data.reflow_data_root",
                  "data.real_pairs_root")
# What training determines besides the architecture: the beginnings of the names of these fields.
RUN_FIELDS = ("data.", "flow.eps", "flow.flow_t_schedule", "sampling.init_noise_scale", "sampling.train_subset")
ROOTS = {"data.data_root", "data.custom_data_root"}
PATIENCE = 4.0  # seconds for the first answer of hf://
WRAPPERS = r"^(module\.|_orig_mod\.)+"  # prefixes of names by DataParallel and torch.compile


def write_checkpoint(path, state):
    """Write a checkpoint dict atomically; raise OSError, naming the file, where it cannot be written."""
    with atomic_path(path) as temporary, open(temporary, "wb") as opened:
        torch.save(state, opened)


def is_remote(path):
    """Return whether `path` is a URL: hf://owner/repo/file or https://…/file."""
    return str(path).startswith(("hf://", "https://"))


def local_file(path):
    """Return the local file of `path`; hf://owner/repo/file and https://…/file are fetched into the user's caches.

    Raises UserError if it cannot be fetched.
    """
    path = str(path)
    if not is_remote(path):
        return path
    if path.startswith("https://"):
        name = urllib.parse.unquote(urllib.parse.urlsplit(path).path).rpartition("/")[2]
        if not name:
            raise UserError(f"{path} is incomplete; it must be https://host/…/file")
        address = hashlib.sha256(path.encode()).hexdigest()[:8]  # keeps files of the same name apart
        return str(cached_file(path, "a path in its place", f"{address}-{name}"))
    match = re.fullmatch("hf://([^/]+/[^/]+)/(.+)", path)
    if not match:
        raise UserError(f"{path} is incomplete; it must be hf://owner/repo/file")
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache, utils
    except ImportError as error:
        raise UserError(f"{path} needs the package huggingface_hub; run pip install huggingface_hub") from error
    # Without an answer the library would try for a minute before it looks into its cache.
    offline = constants.HF_HUB_OFFLINE or not _is_answered(
        f"{constants.ENDPOINT}/{match[1]}/resolve/main/{urllib.parse.quote(match[2])}")
    fetch = functools.partial(try_to_load_from_cache if offline else hf_hub_download, match[1])
    try:
        fetched = part = fetch(match[2])
        for number in itertools.count(2):  # the parts of a file that is split
            if os.path.getsize(part) != PART_BYTES:
                return fetched
            part = None
            with contextlib.suppress(utils.EntryNotFoundError):
                part = fetch(f"{match[2]}.part{number}")
            if not isinstance(part, str):  # the file ends with a part of that length; reading it shows if it is cut
                return fetched
    except Exception as error:  # of many kinds: the library's own, of httpx, the system, and None from its cache
        reason = f"{constants.ENDPOINT} does not answer, and the cache does not have it" if offline else next(
            iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path} could not be fetched: {reason}") from error


def _is_answered(address):
    """Return whether a server answers within `PATIENCE` seconds in all; a timeout of sockets bounds each step alone."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        ThreadPool(1).apply_async(urllib.request.urlopen, (request,), {"timeout": PATIENCE}).get(PATIENCE)
    except Exception as error:  # of the network, of a server that does not speak HTTP, or of waiting
        return isinstance(error, urllib.error.HTTPError)  # the server has answered
    return True


def read_checkpoint(path):
    """Return the checkpoint at `path` (a file, or hf://owner/repo/file), its tensors on the CPU.

    Entries are added to those of the file: `path`; `digest`, of the bytes that were read; and `fields`, the dotted
    config fields of the architecture, or None if neither a config in the file nor the table of published networks
    gives them. Names are without the prefixes of DataParallel and torch.compile. Raises UserError for a file that is
    missing, damaged or not a checkpoint, or that holds more than tensors, numbers and text.
    """
    file = local_file(path)
    if pathlib.Path(file).is_file() and edm_pickle.is_snapshot(file):
        return edm.read_checkpoint(file, path, create_from_fields) | {"digest": file_digest(file), "path": str(path)}
    content, digest = read_file(file)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    checkpoint = {"model": content} if "model" not in content and _is_state(content) else content
    if not _is_state(checkpoint.get("model")):
        raise UserError(f"{path} is not a checkpoint of this program: it has no state dict under 'model'")
    ema = checkpoint.get("ema", {"shadow_params": []})
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not all(isinstance(tensor, torch.Tensor) for tensor in shadow):
        raise UserError(f"{path} is not a checkpoint of this program: it has no averaged weights under 'ema'")
    model = {re.sub(WRAPPERS, "", name): tensor for name, tensor in checkpoint["model"].items()}
    if "config" in checkpoint:
        fields = saved_fields(checkpoint["config"], path)
    else:
        fields = released.published_fields(model) if released.is_released(model) else None
    return dict(checkpoint, model=model, fields=fields, digest=digest, path=str(path))


def _is_state(state):
    return isinstance(state, dict) and len(state) > 0 and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())


def load_model(path, use_ema=True, device="cpu", fields=None):
    """Return the network of the checkpoint at `path`, ours or released, in eval mode on `device`.

    use_ema: load the averaged weights rather than the raw ones. fields: dotted config fields, such as
    {"model.nf": 64}, for a file that does not determine its architecture; they must not contradict one that does.
    Raises UserError as `read_checkpoint`, and if the architecture is unknown.
    """
    checkpoint, fields = read_checkpoint(path), fields or {}
    return network_of(architecture(checkpoint, fields, fields), checkpoint, use_ema, device)


def load_with_config(path, config, given, use_ema=True, device="cpu", say=print_message):
    """Return (config, net, digest) of the checkpoint at `path`; config: see `config_of_run`, net: see `load_model`.

    given: the dotted fields on the command line. say: called with a sentence for each difference of the configs.
    Raises UserError as `load_model`.
    """
    checkpoint = read_checkpoint(path)
    config, remarks = config_of_run(config, checkpoint, given)
    for remark in remarks:
        say(f"{path}: {remark}")
    return config, network_of(model_fields(config), checkpoint, use_ema, device), checkpoint["digest"]


def network_of(fields, checkpoint, use_ema=True, device="cpu"):
    """Return the network of dotted config fields with a checkpoint's weights, as `load_model` returns it."""
    net = create_from_fields(fields)
    load_weights(net, checkpoint, use_ema)
    net = net.eval().to(device)  # channels_last is the fastest memory layout for convolutions on a CPU
    return net.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else net


def load_weights(net, checkpoint, use_ema):
    """Copy the weights of a checkpoint (`read_checkpoint`) into a network of the same architecture.

    Raises UserError if the checkpoint belongs to another network, or lacks the averages or the raw weights asked for.
    """
    path, averaged_alone = checkpoint["path"], checkpoint.get("weights") == "EMA"
    if averaged_alone and not use_ema:
        raise UserError(f"{path} holds only the averaged weights (EMA), not the raw ones: leave out --use_ema false")
    use_ema = use_ema and not averaged_alone
    if use_ema and "ema" not in checkpoint:
        raise UserError(f"{path} holds weights without their moving average (EMA): sample it with --use_ema false, or "
                        "start training from it with config.flow.pre_train_model")
    checkpoint = in_our_layout({name: value for name, value in checkpoint.items() if name != "optimizer"}, net)
    if difference := _difference(net.state_dict(), checkpoint["model"]):
        different = "; ".join(contradictions(net.config_fields, checkpoint["fields"] or {}))
        raise UserError(f"{path} belongs to another network: {different}" if different else
                        f"{path} does not fit the network: {difference}")
    trained, shadow = [p for p in net.parameters() if p.requires_grad], checkpoint.get("ema", {}).get("shadow_params")
    if shadow is not None and [s.shape for s in shadow] != [p.shape for p in trained]:
        raise UserError(f"{path} does not fit the network: the EMA has {len(shadow)} tensors there and "
                        f"{len(trained)} here, or their shapes differ")
    net.load_state_dict(checkpoint["model"])
    net.licence_note = checkpoint.get("licence_note", "")
    if use_ema:
        with torch.no_grad():
            torch._foreach_copy_(trained, shadow)


def _difference(ours, theirs):
    """Return a phrase for the first tensor whose name or shape differs between two state dicts, or None."""
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs))
    name = next((n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n)), None)
    return name and f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"


def in_our_layout(checkpoint, net=None):
    """Return a checkpoint (`read_checkpoint`) in our layout; a released one is translated for `net`.

    net None: the network of its architecture. Raises UserError if that is unknown or the checkpoint is damaged.
    """
    if not released.is_released(checkpoint["model"]):
        return checkpoint
    if net is None:
        with torch.device("meta"):
            net = create_from_fields(architecture(checkpoint, {}, {}))
    try:
        return released.from_released(checkpoint, net)
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint['path']} is damaged: its weights, EMA and optimizer do not belong together "
                        f"({error})") from error


def load_matching(net, path):
    """Copy every raw weight of the checkpoint at `path` whose name and shape match into `net`.

    Returns (matched, unmatched), the names of `net`'s tensors. Raises UserError if only one network is EDM's denoiser.
    """
    checkpoint = read_checkpoint(path)
    kind = "model.preconditioning"
    theirs = {kind: "none"} | (checkpoint["fields"] or {})
    # Weights of a denoiser are useless in a velocity network, and the other way round; and a student that starts as
    # its teacher, a denoiser, needs the same architecture.
    if different := contradictions(net.config_fields, theirs if theirs[kind] != "none" else {kind: theirs[kind]}):
        raise UserError(f"{path}: {different[0]}, where its weights would mean something else; set --config.{kind} "
                        f"{theirs[kind]}, which needs a student of the teacher's architecture")
    weights = {name: checkpoint[name] for name in ("model", "path", "fields")}
    theirs, ours = in_our_layout(weights, None if checkpoint["fields"] else net)["model"], net.state_dict()
    matched = [name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape]
    net.load_state_dict({name: theirs[name] for name in matched}, strict=False)
    return matched, [name for name in ours if name not in matched]


# The architecture of a checkpoint, as config fields.


def saved_fields(config, path):
    """Return the dotted architecture fields of the config (a nested dict) in a checkpoint; UserError if damaged."""
    try:
        with torch.device("meta"):
            return create_from_fields(model_fields(config)).config_fields
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} holds an invalid config: {error}") from error


def contradictions(ours, theirs):
    """Return a phrase for each dotted field that has different values in two dicts."""
    return [f"{name} is {theirs[name]} in the checkpoint and {ours[name]} here"
            for name in theirs if name in ours and tuple_of(ours[name]) != tuple_of(theirs[name])]


def architecture(checkpoint, overrides, defaults):
    """Return the dotted architecture fields of a checkpoint (`read_checkpoint`).

    overrides: fields that the user set; one that contradicts the file raises UserError with the difference. defaults:
    fields of the whole config, for a file that does not determine its architecture: they must make a network of its
    tensors. A released file does not determine the image size for sure, so an override of it is used if it fits.
    """
    inferred, path, is_released = checkpoint["fields"], checkpoint["path"], released.is_released(checkpoint["model"])
    velocity = {"model.preconditioning": "none"} if is_released else {}  # every released network is a velocity
    different = contradictions(overrides, inferred or velocity)
    if inferred and not different:
        return inferred
    refusal = UserError(f"{path}: {'; '.join(different)}; leave the field out or name another checkpoint")
    if different and not is_released:
        raise refusal
    try:
        with torch.device("meta"):
            net = create_from_fields(defaults | velocity | overrides)
        difference = _difference(released.released_state(net) if is_released else net.state_dict(), checkpoint["model"])
    except UserError as error:
        raise refusal if different else error from None
    if not difference:
        return net.config_fields
    raise refusal if different else UserError(
        f"{path} holds no config and is none of the published networks: set config.model and config.data.image_size "
        f"to its architecture (with the present values {difference})")


def config_of_run(config, checkpoint, given):
    """Return (config, remarks): a copy of a config with everything that a checkpoint (`read_checkpoint`) determines.

    That is its architecture and, from the config in it, the data set, flow.eps and noise scale of its run; of a
    released checkpoint only the architecture. given: the dotted fields on the command line. One that contradicts the
    architecture raises UserError with the difference; any other takes precedence, and a remark reports it.
    """
    config = apply_architecture(config, checkpoint, given)
    return config, take_run_fields(config, checkpoint.get("config", {}), given, checkpoint["path"])


def take_run_fields(config, saved, given, path, fields=RUN_FIELDS):
    """Set the fields of `config` about data and noise of the training to those of a checkpoint's run, unless given.

    saved: the config in the checkpoint at `path` as a nested dict; fields may be missing. given: dotted names of the
    fields on the command line, which take precedence. Returns remarks about differences from command line and config
    file. fields: the beginnings of the names of these fields.
    """
    run = {}
    for name in (name for name in FIELDS if name.startswith(fields) and name not in NOT_OF_THE_RUN):
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


def apply_architecture(config, checkpoint, given):
    """Return a copy of a config with a checkpoint's architecture; UserError if a field of `given` contradicts it."""
    defaults, result = model_fields(config), config.copy_and_resolve_references()
    overrides = {name: value for name, value in defaults.items() if name in given}
    for name, value in architecture(checkpoint, overrides, defaults).items():
        group, field = name.split(".")
        result[group][field] = tuple_of(value)
    return result
