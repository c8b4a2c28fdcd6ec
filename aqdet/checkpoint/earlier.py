"""The numbered checkpoints that an earlier run has left in a folder, which a resume of the next one does not read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..utils.files import open_replacing

EARLIER = "earlier_checkpoints"
"""Name of the file that lists them."""


def earlier_checkpoints(folder: str) -> list[str]:
    """Returns the names of files of an earlier run that the one in this folder has not replaced."""
    path = Path(folder, EARLIER)
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def note_earlier(folder: str, names: Sequence[str]) -> None:
    """Writes what :func:`earlier_checkpoints` returns."""
    with open_replacing(Path(folder, EARLIER), durable=True) as file:
        file.write("\n".join(names))
