"""Tables and the sections of RESULTS.md."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from aqdet.utils.files import write_text

LEFT_OUT = "Left out"
"""The beginning of the last paragraph of a section, if some runs of a grid are missing."""


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Returns ``mean ± sample standard deviation`` to one decimal; the mean alone for a single value."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.1f}"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kept_remark(path: str | os.PathLike[str], name: str) -> str:
    """Returns the text that stands below the command in the section ``name``, without the list of what was left out.

    A table is written again when it has more rows; the text that was written about it by hand is kept. The text is
    empty where nothing stands there or there is no such section.
    """
    target = Path(path)
    content = target.read_text() if target.is_file() else ""
    section = content.partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    below: list[str] = []
    for paragraph in reversed(section.strip().split("\n\n")):
        if "Command: `" in paragraph:
            return "\n\n".join(reversed(below))
        if not paragraph.startswith(LEFT_OUT):
            below.append(paragraph)
    return ""


def write_section(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Replaces the section between the markers of ``name`` in a Markdown file, or appends it."""
    target = Path(path)
    content = target.read_text() if target.is_file() else "# Results\n"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin in content and end in content:
        before, _, rest = content.partition(begin)
        content = before + block + rest.partition(end)[2]
    else:
        content = f"{content.rstrip()}\n\n{block}\n"
    write_text(target, content)
