"""The command line that every script shares: `--config FILE`, `--config.a.b value`, the script's own flags.

ml_collections' config_flags reads it, with the types that the fields of the config have. A mistake ends the script
with one sentence on stderr and status 2, before any file is written.
"""

import argparse
import ast
import difflib
import importlib.util
import json
import pathlib
import re
import shutil
import sys
import textwrap

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs.default import FIELDS, field_names, find_field, get_default_config, get_field, set_field
from configs.validation import check_fields, check_value
from datasets.sources import DATASETS
from runtime.errors import UserError, one_sentence
from runtime.files import write_json


class CommonFlags(argparse.ArgumentParser):
    """The flags that are no fields: --config, --help [GROUP], --print_config."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")
        self.add_argument("--print_config", action="store_true")
        self.add_argument("--help", "-h", "--helpfull", "--helpshort", nargs="?", const="")

    def error(self, message):
        """Raise UserError where argparse would print its usage."""
        raise UserError(message)


class FieldParser(flags.ArgumentParser):
    """Reads the value of a field whose type absl's own parsers read too narrowly, or refuse in two sentences.

    Whole numbers are written 2000 or 2e3, tuples '1, 2', (1, 2), [1, 2] or 1; the last of several flags counts.
    """

    def __init__(self, kind):
        """kind: bool, int or tuple."""
        self.kind = kind

    def parse(self, argument):
        """Return the value; raise ValueError with what is needed."""
        if isinstance(argument, self.kind):
            return argument
        try:
            if self.kind is bool:
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[argument.lower()]
            if self.kind is tuple:
                value = ast.literal_eval(argument.strip() or "()")
                return tuple(value) if isinstance(value, (tuple, list)) else (value,)
            return int(argument) if "e" not in argument.lower() or float(argument) % 1 else int(float(argument))
        except (KeyError, ValueError, SyntaxError, OverflowError):
            needed = {bool: "true or false", int: "a whole number", tuple: "numbers such as '1, 2, 2'"}[self.kind]
            raise ValueError(f"this takes {needed}") from None


PARSERS = {kind: FieldParser(kind) for kind in (bool, int, tuple)}
PARSERS |= {str: flags.ArgumentParser(), float: flags.FloatParser()}
for kind in (bool, int, tuple):
    config_flags.register_flag_parser_for_type(kind, PARSERS[kind])


def run_script(main, doc, script_flags=None):
    """Parse the command line and call `main(config, args, given)`; exit 2 with one sentence on a `UserError`.

    script_flags: {name: `Field`} of the script's own flags; args has their values as attributes. config: the
    validated `ml_collections.ConfigDict`. given: frozenset of the config fields ("sampling.sample_N") and flags
    that stood on the command line. With --help and --print_config, `main` is not called.
    """
    with one_sentence(pathlib.Path(sys.argv[0]).name):
        parsed = parse_command_line(sys.argv, doc, script_flags)
        sys.exit(parsed and main(*parsed))


def run_program(main, doc, program_flags):
    """As `run_script`, of a program without a config: call `main(args)`."""
    with one_sentence(pathlib.Path(sys.argv[0]).name):
        if CommonFlags().parse_known_args()[0].help is not None:
            sys.exit(print(help_text(doc, program_flags, groups=())))
        sys.exit(main(parse_flags(sys.argv[1:], program_flags)))


def parse_command_line(argv, doc="", script_flags=None):
    """Return (config, args, given) of the words `argv` (the first is the script); see `run_script`.

    Returns None after --help [GROUP] and --print_config, which print. Raises UserError for an unknown field or flag,
    a value of the wrong type or outside its choices, a missing config file, and leftover words.
    """
    common, words = CommonFlags().parse_known_args(argv[1:])
    path = common.config
    if common.help is not None:
        groups = help_groups(common.help)
        print(help_text(doc, script_flags or {}, groups, load_config(path) if path else None))
        return None
    for word in words:
        if re.match("--?(no)?config[.]", word):
            require_field(word.partition(".")[2].partition("=")[0])
    if path is None:
        raise UserError("no config: name one with --config, for instance "
                        "--config configs/rectified_flow/cifar10_rf_gaussian.py")
    config = load_config(path)
    args = parse_flags(words, script_flags or {}, config)
    given = set(args["config"].override_values)
    if not path.endswith(".json"):
        _follow_defaults(config, given)
    check_fields(config)
    if common.print_config:
        print(json.dumps(config_to_dict(config), indent=2))
        return None
    return config, args, frozenset(given | {name for name in script_flags or () if args[name].present})


def _follow_defaults(config, given):
    """Set the two defaults that depend on other fields, unless they were given."""
    dropout = find_field("model.dropout").default
    if config.model.name == "DhariwalUNet" and "model.dropout" not in given and config.model.dropout == dropout:
        config.model.dropout = 0.13  # what it was trained with
    known = DATASETS.get(config.data.dataset)  # None: refused later
    if known is not None and not known.mirror and "data.random_flip" not in given:
        config.data.random_flip = False  # a mirrored digit is no digit


def parse_flags(words, fields, config=None):
    """Return absl's `FlagValues` of the words, with a flag for each {name: `Field`} and the overrides of a config.

    The config is changed. Raises UserError for what absl does not accept, and for words that belong to no flag.
    """
    values = flags.FlagValues()
    for name, field in fields.items():
        kind = type(field.default)
        flags.DEFINE_flag(flags.Flag(PARSERS[kind], flags.ArgumentSerializer(), name, field.default, field.meaning,
                                     boolean=kind is bool), values)
    words = join_booleans(words, fields)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words, lock_config=False)
        leftover = values(["", *words])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if leftover:
        raise UserError(f"what is {leftover[0]!r} on the command line? Flags are written --name value, and a "
                        "value with spaces goes in quotes")
    for name, field in fields.items():
        check_value(f"--{name}", field, values[name].value)
    return values


def join_booleans(words, fields):
    """Return the words with `--name true` of a boolean as `--name=true`: absl would leave `true` over."""
    joined = []
    for word in words:
        name = joined[-1].lstrip("-") if joined and joined[-1].startswith("-") else ""
        field = fields.get(name) or find_field(name.removeprefix("config."))
        if field is not None and isinstance(field.default, bool) and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def require_field(name):
    """Raise UserError, with the nearest field, unless the config has the dotted field `name`."""
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


def load_config(path):
    """Return the config of a Python file with `get_config()`, or of a config.json that a run saved.

    A Python file may import others beside it. Raises UserError if the file is missing, is no config, or has an
    unknown field.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; the ready ones are in configs/rectified_flow/")
    if path.suffix == ".json":
        try:
            return config_from_dict(json.loads(path.read_text()), path)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path} is not JSON: {error}") from None
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever a config file does wrong is the user's to mend
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config file {path}: get_config() must return an ml_collections.ConfigDict")
    return config_from_dict(config_to_dict(config), path)


def config_from_dict(values, source="config"):
    """Return a full config from nested dictionaries; absent fields keep their defaults.

    Lists stand for tuples (JSON has none), and an integer may stand for text (flow_t_schedule 4) or a float. `source`
    is named in the UserError for an unknown field.
    """
    config = get_default_config()

    def fill(values, prefix, fields):
        if not isinstance(values, dict):
            raise UserError(f"{source}: {prefix.rstrip('.') or 'a config'} must be a group of fields")
        for key, value in values.items():
            if prefix + key == "augment":  # a group that runs before data.use_aug became two flips have saved
                continue
            if isinstance(fields.get(key), dict):
                fill(value, f"{prefix}{key}.", fields[key])
            elif key not in fields:
                raise UserError(f"{source}: {prefix}{key} is not a field{nearest_field(prefix + key)}")
            else:
                if isinstance(fields[key].default, (str, float)) and type(value) is int:
                    value = type(fields[key].default)(value)
                set_field(config, prefix + key, tuple(value) if isinstance(value, list) else value)

    fill(values, "", FIELDS)
    return config


def config_to_dict(config):
    """Return the config as nested dictionaries of plain values, lists for tuples: what JSON can hold."""
    return json.loads(config.to_json())


def save_config(config, path):
    """Write the effective config to `path` (JSON, atomically) so that `load_config` and `--config` read it."""
    write_json(path, config_to_dict(config))


def differences(config):
    """Return one line of text, `model.nf 64 (128)`, …: the fields that differ from their defaults, and these."""
    changed = [(name, get_field(config, name), find_field(name).default) for name in field_names()]
    return ", ".join(f"{name} {value!r} ({default!r})" for name, value, default in changed if value != default)


def help_groups(asked):
    """Return the groups of fields that `--help GROUP` names, all for ""; raise UserError for another name."""
    groups = ["", *(name for name in FIELDS if isinstance(FIELDS[name], dict))]
    if asked not in groups:
        raise UserError(f"--help {asked}: the groups of fields are {', '.join(groups[1:])}")
    return [asked] if asked else groups


def help_text(doc, script_flags, groups=None, config=None):
    """Return what `--help` prints: the script's purpose, its flags, and the fields of `groups` with their values."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    groups = help_groups("") if groups is None else groups

    def entry(name, field, value):
        return textwrap.fill(f"{name}: {field.describe(value)}", width, initial_indent="  ", subsequent_indent="      ",
                             break_long_words=False, break_on_hyphens=False)

    lines = [doc.strip(), "", "flags:"]
    if groups:
        lines += ["  --config FILE: Python config, or a run's config.json (needed)",
                  "  --print_config: print the config that this command line makes, and stop",
                  "  --help GROUP: only the fields of one group"]
    lines += [entry(f"--{name}", field, field.default) for name, field in script_flags.items()]
    config = config or get_default_config()
    for group in groups:
        names = [name for name in field_names() if name.rpartition(".")[0] == group]
        lines += ["", f"config fields{group and ' of '}{group} (--config.NAME value):"]
        lines += [entry(name, find_field(name), get_field(config, name)) for name in names]
    return "\n".join(lines)
