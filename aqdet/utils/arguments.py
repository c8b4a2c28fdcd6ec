"""Types of command line arguments, shared by the programs of tools/.

Each refuses a value when it is parsed, with argparse's one line that names the option, the value and what is valid.
No slow library is imported here, so that ``--help`` opens at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
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
