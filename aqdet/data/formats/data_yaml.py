"""A ``data.yaml`` of YOLO, or the list of names in its place: names of classes, and names of splits."""

from __future__ import annotations

import datetime
import os
from typing import Any

import yaml

from ...utils.plain_yaml import load_yaml
from ..check.findings import Report
from ..check.values import whole_number
from .source import Source
from .text import read_text

__all__ = ["SPLITS", "is_list_of_names", "keys_of_split", "named_splits", "read_categories", "read_yaml", "splits_of"]

SPLITS = ("train", "val", "test")
# Files with the names of classes, a line each: labelImg's and Label Studio's, and Roboflow's.
_LISTS_OF_NAMES = ("classes.txt", "_darknet.labels")
# Names that a split may have, in upper or lower case; the first that is there counts.
_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}


def is_list_of_names(path: str) -> bool:
    """Returns whether a file is a list of the names of classes by its own name."""
    return os.path.basename(path).lower() in _LISTS_OF_NAMES


def named_splits(yaml_file: str) -> list[str]:
    """Returns the splits of :data:`SPLITS` that a ``data.yaml`` has; none if it cannot be read."""
    content = read_yaml(yaml_file, Report(""))
    return [] if content is None else splits_of(content)


def splits_of(content: dict[str, Any]) -> list[str]:
    """Returns the splits of :data:`SPLITS` that a ``data.yaml`` has, under whatever name."""
    return [split for split in SPLITS if keys_of_split(content, split)]


def keys_of_split(content: dict[str, Any], split: str) -> list[str]:
    """Returns the keys of a ``data.yaml`` that name images of a split; the first one counts."""
    names = _ALIASES.get(split, (split,))
    keys = [key for key, value in content.items() if value and isinstance(key, str) and key.lower() in names]
    return sorted(keys, key=lambda key: (key != key.lower(), names.index(key.lower())))


def read_yaml(yaml_file: str, report: Report) -> dict[str, Any] | None:
    """Returns the content of a ``data.yaml``, or of a list of names; None, with a finding, if it cannot be read."""
    text = read_text(yaml_file, report)
    if text is None:
        return None
    if is_list_of_names(yaml_file):
        return {"names": [line.strip() for line in text.rstrip().splitlines()]}
    try:
        content = load_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        report.add("file-unreadable", yaml_file, value=f"not plain YAML: {error}")
        return None
    if isinstance(content, dict) and "names" in content:
        content["names"] = _with_numbers_as_written(content["names"], text)
    else:
        other = next((key for key in content or () if str(key).lower() == "names"), "")
        value = f"not a YOLO data.yaml: it has no 'names'{f', but {other!r}: write it in lower case' if other else ''}"
        report.add("file-format", yaml_file, field="names", value=value)
        return None
    return content


class _Written(str):
    """The name of a class that YAML takes for a number, as it is written."""


def _with_numbers_as_written(names: Any, text: str) -> Any:
    """Returns names of classes in which 010, 0x10 and 12:30 are what the file has, and not 8, 16 and 750."""
    if not isinstance(names, list | dict):
        return names
    # All scalars are text to this loader, which is as safe as the other.
    written = yaml.load(text, yaml.BaseLoader)["names"]
    texts = written.values() if isinstance(written, dict) else written
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    read = {
        key: _Written(text) if isinstance(name, int | float) and not isinstance(name, bool) else name
        for (key, name), text in zip(pairs, texts, strict=True)
    }
    return read if isinstance(names, dict) else list(read.values())


def read_categories(source: Source, content: dict[str, Any], report: Report) -> None:
    """Adds the classes of a ``data.yaml`` to a source, with a finding on each that is none."""
    names, yaml_file = content["names"], source.file
    pairs = list(names.items()) if isinstance(names, dict) else list(enumerate(names if names is not None else ()))
    if not isinstance(names, list | dict) or not pairs:
        value = "empty: it needs the names of the classes, as [cat, dog]"
        if names:
            value = f"{names}: it must be a list of the names of the classes, as [{names}]"
        report.add("file-format", yaml_file, field="names", value=value)
        return
    for key, name in pairs:
        record = f"class {key}"
        if isinstance(name, _Written):
            report.add("category-name-type", yaml_file, record, "name", name)
            name = str(name)
        number = whole_number(key)
        if number is not None and type(key) is not int:
            report.add("category-id-type", yaml_file, record, "id", key)
        if isinstance(name, bool | None | datetime.date):
            value = f"{name}: YAML does not take it for text; quote it in names, as 'no'"
            report.add("category-malformed", yaml_file, record, "name", value)
        elif number is None or not isinstance(name, str) or not name.strip() or name in source.categories.values():
            report.add("category-malformed", yaml_file, record, "name", name)
        else:
            source.categories[number] = name
            continue
        if number is not None:
            source.refused_categories.add(number)
    count = content.get("nc", len(pairs))
    if count != len(pairs):
        report.add("file-format", yaml_file, field="nc", value=f"{count}, but there are {len(pairs)} names")
