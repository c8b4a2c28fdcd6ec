"""Tables and legends of all sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .. import svg
from ..run_folder import Run


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the CSS classes of its kind, and a smaller text behind it."""

    text: str
    kind: str = ""
    small: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table, with the CSS class of its kind."""

    cells: Sequence[Cell]
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with one line of headings."""

    header: Sequence[Cell]
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """A name and its colour."""

    name: str
    colour: str


def row_of(*cells: Cell | str, kind: str = "") -> Row:
    """Makes a row of cells and plain texts."""
    return Row(cells_of(*cells), kind)


def cells_of(*cells: Cell | str) -> list[Cell]:
    """Makes cells of plain texts, and leaves cells as they are."""
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]


def legend_of(runs: Sequence[Run]) -> list[LegendEntry]:
    """Returns the runs with the colours that they have in every section."""
    return [LegendEntry(run.name, svg.colour(index)) for index, run in enumerate(runs)]
