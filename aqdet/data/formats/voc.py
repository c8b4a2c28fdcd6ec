"""
Pascal VOC: an XML file for each image, as labelImg and others write it.

Two layouts are read. A VOC folder has ``Annotations``, ``JPEGImages`` and ``ImageSets/Main/SPLIT.txt``, whose lines are
names of records. Without a split every XML file below the folder of annotations is a record; images may lie in the
same folder. The image of ``sub/a.xml`` is ``sub/a`` with an image's ending below the folder of images, or the file that
``<filename>`` names.

VOC boxes are 1-based with inclusive ends: ``x = xmin - 1``, ``width = xmax - xmin + 1``.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ...utils.files import IMAGE_ENDINGS, is_image, is_junk
from ..check.findings import Report
from ..check.images import ImageFolder, without_junk
from ..declaration import Declaration
from .source import Source
from .text import parse_xml, read_text

__all__ = ["locate_voc", "read_voc"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
_ANNOTATION_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")


@dataclasses.dataclass(frozen=True)
class _Object:
    """An object of an XML file; `corners` are xmin, ymin, xmax, ymax as the file has them."""

    index: int
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclasses.dataclass(frozen=True)
class _Annotation:
    """The content of an XML file; `size` is the (width, height) that it states, as text."""

    filename: str = ""
    size: tuple[str, str] = ("none", "none")
    objects: tuple[_Object, ...] = ()


def locate_voc(paths: Mapping[str, str], split: str) -> tuple[str, str]:
    """
    Finds the folders of a declared dataset.

    Args:
        paths: ``root``, or ``images`` and ``annotations``.
        split: name of a file in ``ImageSets/Main``, or ``""`` for all annotations.

    Returns:
        ``file`` and ``image_root`` of the declaration: with a split the root, else the folder of annotations.

    Raises:
        ValueError: if a split is named where there are none.
    """
    if "root" not in paths:
        if split:
            raise ValueError(f"split must be a share as 0.8: only a root has named splits, got {split!r}")
        return paths["annotations"], paths["images"]
    root = paths["root"]
    images = _subfolder(root, _IMAGE_FOLDERS)
    if split:
        return root, images if images != root else os.path.join(root, "JPEGImages")
    annotations = _subfolder(root, _ANNOTATION_FOLDERS)
    if annotations == root and not any(name.lower().endswith(".xml") for name in os.listdir(root)):
        annotations = images
    return annotations, images


def read_voc(declaration: Declaration, report: Report) -> Source:
    """
    Reads a split of a VOC folder, or a folder of XML files, with all faults.

    Args:
        declaration: the dataset; its ``file`` is the VOC folder if it names a split, else the folder of XML files.
            Without ``classes``, the classes are all names in the folder's annotations, sorted, so that all splits get
            the same ids.
        report: receives the findings.

    Returns:
        the records, with COCO's boxes.
    """
    split = declaration.split
    folder = _subfolder(declaration.file, _ANNOTATION_FOLDERS) if split else declaration.file
    source = Source("voc", folder, declaration.image_root)
    found = _files_below(folder, (".xml",), source, report)
    if split:
        source.file = os.path.join(declaration.file, "ImageSets", "Main", f"{split}.txt")
        source.inputs.add(source.file)
        stems = _read_split(source.file, folder, found, report)
    else:
        stems = list(found)
        if not stems:
            report.add("file-format", folder, value=f"no XML file in it; images are looked for in {source.image_root}")
    if not stems:
        return source
    paths = {stem: os.path.join(folder, found.get(stem, [f"{stem}.xml"])[0]) for stem in stems}
    annotations = {stem: _read_file(path, report) for stem, path in paths.items()}
    if declaration.classes is not None:
        names = list(declaration.classes)
    else:
        names = _class_names(
            annotations, [os.path.join(folder, p[0]) for s, p in found.items() if s not in annotations], report
        )
    _add_records(source, declaration, paths, annotations, names, report)
    return source


def _add_records(
    source: Source,
    declaration: Declaration,
    paths: Mapping[str, str],
    annotations: Mapping[str, _Annotation | None],
    names: list[str],
    report: Report,
) -> None:
    source.categories = dict(enumerate(names, 1))
    ids = {name: key for key, name in source.categories.items()}
    images = _Images(_files_below(source.image_root, IMAGE_ENDINGS, source, report))
    used: set[str] = set()
    for image_id, (stem, annotation) in enumerate(annotations.items(), 1):
        path = paths[stem]
        source.inputs.add(path)
        if annotation is None:  # reported by its file alone
            source.unread_files[path] = images.of_stem(stem) or [stem]
            used.update(source.unread_files[path])
            continue
        name = images.of_record(stem, annotation.filename, path, report)
        entry: dict[str, Any] = {"id": image_id, "file_name": name}
        entry["width"], entry["height"] = (int(text) if text.isdecimal() else text for text in annotation.size)
        source.images.append(entry)
        source.image_places.append((path, ""))
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.corners
            place = (path, f"object {item.index}")
            if item.difficult and not declaration.difficult_as_crowd:
                report.add("difficult", *place)
            source.annotations.append(
                {
                    "id": len(source.annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids.get(item.name, f"{item.name}: not among the classes"),
                    "bbox": [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    "ignore": int(item.difficult and declaration.difficult_as_crowd),
                }
            )
            source.annotation_places.append(place)
    if not declaration.split:
        found = ImageFolder(source.image_root).find_all([image["file_name"] for image in source.images])
        used.update(name for name, _ in found)
        for name in images.names:
            if name not in used:
                report.add("image-unlabelled", os.path.join(source.image_root, name))


class _Images:
    """The image files below a folder, found for the records of XML files."""

    def __init__(self, by_stem: Mapping[str, list[str]]) -> None:
        self.names = [PurePosixPath(name).as_posix() for names in by_stem.values() for name in names]
        self._by_stem: dict[str, list[str]] = collections.defaultdict(list)
        self._by_base: dict[str, list[str]] = collections.defaultdict(list)
        for name in self.names:
            stem = name[: -len(PurePosixPath(name).suffix)]
            self._by_stem[stem].append(name)
            self._by_base[stem.rpartition("/")[2]].append(name)

    def of_stem(self, stem: str) -> list[str]:
        """Returns the images that have the name of an XML file, which is given without its ending."""
        return self._by_stem.get(stem) or self._by_base.get(stem.rpartition("/")[2], [])

    def of_record(self, stem: str, filename: str, path: str, report: Report) -> str:
        """Returns the name of a record's image, relative to the folder, or a name that does not exist."""
        own = self._by_stem.get(stem, [])
        if len(own) > 1:
            report.add("label-shared", path, value=" and ".join(own))
        named = self._named(stem, filename)
        if own:
            if named and named not in own:
                report.add("image-of-other-name", path, field="filename", value=f"{filename}; used: {own[0]}")
            return own[0]
        if named:
            report.add("image-by-filename", path, field="filename", value=named)
            return named
        # Some tools write a.jpg.xml.
        below = self._by_base.get(stem.rpartition("/")[2], []) or self._of_whole_name(stem)
        if len(below) == 1:
            return below[0]
        return filename or (stem if is_image(stem) else f"{stem}.jpg")

    def _of_whole_name(self, name: str) -> list[str]:
        base = name.rpartition("/")[2]
        same = self._by_base.get(os.path.splitext(base)[0], []) if is_image(base) else []
        return [other for other in same if other.rpartition("/")[2] == base]

    def _named(self, stem: str, filename: str) -> str:
        """Returns the file that ``<filename>`` names: as it is, with another image's ending, or beside the record."""
        name = PurePosixPath(filename.replace("\\", "/"))
        if not filename or name.is_absolute() or ".." in name.parts:
            return ""
        text = name.as_posix()
        base = text[: -len(name.suffix)] if is_image(text) else text
        folder = stem.rpartition("/")[0]
        for key in dict.fromkeys((f"{folder}/{base}" if folder else base, base)):
            found = self._by_stem.get(key, [])
            if found:
                return next((other for other in found if other.endswith(text)), found[0])
        return ""


def _subfolder(root: str, names: tuple[str, ...]) -> str:
    """Returns the first folder of these names in a folder, in upper or lower case, or the folder itself."""
    there = {entry.name.lower(): entry.path for entry in os.scandir(root) if entry.is_dir()}
    return next((there[name] for name in names if name in there), root)


def _files_below(folder: str, endings: tuple[str, ...], source: Source, report: Report) -> dict[str, list[str]]:
    """Returns the files below a folder by their relative name without ending; links are not followed."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path, folders, files in os.walk(folder):
        source.inputs.add(path)
        folders[:] = without_junk(path, folders, report)
        for file in without_junk(path, files, report):
            name = os.path.relpath(os.path.join(path, file), folder).replace(os.sep, "/")
            stem, ending = os.path.splitext(name)
            if ending.lower() in endings:
                found[stem].append(name)
    return dict(found)


def _read_split(path: str, folder: str, there: Mapping[str, list[str]], report: Report) -> list[str]:
    """Returns the names of the split's records, without their ending, each once; `there` has those of the folder."""
    if not os.path.isfile(path):
        home = os.path.dirname(path)
        names = sorted(os.listdir(home)) if os.path.isdir(home) else []
        found = ", ".join(name.removesuffix(".txt") for name in names if name.endswith(".txt") and not is_junk(name))
        value = f"no split file; splits there: {found or 'none'}; a share as 0.8 needs none"
        report.add("file-unreadable", path, value=value)
        return []
    text = read_text(path, report)
    if text is None:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labelled = [re.fullmatch(r"(.*\S)\s+(-1|0|1)", line) for line in lines]
    if all(labelled) and not os.path.isfile(os.path.join(folder, f"{lines[0]}.xml")):
        value = "it marks the images of one class (name and -1, 0 or 1 a line): name a split that lists images alone"
        report.add("file-unreadable", path, value=value)
        return []
    stems = {line: _stem_of_line(line, there) for line in lines}
    outside = [
        stem for stem in stems.values() if PurePosixPath(stem).is_absolute() or ".." in PurePosixPath(stem).parts
    ]
    if outside:
        report.add("file-unreadable", path, value=f"it names files outside of the folder: {', '.join(outside)}")
        return []
    for line, count in collections.Counter(lines).items():
        for _ in range(count - 1):
            report.add("line-repeated", path, value=line)
    for line, stem in stems.items():
        if stem != line:
            report.add("line-name", path, value=f"{line}; used: {stem}")
    return list(dict.fromkeys(stems.values()))


def _stem_of_line(line: str, there: Mapping[str, list[str]]) -> str:
    """Returns the name of the record that a line of a split means: the line's own, or that of its file or path."""
    name = PurePosixPath(line.replace("\\", "/"))
    whole = name.with_suffix("") if is_image(name.name) or name.suffix.lower() == ".xml" else name
    return next((stem for stem in (line, whole.as_posix(), whole.name) if stem in there), line)


def _class_names(annotations: Mapping[str, _Annotation | None], others: Iterable[str], report: Report) -> list[str]:
    """Returns the sorted class names in a folder's annotations; `others` are the paths of those outside the split."""
    names = {item.name for annotation in annotations.values() if annotation for item in annotation.objects}
    for path in others:
        try:
            names.update((item.findtext("name") or "").strip() for item in parse_xml(path).findall("object"))
        except (ValueError, OSError):
            report.add("file-skipped", path)
    return sorted(names - {""})


def _read_file(path: str, report: Report) -> _Annotation | None:
    """Reads an XML file; the report receives findings on what cannot be read; None if all of it."""
    try:
        tree = parse_xml(path)
    except OSError as error:
        report.add("file-unreadable", path, value=error.strerror or str(error))
        return None
    except ValueError as error:
        report.add("file-unreadable", path, value=str(error))
        return None
    if tree.tag != "annotation":
        report.add("file-format", path, value=f"no annotation of VOC: it is a <{tree.tag}>")
        return None
    objects = []
    for index, item in enumerate(tree.findall("object")):
        try:
            objects.append(_read_object(item, index))
        except ValueError as error:
            report.add("object-malformed", path, f"object {index}", value=str(error))
    width, height = ((tree.findtext(f"size/{side}") or "").strip() or "none" for side in ("width", "height"))
    return _Annotation((tree.findtext("filename") or "").strip(), (width, height), tuple(objects))


def _read_object(item: ElementTree.Element, index: int) -> _Object:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError("no name")
    texts = [(item.findtext(f"bndbox/{corner}") or "").strip() for corner in _CORNERS]
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        got = " ".join(f"{corner}={text!r}" for corner, text in zip(_CORNERS, texts, strict=True))
        raise ValueError(f"bndbox needs four finite numbers, got {got}")
    xmin, ymin, xmax, ymax = (int(value) if value.is_integer() else value for value in values)
    return _Object(index, name, (xmin, ymin, xmax, ymax), _is_difficult(item.findtext("difficult")))


def _is_difficult(text: str | None) -> bool:
    word = (text or "0").strip().lower()
    if word in ("true", "yes", "t", "y"):
        return True
    if word in ("", "false", "no", "f", "n", "unspecified"):
        return False
    try:
        return float(word) != 0
    except ValueError:
        raise ValueError(f"difficult must be 0 or 1, got {text!r}") from None
