"""
YOLO folders: a ``data.yaml`` and, for each image, a text file with a line for each object.

A ``classes.txt`` with a name a line, as labelImg and Label Studio write it, takes the place of a ``data.yaml``: it has
no splits, and all images below the image root are the dataset.

``names`` of the YAML is a list, or a mapping from class numbers, which may have gaps. A split (``train``,
``val``, ``test``) is a folder, a text file that lists images, or a list of these. It is relative to ``path``, and
``path`` is relative to the YAML's folder. The label file of ``.../images/a.jpg`` is ``.../labels/a.txt``; if no folder
of the path is called ``images``, it lies beside the image. A line is ``class cx cy w h``, or
``class x1 y1 x2 y2 x3 y3 ...`` for a polygon, whose box is used. All numbers are relative to the image's size. With
``kpt_shape`` in the YAML a line is a box followed by keypoints, which are left out. An image whose label file is
missing or empty is a negative.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ...utils.files import is_image
from ..check.findings import Report
from ..check.images import ImageFolder, without_junk
from ..declaration import Declaration
from .data_yaml import is_list_of_names, keys_of_split, read_categories, read_yaml, splits_of
from .source import Source
from .text import read_text

__all__ = ["read_images", "read_yolo"]

# What Label Studio and Roboflow write beside the images.
_BESIDE = ("notes.json", "README.dataset.txt", "README.roboflow.txt")


def read_yolo(declaration: Declaration, report: Report) -> Source:
    """
    Reads one split.

    Args:
        declaration: the dataset; its ``file`` is the ``data.yaml`` or ``classes.txt``, and its ``image_root`` has to
            hold the images and the label files.
        report: receives the findings.

    Returns:
        the records, with boxes relative to the size of the image.
    """
    yaml_file = declaration.file
    source = Source("yolo", yaml_file, declaration.image_root, inputs={yaml_file}, normalised=True)
    content = read_yaml(yaml_file, report)
    if content is None:
        return source
    read_categories(source, content, report)
    reader = _Reader(source, content, report)
    reader.find_unread_splits()
    reader.read_images(reader.images_of(declaration.split))
    return source


def read_images(source: Source, names: list[str], report: Report) -> None:
    """
    Adds images that were listed elsewhere, and the objects of their label files.

    Args:
        source: receives the records.
        names: names of the images, for :meth:`ImageFolder.find_all`.
        report: receives the findings.
    """
    _Reader(source, {}, report).read_images(names)


class _Reader:
    """Collects the records of one split in `source`."""

    def __init__(self, source: Source, content: dict[str, Any], report: Report) -> None:
        self.source = source
        self.content = content
        self.report = report
        self.folder = ImageFolder(source.image_root)
        self.has_keypoints = "kpt_shape" in content
        self.home = os.path.dirname(os.path.abspath(source.file))
        base = content.get("path")
        self.base = os.path.join(self.home, base) if isinstance(base, str) else self.home
        self.label_files: dict[str, str] = {}
        self.num_label_files = 0

    # --- Which images ---

    def images_of(self, split: str) -> list[str]:
        """Returns the names of a split's images, or of all images for ``""``, relative to the image root."""
        if is_list_of_names(self.source.file):
            if split:
                text = f"no split {split!r}: a list of names has no splits, a share as 0.8 needs none"
                self.report.add("file-format", self.source.file, value=text)
                return []
            return self._in_folder(self.source.image_root)
        if not split:
            every = [name for key in splits_of(self.content) for name in self.images_of(key)]
            if not every and not self.report.refused(strict=False):
                self.report.add("file-format", self.source.file, value="it has none of train, val, test")
            return list(dict.fromkeys(every))
        key = next(iter(keys_of_split(self.content, split)), split)
        value: Any = self.content.get(key)
        if key != split:
            self.report.add("split-alias", self.source.file, field=key, value=f"read as {split}")
        parts = value if isinstance(value, list) else [value]
        if value is None or not all(isinstance(part, str) and part for part in parts):
            there = ", ".join(splits_of(self.content)) or "none"
            text = f"no split {split!r}, splits there: {there}" if value is None else value
            self.report.add("file-format", self.source.file, field=split, value=text)
            return []
        names: list[str] = []
        for part in parts:
            place = self._find(part)
            if place is None:
                place = self._find_elsewhere(part, split)
            if place is None:
                value = f"{part}: no such file or folder in {self.source.image_root}"
                self.report.add("file-format", self.source.file, field=split, value=value)
            elif os.path.isdir(place):
                names += self._in_folder(place)
            else:
                names += self._in_list(place)
        return self._once(names)

    def find_unread_splits(self) -> None:
        """Adds findings on keys that name images as a split does, and are not read."""
        read = {key for split in splits_of(self.content) for key in keys_of_split(self.content, split)[:1]}
        for key, value in self.content.items():
            parts = value if isinstance(value, list) else [value]
            if key not in read and key != "path" and parts and all(isinstance(part, str) and part for part in parts):
                places = [self._find(part) for part in parts]
                if all(place is not None and _names_images(place) for place in places):
                    self.report.add("split-unread", self.source.file, field=str(key), value=value)

    def _find(self, part: str) -> str | None:
        """Returns a file or folder of the YAML that lies in the image root."""
        tries = [os.path.join(folder, part) for folder in (self.base, self.home, self.source.image_root)]
        # An exported folder often says ../train for the train beside the YAML.
        tries.append(os.path.join(self.home, part.removeprefix("../")))
        for path in tries:
            if os.path.exists(path) and self.folder.contains(path):
                return os.path.normpath(path)
        return None

    def _find_elsewhere(self, part: str, split: str) -> str | None:
        """Returns a file or folder that is named as on another machine, found by the last parts of its path."""
        slashed = part.replace("\\", "/")
        if not slashed.startswith("/") and re.match(r"[A-Za-z]:/", slashed) is None:
            return None
        parts = [name for name in slashed.split("/") if name not in ("", ".", "..")]
        for start in range(1, len(parts)):
            # Every split may have a folder called images: that name alone does not tell them apart.
            if parts[start:] == ["images"]:
                return None
            place = self._find("/".join(parts[start:]))
            if place is not None:
                value = f"{part}; used: {self._relative(place)}"
                self.report.add("split-elsewhere", self.source.file, field=split, value=value)
                return place
        return None

    def _in_folder(self, folder: str) -> list[str]:
        names = []
        for path, folders, files in os.walk(folder):
            folders[:] = without_junk(path, folders, self.report)
            self.source.inputs.add(path)
            for file in without_junk(path, files, self.report):
                full = os.path.join(path, file)
                if is_image(file):
                    names.append(self._relative(full))
                elif not file.lower().endswith(".txt") and file not in _BESIDE and not is_list_of_names(file):
                    self.report.add("file-ignored", full)
        return names

    def _in_list(self, path: str) -> list[str]:
        """Returns the images that a file lists: relative to its folder if they start with ``./``, else to ``path``."""
        self.source.inputs.add(path)
        text = read_text(path, self.report)
        lines = [] if text is None else [line.strip() for line in text.splitlines()]
        names = []
        for line in filter(None, lines):
            root = os.path.dirname(path) if line.startswith("./") else self.base
            full = os.path.normpath(os.path.join(root, line))
            names.append(self._relative(full))
        return names

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, os.path.abspath(self.source.image_root)).replace(os.sep, "/")

    def _once(self, names: list[str]) -> list[str]:
        once = dict.fromkeys(names)
        if len(once) < len(names):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    self.report.add("line-repeated", self.source.file, value=name)
                seen.add(name)
        return list(once)

    # --- Their labels ---

    def read_images(self, names: list[str]) -> None:
        """Adds images and the objects of their label files."""
        for name, (found, kind) in zip(names, self.folder.find_all(names), strict=True):
            self.read_image(name, "" if kind in ("image-missing", "image-outside") else found)
        self.check_label_files()

    def read_image(self, name: str, found: str) -> None:
        """Adds an image, and the objects of its label file if its own file was found."""
        image_id = len(self.source.images) + 1
        self.source.images.append({"id": image_id, "file_name": name})
        self.source.image_places.append((os.path.join(self.source.image_root, name), ""))
        self.source.label_files.append(os.path.join(self.source.image_root, self._label_of(found or name)))
        if not found:
            return
        label = self._label_of(found)
        path = os.path.join(self.source.image_root, label)
        if label in self.label_files:
            self.report.add("label-shared", path, value=f"{self.label_files[label]} and {found}")
        self.label_files[label] = found
        self.source.inputs.add(path)
        found, kind = self.folder.find(label)
        if kind == "image-missing":
            self.report.add("label-file-absent", os.path.join(self.source.image_root, name), value=label)
            return
        if kind == "image-outside":
            self.report.add(kind, path, value=found)
            return
        self.num_label_files += 1
        text = read_text(path, self.report, may_be_empty=True)
        lines = [] if text is None else text.splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._read_line(line.split(), image_id, (path, f"line {number}"))

    def _read_line(self, fields: list[str], image_id: int, place: tuple[str, str]) -> None:
        try:
            numbers = [float(field) for field in fields[1:]]
        except ValueError:
            numbers = []
        polygon = len(numbers) >= 6 and len(numbers) % 2 == 0 and not self.has_keypoints
        if not polygon and len(numbers) != 4 and not (self.has_keypoints and len(numbers) > 4):
            self.report.add("label-line", *place, value=" ".join(fields))
            return
        if not polygon:
            numbers = numbers[:4]
        # Beyond rounding of 0 to 1 it is no box that reaches a little outside the image; neither is NaN.
        if not all(-0.01 <= number <= 1.01 for number in numbers):
            self.report.add("label-not-normalised", *place, value=" ".join(fields))
            return
        if polygon:
            xs, ys = numbers[0::2], numbers[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            self.report.add("box-from-polygon", *place)
        else:
            cx, cy, width, height = numbers
            box = [cx - width / 2, cy - height / 2, width, height]
        # A class is text in the file; only a text such as 0.0 is a finding.
        category = int(fields[0]) if fields[0].removeprefix("-").isdecimal() else fields[0]
        annotation_id = len(self.source.annotations) + 1
        annotation = {"id": annotation_id, "image_id": image_id, "category_id": category, "bbox": box}
        self.source.annotations.append(annotation)
        self.source.annotation_places.append(place)

    def _label_of(self, image: str) -> str:
        names = _label_names(image)
        return next((name for name in names if self.folder.find(name) == (name, "")), names[0])

    def check_label_files(self) -> None:
        """Adds findings on label files without an image, and on images if no label file exists at all."""
        root = self.source.image_root
        folders = {
            os.path.dirname(os.path.join(root, label)): os.path.dirname(os.path.join(root, image))
            for label, image in self.label_files.items()
            if os.path.isdir(os.path.dirname(os.path.join(root, image)))
        }
        if self.label_files and not self.num_label_files:
            value = f"looked for {next(iter(self.label_files))} and the like"
            self.report.add("labels-absent", self.source.file, value=value)
        for folder, image_folder in sorted(folders.items()):
            if folder == image_folder or not os.path.isdir(folder):
                continue
            self.source.inputs.add(folder)
            stems = {os.path.splitext(file)[0] for file in os.listdir(image_folder)}
            for file in without_junk(folder, os.listdir(folder), self.report):
                stem, ending = os.path.splitext(file)
                # labelImg writes the classes' names into it.
                if ending.lower() == ".txt" and stem not in stems and not is_list_of_names(file):
                    self.report.add("label-without-image", os.path.join(folder, file))


def _label_names(image: str) -> list[str]:
    """Returns names that the label file of an image may have, both relative to the root, the usual one first."""
    stem = os.path.splitext(f"/{image}")[0]
    place = stem
    for images, labels in (("/Images/", "/Labels/"), ("/images/", "/labels/")):
        head, found, tail = stem.rpartition(images)
        if found:
            place = f"{head}{labels}{tail}"
    return [f"{place[1:]}{ending}" for ending in (".txt", ".TXT")]


def _names_images(place: str) -> bool:
    """Returns whether a place is a folder with images, or a list of files."""
    if os.path.isfile(place):
        return place.lower().endswith(".txt")
    return any(is_image(file) for _, _, files in os.walk(place) for file in files)
