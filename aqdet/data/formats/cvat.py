"""
CVAT for images, version 1.1: one XML file for all images.

Boxes, polygons, ellipses and masks become boxes, and outlines other than upright boxes become segmentations. Polylines,
points, cuboids, skeletons and objects marked as outside of the image are left out. Occluded objects are kept and
counted. Classes are those of the task, in its order, or all labels, sorted, if the file states no task.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np

from ..check.findings import Report
from ..check.values import whole_number
from ..declaration import Declaration
from .collector import Collector, says_yes
from .outlines import MAX_PIXELS, Outline, number, of_ellipse, of_mask, of_polygon, of_rotated_box
from .source import Source
from .text import parse_xml

__all__ = ["read_cvat"]

_WITHOUT_AREA = ("polyline", "points", "cuboid", "skeleton")
_SHAPES = ("box", "polygon", "ellipse", "mask")


def read_cvat(declaration: Declaration, report: Report) -> Source:
    """
    Reads an XML file of CVAT.

    Args:
        declaration: the dataset; its ``file`` is the XML.
        report: receives the findings.

    Returns:
        the records.
    """
    path = declaration.file
    source = Source("cvat", path, declaration.image_root, inputs={path})
    collector = Collector(source, report, declaration)
    try:
        root = parse_xml(path)
    except (ValueError, OSError) as error:
        report.add("file-unreadable", path, value=str(error))
        return collector.finish()
    problem = _problem(root)
    if problem:
        report.add("file-format", path, value=problem)
        return collector.finish()
    collector.declare(_labels(root))
    for index, image in enumerate(root.iter("image")):
        name = image.get("name")
        record = name or f"image {index}"
        sides = [image.get(side) for side in ("width", "height")]
        # All values of XML are text: numbers given as text are no finding here.
        size = [side if whole_number(side) is None else whole_number(side) for side in sides]
        image_id = collector.add_image(name, (path, record), *size)
        shapes = [shape for shape in image if shape.tag in (*_SHAPES, *_WITHOUT_AREA)]
        for number_of, shape in enumerate(shapes):
            _add_shape(collector, image_id, (path, f"{record}: {shape.tag} {number_of}"), shape, size)
    return collector.finish()


def _problem(root: ElementTree.Element) -> str:
    if root.tag == "annotation":
        return "of Pascal VOC (<annotation>), a file for each image: declare it with format: voc"
    if root.tag != "annotations":
        return f"not of CVAT: its root is <{root.tag}>, not <annotations>"
    if root.find("track") is not None:
        return "of CVAT for video (<track>): export it as CVAT for images 1.1"
    return "" if root.find("image") is not None else "no <image> in it"


def _labels(root: ElementTree.Element) -> list[str]:
    """Returns the names of the task's or the project's labels, without those of a skeleton's parts."""
    labels = [label for meta in root.findall("meta") for label in meta.iter("label") if label.find("parent") is None]
    # A project's own labels stand beside those of its tasks.
    names = [(label.findtext("name") or "").strip() for label in labels]
    return [name for name in names if name]


def _add_shape(
    collector: Collector, image_id: int, place: tuple[str, str], shape: ElementTree.Element, size: list
) -> None:
    report = collector.report
    if shape.tag in _WITHOUT_AREA:
        report.add("shape-without-area", *place, value=shape.tag)
        return
    if says_yes(shape.get("outside")):
        report.add("object-not-in-image", *place, "outside", shape.get("outside"))
        return
    try:
        outline = _outline(shape, size)
    except (ValueError, KeyError) as error:
        reason = f"no attribute {error}" if isinstance(error, KeyError) else str(error)
        report.add("object-malformed", *place, value=reason)
        return
    if says_yes(shape.get("occluded")):
        report.add("occluded", *place)
    attributes = {item.get("name", "").lower(): item.text for item in shape.iter("attribute")}
    difficult = says_yes(attributes.get("difficult"))
    collector.add_object(image_id, place, shape.get("label"), outline, difficult=difficult)


def _outline(shape: ElementTree.Element, size: list) -> Outline:
    given = shape.attrib
    if shape.tag == "box":
        left, top, right, bottom = (number(given[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
        turn = number(given.get("rotation", 0))
        if turn % 360:
            return of_rotated_box([(left, top), (right, bottom)], turn)
        return Outline([left, top, right - left, bottom - top])
    if shape.tag == "polygon":
        pairs = [pair.split(",") for pair in given["points"].split(";") if pair.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"points must be x,y;x,y;..., got {given['points']!r}")
        return of_polygon([[(number(x), number(y)) for x, y in pairs]])
    if shape.tag == "ellipse":
        x, y, rx, ry = (number(given[side]) for side in ("cx", "cy", "rx", "ry"))
        return of_ellipse((x, y), (rx, ry), np.radians(number(given.get("rotation", 0))))
    left, top, width, height = (int(number(given[side])) for side in ("left", "top", "width", "height"))
    runs = [int(number(run)) for run in given["rle"].split(",")]
    if sum(runs) != width * height or min(runs) < 0 or sum(runs) > MAX_PIXELS:
        raise ValueError(f"rle covers {sum(runs)} pixels of {width}x{height}")
    if not all(isinstance(side, int) for side in size[:2]):
        raise ValueError("a mask needs the width and height of its image")
    values = np.arange(len(runs)) % 2
    return of_mask(np.repeat(values, runs).reshape(height, width), (left, top), (size[0], size[1]))
