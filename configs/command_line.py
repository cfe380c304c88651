"""The command line that every script shares: `--config FILE`, `--config.a.b value`, the script's own flags.

A mistake ends the script with one sentence on stderr and status 2, before anything is created.
"""

import ast
import difflib
import importlib.util
import json
import pathlib
import sys

import ml_collections
from absl import flags

from configs.default import FIELDS, Field, field_names, find_field, get_default_config, set_field
from configs.validation import check_fields
from datasets.sources import DATASETS
from runtime.errors import UserError, one_sentence
from runtime.files import write_json

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def run_script(main, doc, script_flags=None):
    """Parse the command line and call `main(config, args, given)`; exit 2 with one sentence on a `UserError`.

    script_flags: {name: `Field`} of the script's own flags; args holds their values. config: the validated
    `ml_collections.ConfigDict`. given: frozenset of
    the config fields ("sampling.sample_N") and flag names that stood on the command line.
    """
    _run(main, lambda: parse_command_line(sys.argv, doc, script_flags))


def run_program(main, doc, program_flags):
    """As `run_script`, of a program without a config: call `main(args)`."""

    def parse():
        if asks_for_help(sys.argv):
            print("\n".join([doc.strip(), "", "flags:", *flag_lines(program_flags)]))
            return None
        args = define_flags(program_flags)
        _parse_flags(args, sys.argv)
        return (args,)

    _run(main, parse)


def _run(main, parse):
    with one_sentence(pathlib.Path(sys.argv[0]).name):
        parsed = parse()
        if parsed is not None:
            sys.exit(main(*parsed))


def parse_command_line(argv, doc="", script_flags=None):
    """Return (config, args, given) of the words `argv` (the first is the script), or None after `--help`.

    Raises UserError for an unknown field or flag, a value of the wrong type or outside its choices, a missing
    config file, and leftover words.
    """
    if asks_for_help(argv):
        print(help_text(doc, script_flags or {}))
        return None
    args = define_flags(script_flags or {})
    path, overrides, rest = _split_words(argv[1:], args)
    _parse_flags(args, [argv[0], *rest])
    if path is None:
        raise UserError("no config: name one with --config, for instance "
                        "--config configs/rectified_flow/cifar10_rf_gaussian.py")
    config = load_config(path)
    for name, text in overrides.items():
        set_field(config, name, parse_value(name, text))
    if config.model.name == "DhariwalUNet" and "model.dropout" not in overrides and not path.endswith(".json"):
        _use_dhariwal_dropout(config)
    if "data.random_flip" not in overrides and not path.endswith(".json"):
        # A mirrored digit is no digit. An unknown data set is refused below.
        known = DATASETS.get(config.data.dataset)
        config.data.random_flip = config.data.random_flip and (known is None or known.mirror)
    check_fields(config)
    given = set(overrides) | {name for name in args if args[name].present}
    return config, args, frozenset(given)


def _use_dhariwal_dropout(config):
    """Give DhariwalUNet the dropout it was trained with when nobody chose another than the default."""
    if config.model.dropout == find_field("model.dropout").default:
        config.model.dropout = 0.13


def _split_words(words, args):
    """Return the config path, {field: text} of its overrides and the words that belong to the script's flags."""
    path, overrides, rest = None, {}, []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-") or not (name == "config" or name.startswith("config.")):
            rest.append(_join_boolean(word, words, args))
            continue
        if not equals:
            text = _next_value(name, words)
        if name == "config":
            path = text
        else:
            field = name.removeprefix("config.")
            _require_field(field)
            overrides[field] = text
    return path, overrides, rest


def _next_value(name, words):
    """Take the value that follows the flag `name`; a boolean field may stand alone and is then true."""
    if words and not words[0].startswith("--"):
        return words.pop(0)
    field = find_field(name.removeprefix("config."))
    if field is not None and (isinstance(field.default, bool) or "true" in field.choices):
        return "true"
    if name != "config":
        _require_field(name.removeprefix("config."))
    raise UserError(f"--{name} needs a value")


def _join_boolean(word, words, args):
    """Let `--use_ema false` mean `--use_ema=false` (absl would read true and leave `false` behind)."""
    name = word.lstrip("-")
    if (word.startswith("-") and name in args and args[name].flag_type() == "bool"
            and words and not words[0].startswith("-")):
        value = words.pop(0)
        if value.lower() not in BOOLEANS:
            raise UserError(f"--{name} is true or false, not {value!r}")
        return f"--{name}={value}"
    return word


def define_flags(fields):
    """Return absl's `FlagValues` with a flag for each {name: `Field`}."""
    values = flags.FlagValues()
    for name, field in fields.items():
        if isinstance(field.default, bool):
            flags.DEFINE_bool(name, field.default, field.meaning, flag_values=values)
        elif isinstance(field.default, int):
            flags.DEFINE_integer(name, field.default, field.meaning, field.low, field.high, flag_values=values)
        else:
            flags.DEFINE_string(name, field.default, field.meaning, flag_values=values)
    return values


def _parse_flags(args, words):
    try:
        leftover = args(words)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if leftover:
        raise UserError(f"what is {leftover[0]!r} on the command line? Flags are written --name value, and a "
                        "value with spaces goes in quotes")


def _require_field(name):
    if find_field(name) is not None:
        return
    members = [other for other in field_names() if other.startswith(name + ".")]
    if members:
        raise UserError(f"config.{name} is a group of fields: set one of them, for instance --config.{members[0]}")
    raise UserError(f"config.{name} is not a field{nearest_field(name)}")


def nearest_field(name):
    """Return "; did you mean config.X?" for the field nearest to a misspelt `name`, or "" when none is near.

    The right name in the wrong group ("training.lr") is nearest.
    """
    ends = {other.rpartition(".")[2]: other for other in field_names()}
    last = name.rpartition(".")[2]
    found = [ends[last]] if last in ends else difflib.get_close_matches(name, field_names(), n=1, cutoff=0.6)
    if not found:
        found = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.7)]
    return f"; did you mean config.{found[0]}?" if found else ""


def parse_value(name, text):
    """Return `text` as a value of the type of the field `name`; raise UserError when it is none."""
    default = find_field(name).default
    try:
        if isinstance(default, bool):
            return BOOLEANS[text.strip().lower()]
        if isinstance(default, int):
            number = float(text)
            return int(text) if number != int(number) or "e" not in text.lower() else int(number)
        if isinstance(default, float):
            return float(text)
        if isinstance(default, tuple):
            value = ast.literal_eval(text.strip() or "()")
            return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    except (KeyError, ValueError, SyntaxError, TypeError, OverflowError):
        kind = {bool: "true or false", int: "a whole number", float: "a number", tuple: "numbers such as '1, 2, 2'"}
        raise UserError(f"config.{name} is {kind[type(default)]}, not {text!r}") from None
    return text


def load_config(path):
    """Return the config of a Python file with `get_config()`, or of a config.json that a run saved.

    Raises UserError if the file is missing, is no config, or has an unknown field.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the ready ones are in configs/rectified_flow/")
    if path.suffix == ".json":
        try:
            return config_from_dict(json.loads(path.read_text()), path)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path} is not JSON: {error}") from None
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever a config file does wrong is the user's to mend
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config file {path}: get_config() must return an ml_collections.ConfigDict")
    return config_from_dict(config_to_dict(config), path)


def config_from_dict(values, source="config"):
    """Return a full config from nested dictionaries; absent fields keep their defaults.

    `source` is named in the UserError for an unknown field.
    """
    config = get_default_config()

    def fill(values, prefix):
        if not isinstance(values, dict):
            raise UserError(f"{source}: {prefix.rstrip('.') or 'a config'} must be a group of fields")
        for key, value in values.items():
            name = prefix + key
            if name == "augment":  # a group of fields that runs before data.use_aug became two flips have saved
                continue
            if isinstance(value, dict) and isinstance(_group(name), dict):
                fill(value, name + ".")
            elif find_field(name) is None:
                raise UserError(f"{source}: {name} is not a field{nearest_field(name)}")
            else:
                set_field(config, name, _as_field_type(name, value))

    fill(values, "")
    return config


def _as_field_type(name, value):
    """Lists stand for tuples (JSON has none), and flow_t_schedule may be an integer in a Python config."""
    if isinstance(value, list):
        return tuple(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number and isinstance(find_field(name).default, str) else value


def _group(name):
    found = FIELDS
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def config_to_dict(config):
    """Return the config as nested dictionaries of plain values, lists for tuples: what JSON can hold."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config.to_dict())


def save_config(config, path):
    """Write the effective config to `path` (JSON, atomically) so that `load_config` and `--config` read it."""
    write_json(path, config_to_dict(config))


def asks_for_help(argv):
    """Whether the words ask for help."""
    return any(word in ("--help", "-h", "--helpfull", "--helpshort") for word in argv[1:])


def flag_lines(script_flags):
    """Return what `--help` says of {name: `Field`}, a line each."""
    return [f"  --{name}: {describe_field(field)}" for name, field in script_flags.items()]


def help_text(doc, script_flags):
    """Return what `--help` prints: the script's purpose, its own flags and every field of the config."""
    lines = [doc.strip(), "", "flags:", "  --config FILE: Python config or a run's config.json (needed)"]
    lines += flag_lines(script_flags)
    lines += ["", "config fields (--config.NAME value):"]
    lines += [f"  {name}: {describe_field(find_field(name))}" for name in field_names()]
    return "\n".join(lines)


def describe_field(field: Field):
    """Return one line for people: meaning, choices, range and default of a field."""
    text = field.meaning + (f"; one of {' | '.join(map(str, field.choices))}" if field.choices else "")
    if field.low is not None and field.high is not None:
        text += f"; from {field.low:g} to {field.high:g}"
    elif field.low is not None:
        text += f"; at least {field.low:g}"
    return f"{text} (default: {field.default!r})"
