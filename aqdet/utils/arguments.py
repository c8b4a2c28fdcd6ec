"""Types of command line arguments, and arguments that several programs of tools/ have.

Each type refuses a value when it is parsed, with argparse's one line: the option, the value and what is valid.
No slow library is imported here, so that ``--help`` opens at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def integer(low: int, high: int | None = None, *, multiple_of: int = 1) -> Callable[[str], int]:
    """Returns the type of a whole number from ``low`` to ``high`` (no limit if None) and a multiple of a number."""
    wanted = "a whole number"
    if multiple_of > 1:
        wanted = f"a multiple of {multiple_of}"
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high) or value % multiple_of:
            raise argparse.ArgumentTypeError(f"must be {wanted} {limits}, got {text!r}")
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Returns the type of a number from ``low`` to ``high``, both included; NaN is none."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return parse


def regex(text: str) -> str:
    """Checks a regular expression and returns it as it is."""
    if not text:
        raise argparse.ArgumentTypeError("'' matches every name: write '.*' if that is meant")
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def existing(text: str) -> str:
    """Checks that a file or folder exists and returns its path as it is."""
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text!r} does not exist")
    return text


def file_to_read(text: str) -> str:
    """Checks that a file exists and is no folder, and returns its path as it is."""
    if os.path.isdir(existing(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
    return text


def file_to_write(text: str) -> str:
    """Checks that a file can be written, its folder made where it is missing, and returns its path as it is."""
    if not text or os.path.isdir(text) or text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file in it")
    _check_place(text)
    return text


def folder_to_write(text: str) -> str:
    """Checks that a folder is there or can be made, and returns its path as it is."""
    if not text or (os.path.exists(text) and not os.path.isdir(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is a file: name a folder")
    _check_place(os.path.join(text, "file"))
    return text


def _check_place(path: str) -> None:
    """Checks that the nearest folder above ``path`` that exists is one, and can be written to."""
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path!r} cannot be written: no permission for {str(nearest)!r}")


class Distinct(argparse.Action):
    """Action for ``nargs="+"`` that refuses a value given twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Stores the values; see :class:`argparse.Action`."""
        assert isinstance(values, Sequence)
        repeated = [value for index, value in enumerate(values) if value in values[:index]]
        if repeated:
            raise argparse.ArgumentError(self, f"{repeated[0]} is given twice")
        setattr(namespace, self.dest, values)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds ``opts``, the ``KEY VALUE`` pairs that end a command line: the last argument to add."""
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as for train_net.py")


def add_plan_size(parser: argparse.ArgumentParser, image: str) -> None:
    """Adds ``--size H W``, of the image for which a plan counts operations.

    Args:
        image: Words for the help that say which image it is.
    """
    parser.add_argument(
        "--size",
        type=integer(32, multiple_of=32),
        nargs=2,
        default=(640, 640),
        metavar=("H", "W"),
        help=f"{image} (default: 640 640)",
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the programs that write an exported detector have in common."""
    parser.add_argument(
        "--output", type=folder_to_write, required=True, help="folder to write; an exported detector there is replaced"
    )
    parser.add_argument(
        "--max-loss",
        type=number(0.0, 100.0),
        metavar="AP",
        help="exit with 3 and write nothing where AP on --dataset is lower by more than so many points",
    )
    parser.add_argument("--force", action="store_true", help="export in spite of ranges or a loss that stop it")
    parser.add_argument("--licence", default="", help="licence of the weights, for the folder's README.md")
    parser.add_argument(
        "--end-to-end",
        action="store_true",
        help="also write model.end_to_end.onnx: uint8 images in, boxes, scores and classes out",
    )


def detectron2_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the options of Detectron2's ``default_argument_parser``, without importing PyTorch.

    Args:
        description: Text at the head of the help.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config-file FILE [options] [KEY VALUE ...]",
        epilog="examples:\n"
        "  %(prog)s --config-file config.yaml SOLVER.BASE_LR 0.001 OUTPUT_DIR runs/a\n"
        "  %(prog)s --config-file config.yaml --resume OUTPUT_DIR runs/a\n"
        "  %(prog)s --config-file config.yaml --eval-only MODEL.WEIGHTS runs/a/model_final_stripped.pth\n"
        "  %(prog)s --config-file config.yaml --num-gpus 8",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file of the model and its training")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if any")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and do not train")
    parser.add_argument(
        "--num-gpus", type=integer(0), default=1, help="number of GPUs of each machine (default: %(default)s)"
    )
    parser.add_argument("--num-machines", type=integer(1), default=1, help="number of machines (default: %(default)s)")
    parser.add_argument("--machine-rank", type=integer(0), default=0, help="number of this machine, from 0")
    # The port depends on the user, and is the same in every run: if it is taken, processes have been left behind.
    user = os.getuid() if sys.platform != "win32" else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}",
        help="address at which the processes of several GPUs meet (default: %(default)s)",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, default=None, metavar="KEY VALUE", help="changed values of config keys"
    )
    return parser
