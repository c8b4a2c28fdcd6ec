"""Progress of long work on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
"""Time from one line to the next, where standard error is no terminal; shorter work gets no line."""


class _Lines(io.TextIOBase):
    """A stream on which each state of a bar is a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.strip()  # a bar begins with a carriage return and ends in blanks over a longer one before it
        if line:
            self._stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    iterable: Iterable[Any] | None = None, *, unit: str, total: int | None = None, title: str | None = None
) -> Any:
    """Returns a ``tqdm`` over an iterable, or without one to be updated by hand.

    Args:
        iterable: What is to be worked on.
        unit: A word for one of it.
        total: Their number, if the iterable does not tell.
        title: Text in front.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, desc=title, total=total, unit=unit, file=sys.stderr)
    pause = SECONDS_BETWEEN_LINES
    lines = _Lines(sys.stderr)
    return tqdm(
        iterable, desc=title, total=total, unit=unit, file=lines, mininterval=pause, maxinterval=pause, delay=pause
    )
