"""What a config may not say: values outside their choices, and fields that contradict each other."""

import difflib
import math
import re

from configs.default import field_names, find_field, get_field
from datasets.sources import DATASETS
from runtime.errors import UserError

NUMBER, WHOLE = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", r"[1-9]\d*"


def check_fields(config):
    """Raise UserError for the first field whose value has the wrong type or is outside its choices or range."""
    for name in field_names():
        check_field(name, get_field(config, name))


def check_field(name, value):
    """Raise UserError if `value` has not the type of the field `name` or is outside its choices or range."""
    field = find_field(name)
    kind = type(field.default)
    right = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"config.{name} must be {_kind_name(kind)}, not {value!r}")
    if kind is tuple and not (value or name == "model.attn_resolutions"):
        raise UserError(f"config.{name} must hold at least one number")
    if kind is tuple and not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in value):
        raise UserError(f"config.{name} must hold positive numbers, not {value!r}")
    if kind is tuple and name != "model.fir_kernel" and not all(isinstance(v, int) for v in value):
        raise UserError(f"config.{name} must hold whole numbers, not {value!r}")
    if kind in (int, float):
        _check_range(name, field, value)
    if field.choices and not _matches(field, value):
        _raise_choices(name, field, value)


def _kind_name(kind):
    return {bool: "true or false", int: "a whole number", float: "a number", tuple: "a tuple of numbers",
            str: "text"}[kind]


def _check_range(name, field, value):
    if not math.isfinite(value):
        raise UserError(f"config.{name} must be finite, not {value!r}")
    if field.low is not None and value < field.low:
        raise UserError(f"config.{name} must be at least {field.low:g}, not {value!r}")
    if field.high is not None and value > field.high:
        raise UserError(f"config.{name} must be at most {field.high:g}, not {value!r}")


def _matches(field, value):
    patterns = [re.escape(str(c)).replace("<number>", NUMBER).replace("<int>", WHOLE) for c in field.choices]
    return any(re.fullmatch(pattern, str(value)) for pattern in patterns)


def _raise_choices(name, field, value):
    choices = [str(c) for c in field.choices]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"config.{name} must be one of {', '.join(choices)}, not {value!r}{hint}")


def check_network(config):
    """Raise UserError if network and images contradict each other.

    Refused: sizes that the levels do not divide, an attention resolution that no level has, channels that the
    data set does not have, an uncentred range.
    """
    size, levels = config.data.image_size, len(config.model.ch_mult)
    if size % 2 ** (levels - 1):
        raise UserError(f"config.data.image_size {size} cannot be halved {levels - 1} times, as the {levels} levels "
                        "of config.model.ch_mult ask")
    sizes = [size >> level for level in range(levels)]
    absent = [r for r in config.model.attn_resolutions if r not in sizes]
    if absent:
        raise UserError(f"config.model.attn_resolutions has {absent[0]}, but the levels of config.model.ch_mult at "
                        f"config.data.image_size {size} have sizes {', '.join(map(str, sizes))}")
    channels = DATASETS[config.data.dataset].channels
    if channels is not None and config.data.num_channels != channels:
        raise UserError(f"config.data.num_channels is {config.data.num_channels}, but {config.data.dataset} has "
                        f"{channels}")
    if config.data.dataset == "custom" and config.data.num_channels not in (1, 3):
        raise UserError(f"config.data.num_channels must be 1 or 3 for custom images, not {config.data.num_channels}")
    if not config.data.centered:
        raise UserError("config.data.centered must be true: images live in [-1, 1]")


def check_training(config):
    """Raise UserError for what cannot be trained: no name, a contradictory objective, network or batch."""
    from flows.objective import check_config

    if not config.expr.strip():
        raise UserError("config.expr is empty: name the run, for instance --config.expr 1_rectified_flow")
    if config.expr.startswith("/") or ".." in config.expr.split("/"):
        raise UserError(f"config.expr {config.expr!r} must be a name inside config.work_dir, not a path that leaves it")
    check_network(config)
    check_config(config)
    steps, batch = config.training.accumulation_steps, config.training.batch_size
    if batch % steps:
        raise UserError(f"config.training.batch_size {batch} is not a multiple of "
                        f"config.training.accumulation_steps {steps}")
