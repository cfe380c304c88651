"""Rewrite a checkpoint in the other layout: the released SlimFlow one becomes ours, ours becomes the released one.

    python -m tools.convert logs/1_rectified_flow/checkpoints/checkpoint_14.pth released_14.pth
    python -m tools.convert released.pth ours.pth --image_size 64

Weights, EMA, Adam's moments and step are kept to the last bit. No script needs this: all of them read both layouts.
It is for programs that know the released layout only, and for reading a released file's parameters under our names.
"""

import argparse
import sys

from models.checkpoint import complete_fields, load_safely, read_checkpoint, write_checkpoint
from models.create import create_from_fields
from models.infer import is_released
from models.released import to_released
from runtime.errors import UserError


def main(words=None):
    """Convert what the words name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint, ours or released; hf://owner/repo/file, too")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--image_size", type=int, help="of a released NCSN++ whose attention is not at 16×16 alone")
    args = parser.parse_args(words)
    try:
        layout = convert(args.source, args.target, {"data.image_size": args.image_size} if args.image_size else {})
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {layout} layout")
    return 0


def convert(source, target, chosen):
    """Write the checkpoint `source` to `target` in the other layout; return the name of that layout.

    chosen: dotted config fields that a released file does not tell.
    """
    released = is_released(load_safely(source).get("model", {}))
    checkpoint = read_checkpoint(source)
    fields = checkpoint.pop("fields")
    if released:
        fields = complete_fields(fields, chosen, source)
        checkpoint.setdefault("config", nested_config(fields))
    else:
        checkpoint = to_released(checkpoint, create_from_fields(fields))
    write_checkpoint(target, checkpoint)
    return "our" if released else "released"


def nested_config(fields):
    """Return dotted fields as the nested dict that a checkpoint holds; what is unknown, the data set too, is absent."""
    groups = {}
    for name, value in fields.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return groups


if __name__ == "__main__":
    sys.exit(main())
