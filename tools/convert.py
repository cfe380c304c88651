"""Rewrite a checkpoint in the other layout: the released SlimFlow one becomes ours, ours becomes the released one.

    python -m tools.convert logs/1_rectified_flow/checkpoints/checkpoint_14.pth released_14.pth
    python -m tools.convert released.pth ours.pth --config my_config.py

Weights, EMA, Adam's moments and step are kept to the last bit. No script needs this: all of them read both layouts.
It is for programs that know the released layout only, and for reading a released file's parameters under our names.
"""

import argparse
import sys

from configs.command_line import load_config
from models.checkpoint import architecture, in_our_layout, model_fields, read_checkpoint, write_checkpoint
from models.create import create_from_fields
from models.released import is_released, to_released
from runtime.errors import UserError


def main(words=None):
    """Convert what the words name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint, ours or released; hf://owner/repo/file, too")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--config", help="config file with the architecture, of a file that does not tell it")
    args = parser.parse_args(words)
    try:
        layout = convert(args.source, args.target, model_fields(load_config(args.config)) if args.config else {})
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {layout} layout")
    return 0


def convert(source, target, configured):
    """Write the checkpoint `source` to `target` in the other layout; return the name of that layout.

    configured: dotted config fields of the architecture, for a file that does not tell it.
    """
    checkpoint = read_checkpoint(source)
    fields = architecture(checkpoint, {}, configured)
    net = create_from_fields(fields)
    if is_released(checkpoint["model"]):
        written = in_our_layout(checkpoint, net)
        written.setdefault("config", nested_config(fields))
        layout = "our"
    else:
        written, layout = to_released(checkpoint, net), "released"
    write_checkpoint(target, {key: value for key, value in written.items() if key not in ("fields", "digest", "path")})
    return layout


def nested_config(fields):
    """Return dotted fields as the nested dict that a checkpoint holds; what is unknown, the data set too, is absent."""
    groups = {}
    for name, value in fields.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return groups


if __name__ == "__main__":
    sys.exit(main())
