"""The command line that every script shares: `--config FILE`, `--config.a.b value`, the script's own flags.

ml_collections' config_flags parses it, by the types of the config fields. Invalid options end the script with one
sentence on stderr and exit status 2 before any file is written.
"""

import argparse
import ast
import difflib
import json
import os
import pathlib
import re
import runpy
import shutil
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs.default import FIELDS, GROUPS, KINDS, check_fields, get_default_config, get_field, set_field
from datasets.sources import DATASETS
from runtime.files import read_json
from runtime.terminal import UserError, one_sentence, wrap_lines

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class ValueParser(flags.ArgumentParser):
    """Parses a value of the type `kind`: whole numbers as 2000 or 2e3, tuples as '1, 2', (1, 2), [1, 2] or 1."""

    def __init__(self, kind):
        self.kind = kind

    def parse(self, argument):
        """Return the value; raise ValueError, which names the expected type."""
        try:
            if self.kind is str:
                return os.path.expanduser(argument)  # shells leave the ~ of --name=~/folder as it is
            if isinstance(argument, self.kind):
                return argument
            if self.kind is bool:
                return BOOLEANS[argument.lower()]
            if self.kind is tuple:
                value = ast.literal_eval(argument.strip() or "()")
                return tuple(value) if isinstance(value, (tuple, list)) else (value,)
            whole = self.kind is int and "e" in argument.lower() and float(argument).is_integer()
            return self.kind(float(argument) if whole else argument)
        except (KeyError, ValueError, SyntaxError):
            raise ValueError(f"this takes {KINDS[self.kind]}") from None


for kind in KINDS:
    config_flags.register_flag_parser_for_type(kind, ValueParser(kind))


def run_script(main, doc, script_flags=None, reads=()):
    """Parse the command line and call `main(config, args, given)`; exit with status 2 and a sentence on a `UserError`.

    script_flags: {name: `Field`} of the script's own flags; `args` has their values as attributes. given: frozenset of
    the config fields ("sampling.sample_N") and flags on the command line. reads: prefixes of the names of the fields
    that --help marks as read by this script.
    """
    with one_sentence(pathlib.Path(sys.argv[0]).name):
        parsed = parse_command_line(sys.argv, doc, script_flags, reads)
        sys.exit(parsed and main(*parsed))


def run_program(main, doc, program_flags, positional=()):
    """As `run_script` without a config: call `main(args)`. positional: flags that may be given without their names."""
    with one_sentence(pathlib.Path(sys.argv[0]).name):
        if parse_common(sys.argv[1:])[0].help is not None:
            sys.exit(print(help_text(doc, program_flags, groups=())))
        sys.exit(main(parse_flags(sys.argv[1:], program_flags, positional=positional)))


def parse_command_line(argv, doc="", script_flags=None, reads=()):
    """Return (config, args, given) of `argv`, the script first (see `run_script`); None after --help, --print_config.

    Raises UserError for an unknown field or flag, an invalid value, a missing config file or an unexpected argument.
    """
    common, arguments = parse_common(argv[1:])
    script_flags = script_flags or {}
    if common.help is not None:
        if common.help not in GROUPS:
            raise UserError(f"--help {common.help}: the groups of fields are {', '.join(filter(None, GROUPS))}")
        print(help_text(doc, script_flags, [common.help] if common.help else GROUPS,
                        common.config and load_config(common.config), reads))
        return None
    for argument in arguments:
        if re.match("--?(no)?config[.]", argument):
            require_field(argument.partition(".")[2].partition("=")[0])
    if common.config is None:
        raise UserError("no config: name one with --config, such as configs/rectified_flow/cifar10_rf_gaussian.py")
    config = load_config(common.config)
    args = parse_flags(arguments, script_flags, config)
    given = set(args["config"].override_values)
    if not common.config.endswith(".json"):
        _follow_defaults(config, given)
    check_fields(config)
    if common.print_config:
        print(json.dumps(config_to_dict(config), indent=2))
        return None
    return config, args, frozenset(given | {name for name in script_flags if args[name].present})


def parse_common(arguments):
    """Return (the flags that every script has: config, help, print_config; the other arguments)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--help", "-h", "--helpfull", "--helpshort", nargs="?", const="")
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _follow_defaults(config, given):
    """Set the two defaults that depend on other fields, unless they were given."""
    untouched = "model.dropout" not in given and config.model.dropout == FIELDS["model.dropout"].default
    if config.model.name == "DhariwalUNet" and untouched:
        config.model.dropout = 0.13  # as the paper's was trained
    known = DATASETS.get(config.data.dataset)  # None: check_fields refuses it
    if known is not None and not known.mirror and "data.random_flip" not in given:
        config.data.random_flip = False  # a mirrored digit is not a digit


def parse_flags(arguments, fields, config=None, positional=()):
    """Return absl's `FlagValues` of the arguments, a flag for each {name: `Field`}; override `config` in place."""
    values = flags.FlagValues()
    for name, field in fields.items():
        kind = type(field.default)
        flags.DEFINE_flag(flags.Flag(ValueParser(kind), flags.ArgumentSerializer(), name, field.default, field.meaning,
                                     boolean=kind is bool), values)
    arguments = join_booleans(arguments, fields, any_value=not positional)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments,
                                            lock_config=False)
        leftover = values(["", *arguments])[1:]
        for name in positional[: len(leftover)]:
            values[name].parse(leftover.pop(0))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, fields, 1)
        if not near and config is not None:
            near = [f"config.{name}" for name in nearest_fields(error.flagname)]
        raise UserError(f"--{error.flagname} is not a flag{did_you_mean(near, '--')}") from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if leftover:
        raise UserError(f"unexpected argument {leftover[0]!r}: flags are written --name value, and values with spaces "
                        "in quotes")
    for name, field in fields.items():
        field.check(f"--{name}", values[name].value)
    return values


def join_booleans(arguments, fields, any_value=True):
    """Return the arguments with `--name true` of a boolean as `--name=true`, for absl; any_value: invalid ones, too."""
    joined = [""]
    for argument in arguments:
        name = joined[-1].lstrip("-")
        field = fields.get(name) or FIELDS.get(name.removeprefix("config."))
        value = argument.lower() in BOOLEANS or (any_value and not argument.startswith("-"))
        if field is not None and isinstance(field.default, bool) and value:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined[1:]


def require_field(name, source="config"):
    """Raise UserError, naming the nearest field, unless the config has the dotted field `name`."""
    if name in GROUPS:
        raise UserError(f"{source}.{name} is a group of fields: set one of them, for instance "
                        f"--config.{name}.{next(iter(GROUPS[name]))}")
    if name not in FIELDS:
        raise UserError(f"{source}.{name} is not a field{did_you_mean(nearest_fields(name), 'config.')}")


def nearest_fields(name):
    """Return the dotted fields nearest to an unknown `name`: one, several that are equally near, or none."""
    def ratio(field, part):
        return difflib.SequenceMatcher(None, name.rpartition(".")[part], field.rpartition(".")[part]).ratio()

    scores = {field: (ratio(field, 2) == 1, ratio(field, 2) + ratio(field, 0)) for field in FIELDS
              if ratio(field, 2) >= 0.6}
    return difflib.get_close_matches(name, FIELDS, 1, 0.9) or [f for f in scores if scores[f] == max(scores.values())]


def did_you_mean(names, prefix):
    """Return the end of a sentence about a name that does not exist: empty without `names`."""
    return f"; did you mean {' or '.join(prefix + name for name in names)}?" if names else ""


def load_config(path):
    """Return the config of a Python file with `get_config()`, or of a config.json that a run saved.

    A Python file may import others beside it. Raises UserError if it is missing, fails, or has an unknown field.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist; ready ones are in configs/rectified_flow/")
    if path.suffix == ".json":
        return config_from_dict(read_json(path), path)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        config = runpy.run_path(str(path)).get("get_config", dict)()
    except Exception as error:  # of the user's own code, so any type
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config file {path} needs a function get_config() that returns an ml_collections.ConfigDict")
    return config_from_dict(config_to_dict(config), path)


def config_from_dict(values, source="config"):
    """Return a full config from nested dictionaries; absent fields keep their defaults.

    Lists become tuples (JSON has none); integers become text (flow_t_schedule 4) or floats where the field is one.
    """
    config = get_default_config()
    for group, members in values.items():
        for key, value in members.items() if isinstance(members, dict) else [("", members)]:
            name = f"{group}.{key}".rstrip(".")
            require_field(name, f"{source}: config")
            kind = type(FIELDS[name].default)
            if isinstance(value, list) or (kind in (str, float) and type(value) is int):
                value = tuple(value) if isinstance(value, list) else kind(value)
            value = os.path.expanduser(value) if isinstance(value, str) else value
            set_field(config, name, value)
    return config


def config_to_dict(config):
    """Return the config as nested dictionaries of plain values, lists for tuples: what JSON can hold."""
    return json.loads(config.to_json())


def differences(config):
    """Return the fields that differ from their defaults as one line: `model.nf 64 (128), …`, defaults in brackets."""
    return ", ".join(f"{name} {get_field(config, name)!r} ({field.default!r})" for name, field in FIELDS.items()
                     if get_field(config, name) != field.default)


def help_text(doc, script_flags, groups=GROUPS, config=None, reads=()):
    """Return the text of `--help`: the script's purpose, its flags, and the fields of `groups` with their values."""
    config, lines = config or get_default_config(), ["flags:"]
    if groups:
        lines += ["  --config FILE: Python config file, or a run's config.json (required)",
                  "  --print_config: print the resulting config and exit",
                  "  --help GROUP: show the fields of one group only"]
    lines += [f"  --{name}: {field.describe(field.default)}" for name, field in script_flags.items()]
    for group in groups:
        marked = "; *: read by this script" if reads else ""
        lines += ["", f"config fields{group and ' of '}{group} (--config.NAME value{marked}):"]
        for name in (f"{group}.{name}".lstrip(".") for name in GROUPS[group]):
            lines.append(f"  {'* ' * name.startswith(reads)}{name}: "
                         f"{FIELDS[name].describe(get_field(config, name))}")
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    paragraphs = re.sub(r"^(\S.*)\n(?=\S)", r"\1 ", doc.strip(), flags=re.MULTILINE).splitlines()
    purpose = [line if line.startswith("    ") else wrap_lines(line, width, hanging=0) for line in paragraphs]
    return "\n".join([*purpose, "", wrap_lines("\n".join(lines), width)])  # commands stay whole, to be copied
