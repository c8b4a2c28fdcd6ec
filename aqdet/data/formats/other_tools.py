"""Recognition of annotation files that no reader reads: the tool that they come from, and what to export instead."""

from __future__ import annotations

import json
from typing import Any

from ..check.findings import Report
from .text import parse_xml, read_text

__all__ = ["what_else", "what_json_is"]

_EXPORT = "export the annotations as COCO JSON"


def what_else(path: str) -> str:
    """Describes a file that is in none of the formats, for a message: the tool it is of, or why it cannot be read."""
    report = Report("")
    if path.lower().endswith(".xml"):
        try:
            return f"not of a format that is read: XML of <{parse_xml(path).tag}>"
        except (ValueError, OSError) as error:
            return f"not of a format that is read, it is {error}"
    text = read_text(path, report)
    if text is None:
        return f"not of a format that is read, it is {report.findings[-1].value}"
    if text.lstrip()[0] in "{[":
        try:
            return what_json_is(json.loads(text))
        except (ValueError, RecursionError) as error:
            return f"not of a format that is read, it is not JSON: {error}"
    return "not of a format that is read"


def what_json_is(content: Any) -> str:
    """Describes the content of a JSON file that is in none of the formats, for a message."""
    known = "not of a format that is read"
    first = content[0] if isinstance(content, list) and content else None
    keys = set(content) if isinstance(content, dict) else set()
    if isinstance(first, dict):
        if {"image_id", "category_id", "score"} <= set(first):
            return f"{known}: detections, not annotations"
        if "annotations" in first and {"image", "imagefilename"} & set(first):
            return f"{known}: CreateML's; {_EXPORT}"
        if "data" in first and {"annotations", "completions", "predictions"} & set(first):
            return f"{known}: Label Studio's own; {_EXPORT}, or as YOLO or Pascal VOC XML"
        if any(isinstance(value, list) and _is_label_studio(value) for value in first.values()):
            return f"{known}: Label Studio's JSON-MIN; {_EXPORT}, or as YOLO or Pascal VOC XML"
        if "Label" in first or "data_row" in first:
            return f"{known}: Labelbox's; {_EXPORT}"
    if {"objects", "size"} <= keys:
        return f"{known}: Supervisely's; {_EXPORT}"
    if {"images", "categories"} <= keys and "annotations" not in keys:
        return f"{known}: COCO's list of test images, without annotations"
    return known


def _is_label_studio(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict) and {"original_width", "original_height"} <= set(values[0])
