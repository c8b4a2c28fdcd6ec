"""COCO JSON: one file with lists of images, annotations and categories."""

from __future__ import annotations

import json
from typing import Any

from ..check.findings import Report
from ..declaration import Declaration
from .source import Source

__all__ = ["read_coco"]


def read_coco(declaration: Declaration, report: Report) -> Source:
    """
    Reads a COCO annotation file.

    Args:
        declaration: the dataset; its ``file`` is the JSON.
        report: what the file lacks as a whole goes into it.

    Returns:
        the records, as they are in the file.
    """
    json_file = declaration.file
    source = Source("coco", json_file, declaration.image_root, inputs={json_file})
    content = _read_json(json_file, report)
    if content is None:
        return source
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            report.add("file-format", json_file, field=part, value=f"not COCO JSON: it has no list {part!r}")
            return source
    source.images, source.annotations = content["images"], content["annotations"]
    _read_categories(source, content["categories"], report)
    return source


def _read_json(json_file: str, report: Report) -> Any:
    try:
        with open(json_file, "rb") as file:
            data = file.read()
        if data.startswith(b"\xef\xbb\xbf"):
            report.add("file-bom", json_file)
        return json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report.add("file-unreadable", json_file, value=f"not JSON: {error}")
        return None


def _read_categories(source: Source, categories: list[Any], report: Report) -> None:
    for index, category in enumerate(categories):
        record = f"categories[{index}]"
        if not isinstance(category, dict):
            report.add("category-malformed", source.file, record, value=category)
            continue
        key, name = category.get("id"), category.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            report.add("category-name-type", source.file, record, "name", name)
            name = str(name)
        if (
            type(key) is int
            and isinstance(name, str)
            and name.strip()
            and key not in source.categories
            and name not in source.categories.values()
        ):
            source.categories[key] = name
        else:
            report.add("category-malformed", source.file, record, value=category)
    if not source.categories and not report.counts["category-malformed"]:
        report.add("file-format", source.file, field="categories", value="'categories' is empty")
