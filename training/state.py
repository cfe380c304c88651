"""The state of a run: what a checkpoint holds, written beside the training thread; where a run's weights come from."""

import concurrent.futures
import os
import pathlib

import torch

from configs.command_line import config_from_dict, config_to_dict, load_config
from models import load_model
from models.checkpoint import (
    apply_architecture,
    load_matching,
    numbered_checkpoints,
    read_checkpoint,
    read_translated,
    saved_fields,
    write_checkpoint,
)
from runtime.errors import UserError
from training.run import describe_changes, run_path

STATE, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


class Writer:
    """Writes checkpoints on a thread of its own, one after the other; a failed write is raised at the next call."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending = None

    def submit(self, state, paths, keep=None):
        """Write `state` (its tensors are copied now) to every path of `paths`; a file called STATE keeps its elder.

        keep: called after the last path is written, e.g. to delete old checkpoints. Raises what the write before
        this one failed with.
        """
        self.wait()
        self._pending = self._thread.submit(_write, copy_to_host(state), paths, keep)

    def wait(self):
        """Wait until everything submitted is on disk; raise what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write(state, paths, keep):
    for path in paths:
        if path.name == STATE and path.exists():
            keep_previous(path)
        write_checkpoint(path, state)
    if keep is not None:
        keep()


def copy_to_host(value):
    """Return a copy on the CPU of every tensor in nested dicts and lists; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_to_host(v) for v in value]
    return value


def keep_previous(path):
    """Let PREVIOUS name the state that is about to be replaced: a second name of the file, no copy."""
    previous = path.with_name(PREVIOUS)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without hard links
        return


def keep_newest(folder, count):
    """Delete all but the `count` newest checkpoint_{k}.pth of `folder` (0: delete none)."""
    if count > 0:
        for path in list(numbered_checkpoints(folder).values())[:-count]:
            path.unlink(missing_ok=True)


def checkpoint_numbers(step, frequency, ended):
    """Return the k whose checkpoint_{k} is due when `step` updates are done: those that the run's files are named by.

    checkpoint_k is due after update k·frequency, the first being update 0 (its state says k·frequency + 1 updates).
    The last state of a run gets the number that comes next, which a longer run writes again in its turn.
    """
    number, rest = divmod(step - 1, frequency)
    regular = [number] if rest == 0 and number else []
    if ended and (not regular or frequency == 1):
        return [*regular, -(-step // frequency)]
    return regular


def find_state(config, say):
    """Return (state, path): the newest state of this run, else of the run that training.resume_from names.

    (None, None) when the run starts anew. `say` is told what was passed over, and what another run had otherwise.
    Raises UserError if resume_from has no state, or one of another optimizer.
    """
    state, path = read_newest_state(run_path(config), say)
    other = config.training.resume_from
    if state is None and other:
        state, path = read_newest_state(other, say)
        if state is None:
            raise UserError(f"config.training.resume_from {other} has no checkpoint in checkpoints-meta/ or "
                            "checkpoints/: name the folder of a run")
        if "config" in state:
            before = config_from_dict(state["config"], path)
            if before.optim.optimizer != config.optim.optimizer:
                raise UserError(f"config.training.resume_from {other} was trained with config.optim.optimizer "
                                f"{before.optim.optimizer}, whose moments {config.optim.optimizer} cannot go on with: "
                                "use that optimizer, or start from its weights with config.flow.pre_train_model")
            changed = describe_changes(before, config)
            if changed:
                say(f"this run goes on otherwise than {other}: {', '.join(changed)}")
    return state, path


def read_newest_state(run, say=print):
    """Return (state, path) of the run folder `run` with the most updates, or (None, None) if it has none.

    Candidates: checkpoints-meta/checkpoint.pth, or the one before it if that is damaged, and checkpoints/ from the
    highest number. A damaged one is passed over, saying so. Raises UserError if there are files but none is readable.
    """
    run = pathlib.Path(run)
    meta = run / "checkpoints-meta"
    best, best_path, reasons = None, None, []
    for candidates in ([meta / STATE, meta / PREVIOUS],
                       list(numbered_checkpoints(run / "checkpoints").values())[::-1]):
        for path in candidates:
            if not path.exists():
                continue
            try:
                state = read_state(path)
            except UserError as error:
                reasons.append(str(error))
                continue
            if best is None or state["step"] > best["step"]:
                best, best_path = state, path
            break
    if reasons and best is None:
        raise UserError(f"no checkpoint of {run} can be read: {reasons[0]}")
    for reason in reasons:
        say(f"passed over a broken checkpoint: {reason}; continuing from {best_path}")
    return best, best_path


def read_state(path):
    """Return the checkpoint at `path`; raise UserError where its entries cannot belong to one training."""
    state = read_translated(path)
    step, optimizer = state.get("step"), state.get("optimizer")
    moments_of = optimizer.get("state", {}) if isinstance(optimizer, dict) else None
    if not isinstance(step, int) or not isinstance(moments_of, dict):
        raise UserError(f"{path} cannot be continued: it lacks the number of updates or the optimizer's state")
    shadow = state["ema"]["shadow_params"]
    for number, moments in moments_of.items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected = shadow[number].shape if number in range(len(shadow)) else None
            if not isinstance(moments.get(name), torch.Tensor) or moments[name].shape != expected:
                raise UserError(f"{path} is damaged: its optimizer's {name} of parameter {number} has not the shape of "
                                "that parameter")
    return state


def restore(state, network, ema, optimizer, stats):
    """Put a checkpoint's weights, EMA, moments and counters in place; the optimizer's options stay this run's.

    Raises UserError if it belongs to another network.
    """
    try:
        network.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        own = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({
            "state": state["optimizer"]["state"],
            "param_groups": [{**ours, "params": theirs["params"]} for ours, theirs in
                             zip(own, state["optimizer"]["param_groups"], strict=True)]})
        match_layout(optimizer)
        counted = state.get("stats", state.get("guard"))  # absent in the released layout
        if counted is not None:
            stats.load_state_dict(counted)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint does not fit config.model and config.optim: {reason}") from None


def match_layout(optimizer):
    """Lay every moment out in memory as its parameter is: fused kernels walk both in the order of memory.

    A checkpoint from another program may hold them contiguous where the network is channels_last. The count of steps
    lives on the parameter's device, as fused kernels want it.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif name == "step":
                moments[name] = torch.as_tensor(value, dtype=torch.float32).to(parameter.device)


def take_architecture(config, given):
    """Return (config, messages): with the architecture of flow.pre_train_model where no model flag is in `given`.

    A run that is there keeps its own. Raises UserError, naming the fields, where a flag contradicts it; nothing
    happens with flow.pre_train_partial.
    """
    path = config.flow.pre_train_model
    if not path or config.flow.pre_train_partial:
        return config, []
    saved = run_path(config) / "config.json"
    if saved.exists():
        fields = saved_fields(config_to_dict(load_config(saved)), saved)
        source = {"model": {}, "fields": fields, "path": saved}
    else:
        source = read_checkpoint(path)
    try:
        adapted = apply_architecture(config, source, given)
    except UserError as error:
        raise UserError(f"config.flow.pre_train_model {error}; to start from the tensors that fit all the same, set "
                        "config.flow.pre_train_partial") from None
    changed = describe_changes(config, adapted)
    return adapted, [f"the architecture is that of {path}: {', '.join(changed)}"] if changed else []


def load_pretrained(network, config):
    """Copy flow.pre_train_model's raw weights into the network; return what to tell about it.

    With flow.pre_train_partial every tensor that fits is copied; otherwise a UserError says that some do not.
    """
    path = config.flow.pre_train_model
    if not path:
        return []
    matched, unmatched = load_matching(network, path)
    if not matched or (unmatched and not config.flow.pre_train_partial):
        raise UserError(f"config.flow.pre_train_model {path}: only {len(matched)} of {len(matched) + len(unmatched)} "
                        "tensors fit this network; to start from these, set config.flow.pre_train_partial")
    message = f"started from {path}: {len(matched)} tensors matched, {len(unmatched)} did not"
    return [message + (f" ({', '.join(unmatched[:4])}{', …' if len(unmatched) > 4 else ''})" if unmatched else "")]


def load_teacher(config, device):
    """Return the frozen teacher (EMA weights, eval mode), or None without flow.use_teacher.

    The teacher is flow.teacher_model, or flow.pre_train_model. Raises UserError if it sees other images or classes.
    """
    if not config.flow.use_teacher:
        return None
    path = config.flow.teacher_model or config.flow.pre_train_model
    teacher = load_model(path, use_ema=True, device=device).requires_grad_(False)
    for name in ("image_size", "num_channels", "num_classes"):
        there, here = teacher.config_fields.get(f"data.{name}"), config.data[name]
        if there is not None and there != here:
            raise UserError(f"the teacher {path} has data.{name} {there}, this run {here}")
    return teacher
