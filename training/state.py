"""The state of a run: written in a background thread, found and restored; its initial weights and teacher."""

import concurrent.futures
import os
import pathlib

import torch
from torch.utils._pytree import tree_map_only

from configs.command_line import config_from_dict, config_to_dict, load_config
from configs.default import FIELDS, get_field
from datasets.pairs import METADATA, open_folders
from models.checkpoint import (
    apply_architecture,
    in_our_layout,
    load_matching,
    load_model,
    read_checkpoint,
    saved_fields,
    take_run_fields,
    write_checkpoint,
)
from runtime.run_folder import CHECKPOINTS, CONFIG, STATE, checkpoint_path, last_number, numbered_checkpoints, run_path
from runtime.terminal import UserError

# Fields that may change when a run continues: its length, its reports, and how it uses the machine. Of sampling.*, two
# are about the training.
FREE_FIELDS = {
    "expr", "work_dir", "training.n_iters", "training.snapshot_sampling", "training.snapshot_freq_for_preemption",
    "training.record_iters", "training.progress", "training.keep_checkpoints", "training.max_skipped",
    "training.resume_from", "training.accumulation_steps", "training.compile", "training.compile_mode",
    "training.deterministic", "training.wandb", "data.on_device", "data.cache_dir", "data.skip_corrupt",
    "data.data_root", "data.custom_data_root", *(name for name in FIELDS if name.startswith(("sampling.", "eval."))),
} - {"sampling.init_noise_scale", "sampling.train_subset"}
REPORTED_FIELDS = ("training.precision", "optim.lr")  # may change, too, with a message in the log


class Writer:
    """Writes checkpoints in a background thread, one at a time; an error is raised at the next call."""

    def __init__(self):
        self._thread, self._pending = concurrent.futures.ThreadPoolExecutor(1), None

    def submit(self, state, paths, keep=0):
        """Write a copy of `state` to every path; then delete all but the `keep` newest checkpoints (0: none)."""
        self.wait()
        state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self._pending = self._thread.submit(_write, state, paths, keep)

    def wait(self):
        """Wait until everything submitted is on disk; raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write(state, paths, keep):
    for path in paths:
        write_checkpoint(path, state)
    if keep > 0:
        for path in list(numbered_checkpoints(paths[0].parent).values())[:-keep]:
            path.unlink(missing_ok=True)


def due_paths(folder, step, ended, stopped, options):
    """Return the files that the state after `step` updates of the run in `folder` is due to be written to.

    checkpoint_k is due after update k·snapshot_freq, the first being update 0 (its state says k·snapshot_freq + 1
    updates); the last state of a run gets the next number. STATE, never older than the others, comes last.
    """
    frequency, meta = options.snapshot_freq, options.snapshot_freq_for_preemption
    number, rest = divmod(step - 1, frequency)
    numbers = {number} if rest == 0 and number else set()
    numbers |= {last_number(step, frequency)} if ended else set()
    paths = [checkpoint_path(folder, k) for k in sorted(numbers)]
    return [*paths, folder / STATE] if paths or stopped or (step > 1 and (step - 1) % meta == 0) else []


def describe_changes(before, config):
    """Return a phrase for each field that differs between two configs and affects the result of training."""
    values = {name: (get_field(before, name), get_field(config, name)) for name in FIELDS if name not in FREE_FIELDS}
    return [f"{name} ({there!r} there, {here!r} here)" for name, (there, here) in values.items()
            if os.path.normpath(str(there)) != os.path.normpath(str(here))]  # a/ and ./a are one path


def check_same_run(config, path):
    """Return a phrase for each field that changed since the last start in `path`, or UserError if it must not."""
    if not (path / CONFIG).exists():
        return []
    changed = describe_changes(load_config(path / CONFIG), config)
    if refused := ", ".join(phrase for phrase in changed if not phrase.startswith(REPORTED_FIELDS)):
        raise UserError(f"{path} holds a run with another config: {refused}; choose another --config.expr (with "
                        f"--config.training.resume_from {path} it continues from this run's last state), or remove it")
    return changed


def find_state(config, say):
    """Return the newest state of this run, else of training.resume_from (of the same optimizer); None for a new run.

    say: receives messages about unreadable files, and about fields that differ in the other run.
    """
    state, other = read_newest_state(run_path(config), say), config.training.resume_from
    if state is not None or not other:
        return state
    state = read_newest_state(other, say)
    if state is None:
        raise UserError(f"config.training.resume_from {other} has no checkpoint in checkpoints-meta/ or checkpoints/: "
                        "name the folder of a run")
    if "config" in state:
        before = config_from_dict(state["config"], state["path"])
        if before.optim.optimizer != config.optim.optimizer:
            raise UserError(f"config.training.resume_from {other} was trained with config.optim.optimizer "
                            f"{before.optim.optimizer}, whose moments {config.optim.optimizer} cannot use: "
                            "use that optimizer, or start from its weights with config.flow.pre_train_model")
        if changed := describe_changes(before, config):
            say(f"fields that differ from {other}: {', '.join(changed)}")
    return state


def read_newest_state(folder, say=print):
    """Return the newest readable state in a run's folder, None if there are no files at all.

    It is STATE or the newest numbered checkpoint: either may be missing, or older if the run was killed in between.
    """
    folder = pathlib.Path(folder)
    numbered = list(numbered_checkpoints(folder / CHECKPOINTS).values())[::-1]
    newest, broken = None, []
    for path in filter(pathlib.Path.exists, [folder / STATE, *numbered]):
        try:
            state = read_state(path)
        except UserError as error:
            broken.append(str(error))
            continue
        if newest is None or state["step"] > newest["step"]:
            newest = state
        if path != folder / STATE:
            break
    if broken and newest is None:
        raise UserError(f"no checkpoint of {folder} can be read: {broken[0]}")
    for reason in broken:
        say(f"skipped a damaged checkpoint: {reason}; continuing from {newest['path']}")
    return newest


def read_state(path):
    """Return the checkpoint at `path`; raise UserError unless a training can be continued from it."""
    state = in_our_layout(read_checkpoint(path))
    optimizer = state.get("optimizer")
    moments_of = optimizer.get("state", {}) if isinstance(optimizer, dict) else None
    if not isinstance(state.get("step"), int) or not isinstance(moments_of, dict):
        raise UserError(f"{path} cannot be continued: it lacks the number of updates or the optimizer's state")
    shadow = state["ema"]["shadow_params"]
    for number, moments in moments_of.items():
        expected = shadow[number].shape if number in range(len(shadow)) else None
        for name in ("exp_avg", "exp_avg_sq"):  # fused kernels would read beyond the end of shorter ones
            moment = moments.get(name) if isinstance(moments, dict) else None
            if not isinstance(moment, torch.Tensor) or moment.shape != expected:
                raise UserError(f"{path} is damaged: its optimizer's {name} of parameter {number} has another shape")
    return state


def restore(state, network, ema, optimizer, stats):
    """Put a checkpoint's weights, EMA, moments and counters in place; the optimizer's options stay this run's."""
    try:
        network.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        own = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({
            "state": state["optimizer"]["state"],
            "param_groups": [{**ours, "params": theirs["params"]} for ours, theirs in
                             zip(own, state["optimizer"]["param_groups"], strict=True)]})
        for parameter, moments in optimizer.state.items():
            for name, value in moments.items():
                if name == "step":  # fused kernels want it on the device, and moments in the parameter's memory layout
                    moments[name] = torch.as_tensor(value, dtype=torch.float32).to(parameter.device)
                else:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if "stats" in state:  # not in the released layout
            stats.load_state(state["stats"]["values"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint does not fit config.model and config.optim: {reason}") from None


def take_pair_fields(config, given):
    """Set data.* and the noise scale, unless given, to those of data.reflow_data_root's pairs; return remarks."""
    root, fields = config.data.reflow_data_root, ("data.", "sampling.init_noise_scale")
    for folder in open_folders(root) if root else ():
        if folder.metadata:  # not for pairs without pairs.json
            path, saved = folder.path / METADATA, folder.metadata.get("config", {})
            return [f"{path}: {remark}" for remark in take_run_fields(config, saved, given, path, fields)]
    return []


def take_architecture(config, given):
    """Return (config, messages), the config with flow.pre_train_model's architecture, unless with pre_train_partial.

    An existing run keeps its own. Raises UserError, naming the fields, where a flag of `given` contradicts it.
    """
    path, saved = config.flow.pre_train_model, run_path(config) / CONFIG
    if not path or config.flow.pre_train_partial:
        return config, []
    source = ({"model": {}, "fields": saved_fields(config_to_dict(load_config(saved)), saved), "path": saved}
              if saved.exists() else read_checkpoint(path))
    try:
        adapted = apply_architecture(config, source, given)
    except UserError as error:
        raise UserError(f"config.flow.pre_train_model {error}; to start from the tensors that fit, set "
                        "config.flow.pre_train_partial") from None
    changed = describe_changes(adapted, config)
    return adapted, [f"the architecture is that of {path}: {', '.join(changed)}"] if changed else []


def load_pretrained(network, config):
    """Copy flow.pre_train_model's raw weights, with pre_train_partial those that fit; return messages about it."""
    path = config.flow.pre_train_model
    if not path:
        return []
    matched, unmatched = load_matching(network, path)
    if not matched or (unmatched and not config.flow.pre_train_partial):
        raise UserError(f"config.flow.pre_train_model {path}: only {len(matched)} of {len(matched) + len(unmatched)} "
                        "tensors fit this network; to start from these, set config.flow.pre_train_partial")
    left = f" ({', '.join(unmatched[:4])}{', …' * (len(unmatched) > 4)})" if unmatched else ""
    return [f"started from {path}: {len(matched)} tensors matched, {len(unmatched)} did not{left}"]


def load_teacher(config, device):
    """Return the frozen teacher (EMA weights, eval mode) for this run's images and classes; None without one."""
    if not config.flow.use_teacher:
        return None
    path = config.flow.teacher_model or config.flow.pre_train_model
    data = {f"data.{name}": config.data[name] for name in ("image_size", "num_channels", "num_classes")}
    return load_model(path, use_ema=True, device=device, fields=data).requires_grad_(False)
