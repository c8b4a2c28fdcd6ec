"""COCO JSON: one file with lists of images, annotations and categories."""

from __future__ import annotations

import collections
from typing import Any

from ..check.findings import Report
from ..check.values import whole_number
from ..declaration import Declaration
from .other_tools import what_json_is
from .source import Source
from .text import read_json

__all__ = ["read_coco"]

# Fields that have an image's name where file_name is absent, as in LVIS.
_NAME_FIELDS = ("filename", "fileName", "file", "path", "coco_url", "url")


def read_coco(declaration: Declaration, report: Report) -> Source:
    """
    Reads a COCO annotation file.

    Args:
        declaration: the dataset; its ``file`` is the JSON.
        report: receives findings on the file as a whole.

    Returns:
        the records, as they are in the file.
    """
    json_file = declaration.file
    source = Source("coco", json_file, declaration.image_root, inputs={json_file}, states_sides=True)
    content = read_json(json_file, report)
    if content is None:
        return source
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            known = what_json_is(content).partition(": ")[2]
            other = f"it has no list {part!r}" + (f", it is {known}" if known else "")
            report.add("file-format", json_file, field=part, value=f"not COCO JSON: {other}")
            return source
    source.images, source.annotations = content["images"], content["annotations"]
    for index, image in enumerate(source.images):
        if isinstance(image, dict) and image.get("file_name") is None:
            source.images[index] = _with_name(image, (json_file, f"image {image.get('id')}"), report)
    _read_categories(source, content["categories"], report)
    return source


def _with_name(image: dict[str, Any], place: tuple[str, str], report: Report) -> dict[str, Any]:
    """Returns an image with the file name that one of its other fields has, if any of them has one."""
    for field in _NAME_FIELDS:
        name = image.get(field)
        if isinstance(name, str) and name.strip():
            report.add("image-name-field", *place, field, name)
            return {**image, "file_name": name}
    return image


def _read_categories(source: Source, categories: list[Any], report: Report) -> None:
    named: dict[int, str] = {}
    records: dict[int, str] = {}
    for index, category in enumerate(categories):
        record = f"categories[{index}]"
        found = _read_category(source, category, record, report)
        if found is None:
            continue
        key, name = found
        if named.get(key, name) != name:
            report.add("category-malformed", source.file, record, value=category)
        elif key in named:
            report.add("category-unused", source.file, record, "name", f"{name}, given twice")
        else:
            named[key], records[key] = name, record
    used = {whole_number(raw.get("category_id")) for raw in source.annotations if isinstance(raw, dict)}
    of_name: dict[str, list[int]] = collections.defaultdict(list)
    for key, name in named.items():
        of_name[name].append(key)
    for name, keys in of_name.items():
        # If several categories have one name, the one with annotations is meant.
        keep = [key for key in keys if key in used] or keys[:1]
        for key in keys:
            if key not in keep:
                value = f"{name}, id {key}: the name of id {keep[0]}, and without annotations"
                report.add("category-unused", source.file, records[key], "name", value)
            elif key != keep[0]:
                value = f"{name}, id {key}: the name of id {keep[0]}, and both have annotations"
                report.add("category-malformed", source.file, records[key], "name", value)
                source.refused_categories.add(key)
            else:
                source.categories[key] = name
    if not source.categories and not report.counts["category-malformed"]:
        report.add("file-format", source.file, field="categories", value="'categories' is empty")


def _read_category(source: Source, category: Any, record: str, report: Report) -> tuple[int, str] | None:
    """Returns id and name of a category; None, with a finding, if it lacks one of them."""
    if not isinstance(category, dict):
        report.add("category-malformed", source.file, record, value=category)
        return None
    key, name = whole_number(category.get("id")), category.get("name")
    if isinstance(name, int | float) and not isinstance(name, bool):
        report.add("category-name-type", source.file, record, "name", name)
        name = str(name)
    if key is None or not isinstance(name, str) or not name.strip():
        report.add("category-malformed", source.file, record, value=category)
        if key is not None or isinstance(category.get("id"), str):
            source.refused_categories.add(category["id"] if key is None else key)
        return None
    if type(category["id"]) is not int:
        report.add("category-id-type", source.file, record, "id", category["id"])
    return key, name
