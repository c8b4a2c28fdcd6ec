"""
labelme folders: a JSON file for each image, in the images' folder or in another one.

``imagePath`` of a JSON is relative to the JSON's folder. Rectangles (by any two corners), polygons, circles and
masks become boxes, and outlines other than rectangles become segmentations. Shapes of one label and one ``group_id``
are parts of one object, as in labelme's own conversion. Lines and points enclose nothing and are left out.
An image without a JSON is not labelled, and is no part of the dataset; an image whose JSON has no shapes is a negative.
"""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from ...utils.files import IMAGE_ENDINGS
from ..check.findings import Report
from ..check.images import ImageFolder, without_junk
from ..check.values import polygon_of_box
from ..declaration import Declaration
from .collector import Collector, says_yes
from .outlines import Outline, of_corners, of_ellipse, of_mask, of_polygon, points_of
from .source import Source
from .text import read_json

__all__ = ["is_labelme", "read_labelme"]

_POLYGONS = ("polygon", "rotation", "oriented_rectangle", "quadrilateral")
_WITHOUT_AREA = ("point", "points", "line", "linestrip", "lines")


def read_labelme(declaration: Declaration, report: Report) -> Source:
    """
    Reads a labelme folder.

    Args:
        declaration: the dataset; its ``file`` is the folder of the JSON files, which may lie in folders of it.
        report: receives the findings.

    Returns:
        the records; the classes are those of the declaration, or all labels, sorted.
    """
    source = Source("labelme", declaration.file, declaration.image_root)
    reader = _Reader(source, Collector(source, report, declaration), report)
    for path in _json_files(declaration.file, source, report):
        reader.read(path)
    if not source.images and not report.refused(strict=False):
        value = "no labelme JSON in it (an object with shapes and imagePath)"
        report.add("file-format", declaration.file, value=value)
    return reader.collector.finish()


def is_labelme(content: Any) -> bool:
    """Returns whether the content of a JSON file is labelme's."""
    return isinstance(content, dict) and ("shapes" in content or "imagePath" in content)


def _json_files(folder: str, source: Source, report: Report) -> list[str]:
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = without_junk(path, folders, report)
        source.inputs.add(path)
        for file in sorted(files):
            if not file.lower().endswith(".json"):
                continue
            full = os.path.join(path, file)
            if file.startswith("."):
                report.add("file-junk", full)
                continue
            found.append(full)
    return found


class _Reader:
    def __init__(self, source: Source, collector: Collector, report: Report) -> None:
        self.source = source
        self.collector = collector
        self.report = report
        self.folder = ImageFolder(source.image_root)

    def read(self, path: str) -> None:
        """Adds the image of a JSON file and its objects."""
        self.source.inputs.add(path)
        content = read_json(path, self.report)
        if content is None:
            return
        if not is_labelme(content):
            self.report.add("file-ignored", path, value="not labelme's: neither shapes nor imagePath")
            return
        shapes = content.get("shapes")
        if not isinstance(shapes, list):
            self.report.add("file-format", path, field="shapes", value="not a list of shapes")
            return
        size = content.get("imageWidth"), content.get("imageHeight")
        place = (path, "")
        image_id = self.collector.add_image(self._image_name(path, content.get("imagePath")), place, *size)
        grouped: dict[tuple[str, str], list[tuple[tuple[str, str], Outline, bool]]] = {}
        for index, shape in enumerate(shapes):
            place = (path, f"shape {index}")
            if not isinstance(shape, dict):
                self.report.add("record-malformed", *place, value=shape)
                continue
            outline = self._outline(place, shape, size)
            if outline is None:
                continue
            label, group = shape.get("label"), shape.get("group_id")
            flags = shape.get("flags")
            flag = flags.get("difficult", False) if isinstance(flags, dict) else False
            difficult = says_yes(shape.get("difficult", False)) or says_yes(flag)
            if group is None or isinstance(outline.segmentation, dict):  # a mask
                self.collector.add_object(image_id, place, label, outline, difficult=difficult)
            else:
                key = (json.dumps(label), json.dumps(group))
                grouped.setdefault(key, []).append((place, outline, difficult))
        for (label, _), parts in grouped.items():
            if len(parts) > 1:
                self.report.add("parts-joined", *parts[0][0], "group_id", f"{len(parts)} shapes")
            joined = _joined([outline for _, outline, _ in parts])
            difficult = any(hard for *_, hard in parts)
            self.collector.add_object(image_id, parts[0][0], json.loads(label), joined, difficult=difficult)

    def _image_name(self, path: str, name: Any) -> Any:
        """
        Returns the image file of a JSON, relative to the image root, or `name` itself if there is none.

        ``imagePath`` is out of date where files were moved or renamed together. Then it means the image of the JSON's
        name beside the JSON, or at the same place below the image root.
        """
        own = os.path.dirname(path)
        if isinstance(name, str) and name.strip():
            slashed = name.replace("\\", "/")
            for folder in (own, self.source.image_root):
                relative = self._below_root(os.path.join(folder, slashed))
                if relative is not None:
                    if slashed != name:
                        self.report.add("image-path", path, "", "imagePath", name)
                    return relative
        stem = os.path.splitext(path)[0]
        below = os.path.relpath(stem, self.source.file)
        for base in (stem, os.path.join(self.source.image_root, below)):
            for ending in IMAGE_ENDINGS:
                for variant in (ending, ending.upper()):
                    relative = self._below_root(base + variant)
                    if relative is not None:
                        self.report.add("image-path", path, "", "imagePath", name)
                        return relative
        return name

    def _below_root(self, path: str) -> str | None:
        """Returns a file's name relative to the image root; None if it does not lie there."""
        relative = os.path.relpath(os.path.abspath(path), os.path.abspath(self.source.image_root))
        relative = relative.replace(os.sep, "/")
        if relative.startswith("../") or "\0" in relative:
            return None
        found, kind = self.folder.find(relative)
        return relative if not kind and found == relative else None

    def _outline(self, place: tuple[str, str], shape: dict[str, Any], size: tuple[Any, Any]) -> Outline | None:
        kind = shape.get("shape_type") or "polygon"
        if kind in _WITHOUT_AREA:
            self.report.add("shape-without-area", *place, "shape_type", kind)
            return None
        try:
            points = points_of(shape.get("points"))
            if kind == "rectangle":
                return of_corners(points)
            if kind in _POLYGONS:
                return of_polygon([points])
            if kind == "circle":
                (x, y), rim = points
                radius = float(np.hypot(rim[0] - x, rim[1] - y))
                return of_ellipse((x, y), (radius, radius))
            if kind == "mask":
                mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
                corner = (int(points[0][0]), int(points[0][1]))
                return of_mask(mask, corner, (int(size[0]), int(size[1])))
        except Exception as error:  # damaged masks can raise anything in a decoder
            reason = f"{kind}: {error if isinstance(error, ValueError) else type(error).__name__}"
            self.report.add("object-malformed", *place, value=reason)
            return None
        self.report.add("object-malformed", *place, "shape_type", f"{kind}: none of labelme's shapes")
        return None


def _joined(outlines: list[Outline]) -> Outline:
    polygons: list[list[float]] = []
    if any(outline.segmentation for outline in outlines):
        for outline in outlines:
            own = outline.segmentation
            polygons += own if isinstance(own, list) else [polygon_of_box(outline.box)]
    left, top = min(o.box[0] for o in outlines), min(o.box[1] for o in outlines)
    right, bottom = max(o.box[0] + o.box[2] for o in outlines), max(o.box[1] + o.box[3] for o in outlines)
    return Outline([left, top, right - left, bottom - top], polygons or None)
