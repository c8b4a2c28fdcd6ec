"""Recognition of annotation files that no reader reads: the tool that they come from, and what to export instead."""

from __future__ import annotations

import json
from typing import Any

from ..check.findings import Report
from .csv_table import columns_of
from .text import parse_xml, read_text

__all__ = ["what_else", "what_json_is"]

_EXPORT = "export the annotations as COCO JSON"
_UNKNOWN = "not of a format that is read"
# Keys of the whole, and what has them.
_BY_KEYS = (
    ({"objects", "size"}, f"Supervisely's; {_EXPORT}"),
    ({"assets", "tags"}, f"VoTT's project; {_EXPORT}, as CSV or as Pascal VOC XML"),
    ({"asset", "regions"}, f"VoTT's own; {_EXPORT}, as CSV or as Pascal VOC XML"),
    ({"file", "metadata", "attribute"}, f"VIA's of version 3; {_EXPORT}"),
    ({"items", "categories"}, f"Datumaro's; {_EXPORT}"),
)


def what_else(path: str) -> str:
    """Describes a file that is in none of the formats, for a message: the tool it is of, or why it cannot be read."""
    report = Report("")
    if path.lower().endswith(".xml"):
        try:
            return f"{_UNKNOWN}: XML of <{parse_xml(path).tag}>"
        except (ValueError, OSError) as error:
            return f"{_UNKNOWN}, it is {error}"
    text = read_text(path, report)
    if text is None:
        reason = str(report.findings[-1].value)
        return f"{_UNKNOWN}, {reason if reason.startswith('it ') else f'it is {reason}'}"
    start = text.lstrip()
    if start[0] in "{[":
        try:
            return what_json_is(json.loads(text))
        except (ValueError, RecursionError) as error:
            return _what_lines_are(start) or f"{_UNKNOWN}, it is not JSON: {error}"
    if start.startswith("version https://git-lfs.github.com/"):
        return f"{_UNKNOWN}: a pointer of Git LFS in place of the file; fetch it with 'git lfs pull'"
    if start[:14].lower().startswith(("<!doctype html", "<html")):
        return f"{_UNKNOWN}: a web page, as a download that needs a login gives; download the file again"
    if path.lower().endswith((".csv", ".tsv")):
        try:
            columns_of(text)
        except ValueError as error:
            return f"{_UNKNOWN}: a table with {error}"
    return _UNKNOWN


def what_json_is(content: Any) -> str:
    """Describes the content of a JSON file that is in none of the formats, for a message."""
    first = content[0] if isinstance(content, list) and content else None
    keys = set(content) if isinstance(content, dict) else set()
    words = _what_a_record_is(first) if isinstance(first, dict) else ""
    words = words or next((words for known, words in _BY_KEYS if known <= keys), "")
    if not words and {"images", "categories"} <= keys and "annotations" not in keys:
        words = "COCO's list of test images, without annotations"
    if not words and {"images", "annotations"} <= keys and "categories" not in keys:
        words = "COCO JSON without its list 'categories', an id and a name a class"
    return f"{_UNKNOWN}: {words}" if words else _UNKNOWN


def _what_a_record_is(record: dict[str, Any]) -> str:
    """Returns what a list is that starts with this record; ``""`` if that is not known."""
    if {"image_id", "category_id", "score"} <= set(record):
        return "detections, not annotations"
    if "annotations" in record and {"image", "imagefilename"} & set(record):
        return f"CreateML's; {_EXPORT}"
    if "data" in record and {"annotations", "completions", "predictions"} & set(record):
        return f"Label Studio's own; {_EXPORT}, or as YOLO or Pascal VOC XML"
    if any(isinstance(value, list) and _is_label_studio(value) for value in record.values()):
        return f"Label Studio's JSON-MIN; {_EXPORT}, or as YOLO or Pascal VOC XML"
    if "Label" in record or "data_row" in record:
        return f"Labelbox's; {_EXPORT}"
    if "name" in record and isinstance(record.get("labels"), list):
        return f"Scalabel's, as BDD100K has it; {_EXPORT}"
    return ""


def _what_lines_are(text: str) -> str:
    """Returns what a text with a JSON object a line is; ``""`` for another text."""
    try:
        first, *_ = records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return ""
    if len(records) < 2 or not isinstance(first, dict):
        return ""
    return f"{_UNKNOWN}: JSON lines, {_what_a_record_is(first) or f'a record each; {_EXPORT}'}"


def _is_label_studio(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict) and {"original_width", "original_height"} <= set(values[0])
