"""Readers of text files of labelling tools and spreadsheets: encodings, byte order marks, JSON and XML."""

from __future__ import annotations

import codecs
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import defusedxml
from defusedxml.ElementTree import fromstring

from ..check.findings import Report

__all__ = ["parse_xml", "read_json", "read_text"]

# UTF-32's mark starts with UTF-16's, and is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: str, report: Report, *, may_be_empty: bool = False) -> str | None:
    """
    Reads a text file in UTF-8, or in the encoding that its byte order mark states.

    Args:
        path: path of the file.
        report: receives a finding on a mark, or on why the file cannot be read.
        may_be_empty: whether an empty file is allowed.

    Returns:
        the text without the mark; None if it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
        mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        report.add("file-unreadable", path, value=f"not text in UTF-8 (save it as such): {error}")
        return None
    except OSError as error:
        report.add("file-unreadable", path, value=error.strerror or str(error))
        return None
    if "\0" in text:
        report.add("file-unreadable", path, value="it has characters of value 0: not text, or UTF-16 without its mark")
        return None
    if not text.strip() and not may_be_empty:
        report.add("file-unreadable", path, value="it is empty")
        return None
    if mark:
        report.add("file-bom" if encoding == "utf-8" else "file-encoding", path, value=encoding)
    return text


def read_json(path: str, report: Report) -> Any:
    """Returns the content of a JSON file; None, with a finding, if it cannot be read."""
    text = read_text(path, report)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        report.add("file-unreadable", path, value=f"not JSON: {error}")
        return None
    if content is None:
        report.add("file-format", path, value="the JSON is null")
    return content


def parse_xml(path: str) -> ElementTree.Element:
    """
    Returns the root element of an XML file.

    Raises:
        ValueError: if it is not XML, or has a DOCTYPE. A DOCTYPE can define entities that point to other files or grow
            without bound, and annotations need none.
    """
    try:
        return fromstring(Path(path).read_bytes(), forbid_dtd=True)
    except defusedxml.DefusedXmlException as error:
        raise ValueError("has a DOCTYPE, which an annotation does not need; refused") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not valid XML: {error}") from error
