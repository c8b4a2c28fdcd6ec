#!/usr/bin/env python
"""Trains or evaluates a detector, with Detectron2's command line.

``torchrun --nproc_per_node N tools/train_net.py ...`` trains in N processes, on GPUs or on CPUs; with
``--max-restarts`` it starts failed ones again, which go on from the last checkpoint. SIGTERM and Ctrl-C save and
print the command that continues. Exit status: 2 for wrong input or a file that cannot be written, 3 for a loss that
is not finite, 128 + n for signal n.
"""

import argparse
import sys

from aqdet.utils.arguments import detectron2_parser
from aqdet.utils.console import run_console

USER_ERROR = 2


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of Detectron2's options and ``--exported``."""
    parser = detectron2_parser(__doc__)
    parser.add_argument(
        "--exported",
        metavar="DIR",
        default="",
        help="with --eval-only: evaluate this exported detector, not MODEL.WEIGHTS",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs one process's part of the job."""
    from aqdet.engine import command  # late, so that --help opens at once

    command.main(args)


def invoke_main() -> None:
    """Parses the command line and runs the job in one process or more."""
    args = argument_parser().parse_args()
    if args.exported and not args.eval_only:
        print(f"error: --exported {args.exported} can only be evaluated: add --eval-only", file=sys.stderr)
        sys.exit(USER_ERROR)
    from aqdet.engine import command  # late, so that --help opens at once

    command.run(args)


if __name__ == "__main__":
    run_console(invoke_main, goes_on=True)
