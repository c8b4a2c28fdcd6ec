"""
Tables of boxes as text, with a row for each object.

The columns of a table with a header are those of TensorFlow's object detection
(``filename,width,height,class,xmin,ymin,xmax,ymax``), in any order and with other common spellings; a box may also be
``x,y,w,h``. A table without a header has the columns of keras-retinanet, ``path,x1,y1,x2,y2,class``. Columns are
separated by a comma, a semicolon, a tab or a bar. A row without box and class is an image without objects. Coordinates
are continuous: a box from 0 to 64 is 64 wide.
"""

from __future__ import annotations

import csv
import io
import math
import re
from typing import Any

from ..check.findings import Report
from ..declaration import Declaration
from .collector import CLASS_NAMES, Collector, says_yes
from .outlines import Outline, number
from .source import Source
from .text import read_text

__all__ = ["columns_of", "read_csv"]

SEPARATORS = ",;\t|"
# Spellings of columns, without case, spaces, dashes and underscores. Two corners, or a corner and a size, are needed.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "file": (
        *("filename", "file", "filepath", "path", "image", "imagepath", "imagename", "imagefile", "imagefilename"),
        *("img", "imgname", "imgpath", "imageid"),
    ),
    "class": tuple(name.replace("_", "").replace(" ", "") for name in CLASS_NAMES),
    "left": ("xmin", "x1", "left", "xtl", "minx", "bboxx1", "x0", "bboxxmin", "boxxmin"),
    "top": ("ymin", "y1", "top", "ytl", "miny", "bboxy1", "y0", "bboxymin", "boxymin"),
    "right": ("xmax", "x2", "right", "xbr", "maxx", "bboxx2", "bboxxmax", "boxxmax"),
    "bottom": ("ymax", "y2", "bottom", "ybr", "maxy", "bboxy2", "bboxymax", "boxymax"),
    "x": ("x", "bboxx", "boxx"),
    "y": ("y", "bboxy", "boxy"),
    "w": ("w", "bboxw", "bboxwidth", "boxwidth", "boxw"),
    "h": ("h", "bboxh", "bboxheight", "boxheight", "boxh"),
    "width": ("width", "imagewidth", "imgwidth", "imgw", "imagew"),
    "height": ("height", "imageheight", "imgheight", "imgh", "imageh"),
    "difficult": ("difficult",),
}
_CORNERS = ("left", "top", "right", "bottom")
_SIDES = ("x", "y", "w", "h")
_HEADERLESS = ("file", *_CORNERS, "class")
_WANTED = (
    "a header with filename, class, xmin, ymin, xmax, ymax (or x, y, w, h) and perhaps width, height; "
    "or no header and path,x1,y1,x2,y2,class"
)


def read_csv(declaration: Declaration, report: Report) -> Source:
    """
    Reads a table of boxes.

    Args:
        declaration: the dataset; its ``file`` is the table.
        report: receives the findings.

    Returns:
        the records; the classes are those of the declaration, or all in the table, sorted.
    """
    path = declaration.file
    source = Source("csv", path, declaration.image_root, inputs={path}, states_sizes=False)
    collector = Collector(source, report, declaration)
    text = read_text(path, report)
    if text is None:
        return collector.finish()
    try:
        columns, rows, separator = columns_of(text)
    except ValueError as error:
        report.add("file-format", path, value=str(error))
        return collector.finish()
    source.states_sizes = "width" in columns and "height" in columns
    reader = _Reader(collector, columns, path, decimal_comma=separator != ",")
    source.states_sides = not reader.is_corners
    for line, row in rows:
        reader.read((path, f"line {line}"), row)
    return collector.finish()


def columns_of(text: str) -> tuple[dict[str, int], list[tuple[int, list[str]]], str]:
    """
    Finds the columns of a table.

    Args:
        text: the table.

    Returns:
        the index of each column, (line number, fields) of each row but the header, and the separator.

    Raises:
        ValueError: in one line, if the text is no table of boxes.
    """
    missing: list[str] = []
    # Excel's first line, which names the separator.
    marked = re.match(r"\s*sep=(.)\r?\n", text)
    if marked is not None:
        text = "\n" + text[marked.end() :]
        if not text.strip():
            raise ValueError(f"no table below 'sep={marked[1]}', wanted {_WANTED}")
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
        if not rows:  # a text of separators alone
            continue
        first = [field.strip() for field in rows[0][1]]
        if len(first) == len(_HEADERLESS) and _is_box_or_empty(first[1:5]):
            return {name: index for index, name in enumerate(_HEADERLESS)}, rows, separator
        columns = _named(first)
        lacking = _lacking(columns)
        if not lacking:
            plain = [_plain(field) for field in first]
            twice = [first[index] for index in columns.values() if plain.count(plain[index]) > 1]
            if twice:
                raise ValueError(f"two columns {twice[0]!r}: rename the one that does not count")
            return columns, rows[1:], separator
        if len(first) > 1:
            missing = lacking
    lacks = f"no column {', '.join(missing)}" if missing else "no table"
    raise ValueError(f"{lacks}; got {rows_start(text)!r}, wanted {_WANTED}")


def rows_start(text: str) -> str:
    """Returns the first line, cut if it is long."""
    line = text.strip().splitlines()[0]
    return line if len(line) <= 120 else f"{line[:117]}..."


def _plain(field: str) -> str:
    return "".join(c for c in field.lower() if c not in " _-.")


def _named(header: list[str]) -> dict[str, int]:
    columns: dict[str, int] = {}
    names = [_plain(field) for field in header]
    for column, spellings in _SPELLINGS.items():
        found = next((names.index(spelling) for spelling in spellings if spelling in names), None)
        if found is not None:
            columns[column] = found
    # A width beside x and y is the box's if there is no w, and a width beside two corners is the image's.
    known = set(columns)
    if {"x", "y", "width", "height"} <= known and not {"w", "h"} & known and not set(_CORNERS) <= known:
        columns["w"], columns["h"] = columns.pop("width"), columns.pop("height")
    return columns


def _lacking(columns: dict[str, int]) -> list[str]:
    box = _SIDES if "x" in columns or "w" in columns else _CORNERS
    if set(_CORNERS) <= set(columns):
        box = _CORNERS
    names = {"file": "filename", "left": "xmin", "top": "ymin", "right": "xmax", "bottom": "ymax"}
    return [names.get(column, column) for column in ("file", "class", *box) if column not in columns]


def _is_box_or_empty(fields: list[str]) -> bool:
    try:
        return not any(fields) or len([number(field) for field in fields]) == len(fields)
    except ValueError:
        return False


class _Reader:
    """Adds rows of a table; `decimal_comma` says that numbers may have one, since no comma separates the columns."""

    def __init__(self, collector: Collector, columns: dict[str, int], path: str, *, decimal_comma: bool) -> None:
        self.collector = collector
        self.report = collector.report
        self.columns = columns
        self.path = path
        self.decimal_comma = decimal_comma
        self.is_corners = set(_CORNERS) <= set(columns)
        self.num_fields = max(columns.values()) + 1
        self.image_ids: dict[str, int] = {}
        self.sizes: dict[str, tuple[Any, Any]] = {}

    def read(self, place: tuple[str, str], row: list[str]) -> None:
        """Adds a row's image if it is new, and the row's object."""
        fields = [field.strip() for field in row]
        if len(fields) < self.num_fields:
            value = f"{len(fields)} fields, {self.num_fields} are needed: {' '.join(fields)}"
            self.report.add("record-malformed", *place, value=value)
            return
        name = fields[self.columns["file"]]
        image_id = self._image(place, name, fields)
        texts = [fields[self.columns[column]] for column in (_CORNERS if self.is_corners else _SIDES)]
        label = fields[self.columns["class"]]
        if not any(texts) and not label:
            return
        try:
            box = [self._number(place, text) for text in texts]
        except ValueError:
            self.report.add("box-malformed", *place, "bbox", " ".join(text or "(empty)" for text in texts))
            return
        if not all(map(math.isfinite, box)):
            self.report.add("box-not-finite", *place, "bbox", " ".join(texts))
            return
        if self.is_corners:
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        difficult = "difficult" in self.columns and says_yes(fields[self.columns["difficult"]])
        self.collector.add_object(image_id, place, label, Outline(box), difficult=difficult)

    def _image(self, place: tuple[str, str], name: str, fields: list[str]) -> int:
        size: tuple[Any, Any] = (None, None)
        if {"width", "height"} <= set(self.columns):
            size = _integer(fields[self.columns["width"]]), _integer(fields[self.columns["height"]])
        if name not in self.image_ids:
            self.image_ids[name] = self.collector.add_image(name, place, *size)
            self.sizes[name] = size
        elif size != self.sizes[name]:
            before = "x".join(map(str, self.sizes[name]))
            value = f"{size[0]}x{size[1]} stated, {before} in a row before: {name}"
            self.report.add("image-size", *place, "width, height", value)
        return self.image_ids[name]

    def _number(self, place: tuple[str, str], text: str) -> float:
        try:
            return number(text)
        except ValueError:
            if not self.decimal_comma or text.count(",") != 1:
                raise
        value = number(text.replace(",", "."))
        self.report.add("box-text", *place, "bbox", text)
        return value


def _integer(text: str) -> Any:
    """Returns a whole number, or the text if it is none; only the latter becomes a finding, as a table is all text."""
    try:
        value = number(text)
    except ValueError:
        return text
    return value if type(value) is int else text
