"""
VGG Image Annotator, version 2: a project, or the annotations exported as JSON or as CSV.

Rectangles, polygons, circles and ellipses become boxes, and outlines other than rectangles become segmentations. Points
and open lines enclose nothing and are left out. The class of a region is one of its attributes: the declared one, the
only one, or one with a name such as ``class``. Its value is text, or options of which one is ticked. Classes are the
attribute's options in their order where the project has them, else all values, sorted. The files do not state the sizes
of images.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

from ..check.findings import Report
from ..declaration import Declaration
from .collector import CLASS_NAMES, Collector, says_yes
from .outlines import Outline, number, of_corners, of_ellipse, of_polygon
from .source import Source
from .text import read_text

__all__ = ["is_via", "is_via_csv", "read_via"]

_METADATA = "_via_img_metadata"
_WITHOUT_AREA = ("point", "polyline", "line")
_CSV_COLUMNS = ("filename", "region_shape_attributes", "region_attributes")


def read_via(declaration: Declaration, report: Report) -> Source:
    """
    Reads a file of VIA.

    Args:
        declaration: the dataset; its ``file`` is the JSON or CSV, its ``class_key`` the attribute that is the class.
        report: receives the findings.

    Returns:
        the records.
    """
    path = declaration.file
    source = Source("via", path, declaration.image_root, inputs={path}, states_sizes=False, states_sides=True)
    collector = Collector(source, report, declaration)
    content = _read(path, report)
    if content is None:
        return collector.finish()
    if not is_via(content):
        value = "not of VIA 2: neither a project with _via_img_metadata nor entries with filename and regions"
        if isinstance(content, dict) and {"project", "metadata", "view"} <= set(content):
            value = "of VIA 3: export the annotations as COCO JSON"
        report.add("file-format", path, value=value)
        return collector.finish()
    regions = []
    for key, entry in _entries(content):
        if not isinstance(entry, dict):
            report.add("record-malformed", path, key, value=entry)
            continue
        name = entry.get("filename")
        record = str(name or key)
        image_id = collector.add_image(name, (path, record))
        for index, region in _listed(entry.get("regions"), path, record, report):
            regions.append((image_id, f"{record}: region {index}", region))
    attribute = declaration.class_key or _class_key([region for *_, region in regions], declaration, path, report)
    if attribute is not None:
        collector.declare(_options(content, attribute))
        implied = declaration.classes[0] if declaration.classes and not attribute else None
        for image_id, record, region in regions:
            _add_region(collector, image_id, (path, record), region, attribute, implied)
    return collector.finish()


def is_via(content: Any) -> bool:
    """Returns whether the content of a JSON file is VIA 2's."""
    if isinstance(content, dict) and isinstance(content.get(_METADATA), dict):
        return True
    entries = list(content.values()) if isinstance(content, dict) else content
    is_list = isinstance(entries, list) and bool(entries)
    return is_list and all(isinstance(entry, dict) and {"filename", "regions"} <= set(entry) for entry in entries)


def is_via_csv(text: str) -> bool:
    """Returns whether a text is one of VIA's CSV tables."""
    lines = text.lstrip().splitlines()
    return bool(lines) and set(_CSV_COLUMNS) <= {name.strip(' "#') for name in lines[0].split(",")}


def _read(path: str, report: Report) -> Any:
    """Returns the content of a JSON, or of the JSON that says the same as a CSV."""
    text = read_text(path, report)
    if text is None:
        return None
    try:
        if text.lstrip()[0] in "{[":
            return json.loads(text)
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        if not rows or not set(_CSV_COLUMNS) <= set(rows[0]):
            raise ValueError(f"Expecting an object, or a CSV with the columns {', '.join(_CSV_COLUMNS)}")
        entries: dict[str, dict[str, Any]] = {}
        for row in rows:
            name, shape, attributes = (row[column] for column in _CSV_COLUMNS)
            entry = entries.setdefault(name, {"filename": name, "regions": []})
            # An image without regions has a row without a shape.
            if json.loads(shape or "{}"):
                region = {"shape_attributes": json.loads(shape), "region_attributes": json.loads(attributes or "{}")}
                entry["regions"].append(region)
        return entries
    except (ValueError, RecursionError, TypeError, csv.Error) as error:
        report.add("file-unreadable", path, value=f"not JSON or CSV of VIA: {error}")
        return None


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, list):
        yield from ((f"entry {index}", entry) for index, entry in enumerate(content))
    else:
        yield from content.get(_METADATA, content).items()


def _listed(regions: Any, path: str, record: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns the regions of an image: a list, or a mapping as version 1 wrote it."""
    if not isinstance(regions, list | dict):
        report.add("record-malformed", path, record, "regions", regions)
        return
    pairs = regions.items() if isinstance(regions, dict) else enumerate(regions)
    for index, region in pairs:
        if isinstance(region, dict) and isinstance(region.get("shape_attributes"), dict):
            yield str(index), region
        else:
            report.add("record-malformed", path, f"{record}: region {index}", value=region)


def _class_key(regions: list[dict[str, Any]], declaration: Declaration, path: str, report: Report) -> str | None:
    """
    Finds the attribute that is the class.

    Returns:
        its name; ``""`` if no region has an attribute and one class is declared; None if it is not clear.
    """
    counts: collections.Counter[str] = collections.Counter()
    for region in regions:
        counts.update(list(_attributes(region)))
    if not counts:
        if declaration.classes and len(declaration.classes) == 1:
            if regions:
                value = f"no region has an attribute: all are {declaration.classes[0]}"
                report.add("class-implied", path, field="region_attributes", value=value)
            return ""
        if regions:
            value = "no region has an attribute to be its class; for a single class declare classes: [NAME]"
            report.add("file-format", path, field="region_attributes", value=value)
        return None
    if len(counts) == 1:
        return next(iter(counts))
    by_name = {key.strip().lower(): key for key in counts}
    for name in CLASS_NAMES:
        if name in by_name:
            return by_name[name]
    value = f"{', '.join(sorted(counts))}: which is the class? declare class_key"
    report.add("file-format", path, field="region_attributes", value=value)
    return None


def _attributes(region: dict[str, Any]) -> dict[str, Any]:
    attributes = region.get("region_attributes")
    return attributes if isinstance(attributes, dict) else {}


def _options(content: Any, key: str) -> list[str]:
    """Returns the options of an attribute, in the project's order."""
    node: Any = content if isinstance(content, dict) else {}
    for step in ("_via_attributes", "region", key, "options"):
        node = node.get(step) if isinstance(node, dict) else None
    return [name for name in node if name.strip()] if isinstance(node, dict) else []


def _add_region(
    collector: Collector, image_id: int, place: tuple[str, str], region: dict[str, Any], key: str, implied: str | None
) -> None:
    shape, attributes = region["shape_attributes"], _attributes(region)
    kind = shape.get("name")
    if kind in _WITHOUT_AREA:
        collector.report.add("shape-without-area", *place, "name", kind)
        return
    try:
        label = _ticked(attributes.get(key), key) if implied is None else implied
        outline = _outline(kind, shape)
    except (ValueError, KeyError) as error:
        missing = f"{kind} without {error}" if isinstance(error, KeyError) else error
        collector.report.add("object-malformed", *place, value=str(missing))
        return
    collector.add_object(image_id, place, label, outline, difficult=says_yes(attributes.get("difficult")))


def _ticked(value: Any, key: str) -> Any:
    """Returns the class of a region: the attribute's text, or the only option that is ticked."""
    if not isinstance(value, dict):
        return value
    ticked = [name for name, flag in value.items() if flag is True or says_yes(flag)]
    if len(ticked) > 1:
        raise ValueError(f"{key} has {len(ticked)} options ticked: {', '.join(ticked)}")
    return ticked[0] if ticked else None


def _outline(kind: Any, shape: dict[str, Any]) -> Outline:
    if kind == "rect":
        return Outline([number(shape[side]) for side in ("x", "y", "width", "height")])
    if kind == "polygon":
        xs, ys = shape["all_points_x"], shape["all_points_y"]
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise ValueError("all_points_x and all_points_y must be lists of one length")
        return of_polygon([[(number(x), number(y)) for x, y in zip(xs, ys, strict=True)]])
    if kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        angle = number(shape.get("theta", 0)) if kind == "ellipse" else 0
        values = [number(shape[side]) for side in ("cx", "cy", *radii)]
        if not all(map(math.isfinite, [*values, angle])):
            return of_corners([(math.nan, math.nan)] * 2)
        return of_ellipse((values[0], values[1]), (values[2], values[3]), angle)
    raise ValueError(f"{kind!r} is none of VIA's shapes")
