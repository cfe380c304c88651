"""Programs with absl flags of their own (the four scripts have `configs.command_line`)."""

import sys

from absl import app, flags


def run_program(main, name):
    """Call `main(argv)` with the flags of the command line; exit 2 with one sentence when these are wrong."""

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            print(f"{name}: {' '.join(str(error).split())} (--help lists the flags)", file=sys.stderr)
            sys.exit(2)

    app.run(main, flags_parser=parse)
