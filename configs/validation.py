"""What a config may not say: values outside their choices, and fields that contradict each other."""

import difflib
import math
import re

import torch

from configs.default import field_names, find_field, get_field
from datasets.sources import DATASETS
from runtime.errors import UserError

NUMBER, WHOLE = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", r"[1-9]\d*"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a tuple of numbers", str: "text"}
LONGEST_NAME = 255  # bytes, of the usual file systems


def check_fields(config):
    """Raise UserError for the first field whose value has the wrong type or is outside its choices or range."""
    for name in field_names():
        check_field(name, get_field(config, name))


def check_field(name, value):
    """Raise UserError unless `value` is one that the field with the dotted `name` takes."""
    check_value(f"config.{name}", find_field(name), value)


def check_value(name, field, value):
    """Raise UserError, in which `name` stands, unless `value` has the `Field`'s type and is in its choices or range."""
    kind = type(field.default)
    right = is_number(value) if kind is float else isinstance(value, kind) and (kind is not int or is_number(value))
    if not right or kind is tuple and not all(map(is_number, value)):
        raise UserError(f"{name} must be {KINDS[kind]}, not {value!r}")
    if kind in (int, float):
        if not math.isfinite(value):
            raise UserError(f"{name} must be finite, not {value!r}")
        if field.low is not None and value < field.low:
            raise UserError(f"{name} must be at least {field.low:g}, not {value!r}")
        if field.high is not None and value > field.high:
            raise UserError(f"{name} must be at most {field.high:g}, not {value!r}")
    choices = [str(c) for c in field.choices]
    patterns = [re.escape(c).replace("<number>", NUMBER).replace("<int>", WHOLE) for c in choices]
    if choices and not any(re.fullmatch(pattern, str(value)) for pattern in patterns):
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}"
                        + (f"; did you mean {near[0]}?" if near else ""))


def is_number(value):
    """Whether a value is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_training(config):
    """Raise UserError for what cannot be trained: a bad name, fields that make no network or contradict each other."""
    from flows.objective import check_config
    from models import create_model

    if not config.expr.strip():
        raise UserError("config.expr is empty: name the run, for instance --config.expr 1_rectified_flow")
    parts = config.expr.split("/")
    if config.expr.startswith("/") or ".." in parts:
        raise UserError(f"config.expr {config.expr!r} must be a name inside config.work_dir, not a path that leaves it")
    if max(len(part.encode()) for part in parts) > LONGEST_NAME:
        raise UserError(f"config.expr is too long for the name of a folder: at most {LONGEST_NAME} bytes")
    channels = DATASETS[config.data.dataset].channels
    if channels is not None and config.data.num_channels != channels:
        raise UserError(f"config.data.num_channels is {config.data.num_channels}, but {config.data.dataset} has "
                        f"{channels}")
    with torch.device("meta"):
        create_model(config)
    check_config(config)
