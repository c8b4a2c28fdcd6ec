"""
Darknet: an ``obj.data`` that names a list of images for each split and a file of class names, with YOLO's labels.

The paths in these files are relative to the folder in which darknet is started, most often the one above ``data/``.
They are looked up there, beside ``obj.data`` and below the image root, with fewer and fewer of their first folders. A
class is the number of its line in the file of names. Label files and their lines are those of :mod:`.yolo`.
"""

from __future__ import annotations

import os

from ..check.findings import Report
from ..check.images import ImageFolder
from ..declaration import Declaration
from .source import Source
from .text import read_text
from .yolo import read_images

__all__ = ["named_splits", "read_darknet"]

_SPLITS = ("train", "valid", "test")
_ALIASES = {"val": "valid", "validation": "valid"}


def read_darknet(declaration: Declaration, report: Report) -> Source:
    """
    Reads one split, or all of them.

    Args:
        declaration: the dataset; its ``file`` is the ``obj.data``.
        report: receives the findings.

    Returns:
        the records, with boxes relative to the size of the image.
    """
    path = declaration.file
    source = Source("darknet", path, declaration.image_root, inputs={path}, normalised=True)
    content = _read_data(path, report)
    if content is None:
        return source
    finder = _Finder(path, declaration.image_root)
    names = _find(finder, content, "names", source, report)
    if names is None:
        return source
    _read_names(source, names, content.get("classes", ""), report)
    split = _ALIASES.get(declaration.split, declaration.split)
    splits = [split] if split else [key for key in _SPLITS if content.get(key)]
    if not splits:
        report.add("file-format", path, value=f"it has none of {', '.join(_SPLITS)}")
    images: dict[str, None] = {}
    for key in splits:
        listed = _find(finder, content, key, source, report)
        text = None if listed is None else read_text(listed, report)
        for line in [] if text is None else filter(None, map(str.strip, text.splitlines())):
            name = finder.image(line)
            if name in images:
                report.add("line-repeated", str(listed), value=line)
            else:
                images[name] = None
    read_images(source, list(images), report)
    return source


def named_splits(path: str) -> list[str]:
    """Returns the splits that an ``obj.data`` has; none if it cannot be read."""
    content = _read_data(path, Report(""))
    return [] if content is None else [key for key in _SPLITS if content.get(key)]


def _read_data(path: str, report: Report) -> dict[str, str] | None:
    """Returns keys and values of an ``obj.data``; None, with a finding, if the file is none."""
    text = read_text(path, report)
    if text is None:
        return None
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#;"]
    content = {key.strip(): value.strip() for key, sign, value in pairs if sign}
    if "names" not in content or not set(_SPLITS) & set(content):
        value = "not darknet's: it needs lines as names = obj.names and train = train.txt"
        report.add("file-format", path, value=value)
        return None
    return content


def _read_names(source: Source, path: str, classes: str, report: Report) -> None:
    text = read_text(path, report)
    if text is None:
        return
    names = [line.strip() for line in text.rstrip().splitlines()]
    for number, name in enumerate(names):
        # Darknet counts an empty line as a class, too.
        if not name or name in source.categories.values():
            report.add("category-malformed", path, f"line {number + 1}", "name", name or "(empty)")
            source.refused_categories.add(number)
        else:
            source.categories[number] = name
    if classes and classes != str(len(names)):
        value = f"{classes}, but there are {len(names)} names in {os.path.basename(path)}"
        report.add("file-format", source.file, field="classes", value=value)


def _find(finder: _Finder, content: dict[str, str], key: str, source: Source, report: Report) -> str | None:
    """Returns the file that a key of ``obj.data`` names; None, with a finding, if there is none."""
    value = content.get(key)
    if not value:
        there = ", ".join(split for split in _SPLITS if content.get(split))
        report.add("file-format", source.file, field=key, value=f"no {key!r}, splits there: {there}")
        return None
    found = finder.file(value)
    if found is None:
        text = f"{value}: no such file beside {os.path.basename(source.file)} or in {source.image_root}"
        report.add("file-format", source.file, field=key, value=text)
        return None
    source.inputs.add(found)
    return found


class _Finder:
    """Looks up the paths that the files of a folder of darknet name."""

    def __init__(self, data_file: str, image_root: str) -> None:
        self.home = os.path.dirname(os.path.abspath(data_file))
        self.root = os.path.abspath(image_root)
        self.folders = (ImageFolder(self.root), ImageFolder(self.home))

    def file(self, path: str) -> str | None:
        """Returns an existing file below the image root or beside ``obj.data``."""
        for full in self._places(path, shortest=1):
            if os.path.isfile(full) and any(folder.contains(full) for folder in self.folders):
                return full
        return None

    def image(self, line: str) -> str:
        """Returns the name of an image relative to the image root, or the line as it is if there is no such image."""
        # With fewer folders it may be another image: the check looks for it, and counts it as found elsewhere.
        for full in self._places(line, shortest=-1):
            if os.path.isfile(full) and self.folders[0].contains(full):
                return os.path.relpath(full, self.root).replace(os.sep, "/")
        return line

    def _places(self, path: str, shortest: int) -> list[str]:
        """Yields the paths that may be meant; at least the last `shortest` parts are kept, for -1 all but the first."""
        slashed = path.replace("\\", "/")
        parts = [part for part in slashed.split("/") if part not in ("", ".")]
        places = [slashed] if os.path.isabs(slashed) else [os.path.join(os.path.dirname(self.home), slashed)]
        last = 1 if shortest < 0 else len(parts) - shortest
        for folder in (self.home, self.root):
            places += [os.path.join(folder, *parts[start:]) for start in range(min(last + 1, len(parts)))]
        return [os.path.normpath(place) for place in places]
