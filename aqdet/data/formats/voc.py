"""
Pascal VOC folders: converted to COCO JSON, or read as a declared dataset.

:func:`read_voc` leaves the policy to :mod:`aqdet.data.check.records`. That of :func:`convert_voc`: a record that cannot
be read as meant stops the conversion, with all such records in one line and nothing written: a missing or
unreadable file, XML with a DOCTYPE, an object without a name or with a box that is not four finite numbers, a
class outside ``classes``. What is repaired or dropped is counted, with the records it happened to: a box that
reaches outside the image is clipped; one that lies outside or ends before it starts is dropped; a box of one
pixel, an object given twice and an image without objects are kept; where the XML's size of an image differs
from the file's, the file's is used, turned as EXIF says.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.parsers import expat

from PIL import Image
from tabulate import tabulate

from ...runtime.image import EXIF_ORIENTATION
from ...utils.files import IMAGE_ENDINGS
from ..check.findings import Report
from ..declaration import Declaration
from .source import Source

__all__ = ["VocReport", "convert_voc", "read_voc"]

SIZE_BANDS = ("small", "medium", "large")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SHOWN = 20


@dataclasses.dataclass
class VocReport:
    """
    What a conversion did.

    Attributes:
        num_images, num_boxes: what was written.
        boxes_per_class: class name -> boxes, in the order of the category ids.
        images_per_class: class name -> images with at least one of its boxes.
        bands_per_class: class name -> boxes that are small, medium and large as COCO means it.
        notes: kind of repair, drop or oddity -> the records it happened to, as ``file#object``.
    """

    num_images: int
    num_boxes: int
    boxes_per_class: dict[str, int]
    images_per_class: dict[str, int]
    bands_per_class: dict[str, dict[str, int]]
    notes: dict[str, list[str]]

    def __str__(self) -> str:
        rows = [
            [name, self.images_per_class[name], boxes, *self.bands_per_class[name].values()]
            for name, boxes in self.boxes_per_class.items()
        ]
        lines = [f"{self.num_images} images, {self.num_boxes} boxes"]
        lines.append(tabulate(rows, headers=["class", "images", "boxes", *SIZE_BANDS]))
        for kind, records in self.notes.items():
            lines.append(f"{kind}: {len(records)} ({_listed(records)})")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Object:
    """An object of an XML file; `corners` are xmin, ymin, xmax, ymax as written there."""

    record: str
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclasses.dataclass(frozen=True)
class _Annotation:
    """What is read from an XML file; `declared` is the (width, height) it states, as text."""

    declared: tuple[str, str]
    objects: list[_Object]


def convert_voc(
    voc_root: str | os.PathLike[str],
    split: str,
    output: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    difficult_as_crowd: bool = False,
) -> VocReport:
    """
    Converts one split of a Pascal VOC folder; writes ``output`` whole or not at all.

    VOC boxes are 1-based with inclusive ends: ``x = xmin - 1``, ``width = xmax - xmin + 1``.

    Args:
        voc_root: folder with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        split: name of a file in ``ImageSets/Main`` without its ending; image ids follow its lines.
        output: COCO JSON to write; file names in it are relative to ``JPEGImages``.
        classes: names in the order of their category ids, from 1; if None, those of all the folder's
            annotations, sorted, so that all splits of a folder get the same ids.
        difficult_as_crowd: makes ``difficult`` objects crowd regions, which Detectron2 does not train on
            and COCO's evaluation ignores; else they are objects as all others.

    Returns:
        what was written, repaired and dropped.

    Raises:
        ValueError: in one line, for what the module's policy refuses.
    """
    root, target = Path(voc_root), Path(output)
    notes: dict[str, list[str]] = collections.defaultdict(list)
    stems = _read_split(root, split, notes)
    images = _find_images(root, stems)
    annotations, problems = {}, []
    for stem in stems:
        try:
            annotations[stem] = _read_annotation(root, stem)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} annotation files cannot be used: {_listed(problems, '; ')}")
    names = list(classes) if classes is not None else _class_names(root, annotations, notes)
    _check_classes(names, annotations)

    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    for image_id, stem in enumerate(stems, 1):
        width, height = _image_size(root / "JPEGImages" / images[stem], stem, notes)
        if annotations[stem].declared != (str(width), str(height)):
            declared = "x".join(annotations[stem].declared)
            notes["image size in XML differs, file's used"].append(f"{stem}: {declared}, {width}x{height}")
        entry = {"id": image_id, "file_name": images[stem], "width": width, "height": height}
        content["images"].append(entry)
        boxes = 0
        seen = set()
        for item in annotations[stem].objects:
            if (item.name, item.corners) in seen:
                notes["objects given twice, kept"].append(item.record)
            seen.add((item.name, item.corners))
            box = _coco_box(item, width, height, notes)
            if box is None:
                continue
            if item.difficult:
                kind = "made crowd regions" if difficult_as_crowd else "kept as objects"
                notes[f"difficult objects, {kind}"].append(item.record)
            boxes += 1
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": names.index(item.name) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "segmentation": [],
                    "iscrowd": int(item.difficult and difficult_as_crowd),
                }
            )
        if not boxes:
            notes["images without objects, kept"].append(stem)
    _write_json(target, content)
    return _report(content, names, notes)


def read_voc(declaration: Declaration, report: Report) -> Source:
    """
    Reads one split of a Pascal VOC folder with all its faults.

    Args:
        declaration: the dataset; its ``file`` is the folder.
        report: what cannot be read goes into it.

    Returns:
        the records, with boxes as COCO has them.
    """
    root, split, classes = Path(declaration.file), declaration.split, declaration.classes
    difficult_as_crowd = declaration.difficult_as_crowd
    folder = root / "JPEGImages"
    split_file = root / "ImageSets" / "Main" / f"{split}.txt"
    source = Source("voc", str(split_file), str(folder), inputs={str(split_file)})
    notes: dict[str, list[str]] = collections.defaultdict(list)
    try:
        stems = _read_split(root, split, notes)
    except (ValueError, OSError) as error:
        report.add("file-unreadable", str(split_file), value=str(error))
        return source
    for line in itertools.chain.from_iterable(notes.values()):
        report.add("line-repeated", str(split_file), value=line)
    images = _index_images(folder)
    annotations = {stem: _read_tolerantly(root, stem, report) for stem in stems}
    if classes is not None:
        names = list(classes)
    else:
        skipped: dict[str, list[str]] = collections.defaultdict(list)
        names = _class_names(root, annotations, skipped)
        xmls = root / "Annotations"
        source.inputs.update(map(str, (xmls, *xmls.rglob("*"))))
        for stem in itertools.chain.from_iterable(skipped.values()):
            report.add("file-skipped", str(xmls / f"{stem}.xml"))
    source.categories = dict(enumerate(names, 1))
    ids = {name: key for key, name in source.categories.items()}
    for image_id, stem in enumerate(stems, 1):
        path = str(root / "Annotations" / f"{stem}.xml")
        source.inputs.add(path)
        found = images.get(stem, [f"{stem}.jpg"])
        if len(found) > 1:
            report.add("label-shared", path, value=" and ".join(found))
        entry: dict[str, Any] = {"id": image_id, "file_name": found[0]}
        source.images.append(entry)
        source.image_places.append((path, ""))
        declared = annotations[stem].declared
        entry["width"], entry["height"] = (int(text) if text.isdecimal() else text for text in declared)
        for item in annotations[stem].objects:
            xmin, ymin, xmax, ymax = item.corners
            if item.difficult and not difficult_as_crowd:
                report.add("difficult", path, f"object {item.record.rpartition('#')[2]}")
            source.annotations.append(
                {
                    "id": len(source.annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids.get(item.name, f"{item.name}: not among the classes"),
                    "bbox": [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    "ignore": int(item.difficult and difficult_as_crowd),
                }
            )
            source.annotation_places.append((path, f"object {item.record.rpartition('#')[2]}"))
    return source


def _read_tolerantly(root: Path, stem: str, report: Report) -> _Annotation:
    """The annotation of a record without what cannot be read, which goes into the report."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = _parse(path)
    except (ValueError, OSError) as error:
        report.add("file-unreadable", str(path), value=str(error))
        return _Annotation(("none", "none"), [])
    objects = []
    for index, item in enumerate(tree.findall("object")):
        try:
            objects.append(_read_object(item, f"{stem}#{index}"))
        except ValueError as error:
            report.add("object-malformed", str(path), f"object {index}", value=str(error))
    return _Annotation(_declared_size(tree), objects)


def _declared_size(tree: ElementTree.Element) -> tuple[str, str]:
    """Width and height that an XML file states, as text."""
    width, height = ((tree.findtext(f"size/{side}") or "").strip() or "none" for side in ("width", "height"))
    return width, height


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    rest = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + rest


def _read_split(root: Path, split: str, notes: dict[str, list[str]]) -> list[str]:
    """Names of the split's records, without their ending, each once."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise ValueError(f"no split file {str(path)!r}; splits there: {', '.join(found) or 'none'}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"split file {str(path)!r} lists no images")
    labelled = [re.fullmatch(r"(.*\S)\s+(-1|0|1)", line) for line in lines]
    if all(labelled) and not (root / "Annotations" / f"{lines[0]}.xml").is_file():
        raise ValueError(
            f"split file {str(path)!r} marks the images of one class (name and -1, 0 or 1 a line); "
            "name a split that lists images alone"
        )
    outside = [line for line in lines if PurePosixPath(line).is_absolute() or ".." in PurePosixPath(line).parts]
    if outside:
        raise ValueError(f"split file {str(path)!r} names files outside the folder: {_listed(outside)}")
    stems = list(dict.fromkeys(lines))
    repeated = [line for line, count in collections.Counter(lines).items() if count > 1]
    if repeated:
        notes["lines repeated in the split file, used once"].extend(repeated)
    return stems


def _find_images(root: Path, stems: Sequence[str]) -> dict[str, str]:
    """Image file of each record, relative to ``JPEGImages``; raises with all files that are missing."""
    folder = root / "JPEGImages"
    found = _index_images(folder)
    missing = [f"Annotations/{s}.xml" for s in stems if not (root / "Annotations" / f"{s}.xml").is_file()]
    missing += [f"JPEGImages/{s}.jpg" for s in stems if s not in found]
    if missing:
        raise ValueError(f"{len(missing)} files are missing in {str(root)!r}: {_listed(missing)}")
    several = [" and ".join(found[s]) for s in stems if len(found[s]) > 1]
    if several:
        raise ValueError(f"images of the same name in {str(folder)!r}: {_listed(several)}")
    return {stem: found[stem][0] for stem in stems}


def _index_images(folder: Path) -> dict[str, list[str]]:
    """Image files below a folder, by their name without its ending."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS:
            name = path.relative_to(folder).as_posix()
            found[name[: -len(path.suffix)]].append(name)
    return dict(found)


def _parse(path: Path) -> ElementTree.Element:
    """
    The root element of an XML file.

    Raises:
        ValueError: if it is not XML, or has a DOCTYPE: that is where entities are defined, which can point
            to other files or grow without bound, and an annotation needs none.
    """

    def refuse(*_: object) -> None:
        raise ValueError("has a DOCTYPE, which an annotation does not need; refused")

    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"not valid XML: {error}") from error
    return builder.close()


def _read_annotation(root: Path, stem: str) -> _Annotation:
    """The annotation of a record; raises with the file's name in front."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = _parse(path)
        objects = [_read_object(item, f"{stem}#{i}") for i, item in enumerate(tree.findall("object"))]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _Annotation(_declared_size(tree), objects)


def _read_object(item: ElementTree.Element, record: str) -> _Object:
    number = record.rpartition("#")[2]
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"object {number} has no name")
    texts = [(item.findtext(f"bndbox/{corner}") or "").strip() for corner in _CORNERS]
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        got = " ".join(f"{corner}={text!r}" for corner, text in zip(_CORNERS, texts, strict=True))
        raise ValueError(f"bndbox of object {number} needs four finite numbers, got {got}")
    xmin, ymin, xmax, ymax = (int(value) if value.is_integer() else value for value in values)
    return _Object(record, name, (xmin, ymin, xmax, ymax), (item.findtext("difficult") or "").strip() == "1")


def _class_names(root: Path, annotations: dict[str, _Annotation], notes: dict[str, list[str]]) -> list[str]:
    """Sorted names in all annotations of the folder, those outside the split included."""
    names = {item.name for annotation in annotations.values() for item in annotation.objects}
    folder = root / "Annotations"
    for path in sorted(folder.rglob("*.xml")):
        stem = path.relative_to(folder).as_posix().removesuffix(".xml")
        if stem in annotations:
            continue
        try:
            names.update((item.findtext("name") or "").strip() for item in _parse(path).findall("object"))
        except ValueError:
            notes["annotations outside the split, unreadable, not searched for classes"].append(stem)
    names.discard("")
    return sorted(names)


def _check_classes(names: Sequence[str], annotations: dict[str, _Annotation]) -> None:
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"class names must be at least one, none empty or twice, got {list(names)}")
    found = {item.name for annotation in annotations.values() for item in annotation.objects}
    if found - set(names):
        raise ValueError(
            f"classes {', '.join(sorted(found - set(names)))} are in the data but not in --classes {','.join(names)}"
        )


def _image_size(path: Path, stem: str, notes: dict[str, list[str]]) -> tuple[int, int]:
    """Width and height as Detectron2 reads the image: turned as its EXIF orientation says."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not an image that can be read: {error}") from error
    if turned:
        notes["images turned by their EXIF orientation"].append(stem)
        return height, width
    return width, height


def _coco_box(item: _Object, width: int, height: int, notes: dict[str, list[str]]) -> list[float] | None:
    """The box as x, y, width, height inside the image; None if nothing is left of it."""
    xmin, ymin, xmax, ymax = item.corners
    if xmax < xmin or ymax < ymin:
        notes["boxes that end before they start, dropped"].append(item.record)
        return None
    left, top = max(xmin - 1, 0), max(ymin - 1, 0)
    right, bottom = min(xmax, width), min(ymax, height)
    if right <= left or bottom <= top:
        notes["boxes outside the image, dropped"].append(item.record)
        return None
    if (left, top, right, bottom) != (xmin - 1, ymin - 1, xmax, ymax):
        notes["boxes that reach outside the image, clipped"].append(item.record)
    if right - left <= 1 or bottom - top <= 1:
        notes["boxes one pixel wide or high, kept"].append(item.record)
    return [left, top, right - left, bottom - top]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _report(content: dict[str, Any], names: Sequence[str], notes: dict[str, list[str]]) -> VocReport:
    boxes = dict.fromkeys(names, 0)
    bands = {name: dict.fromkeys(SIZE_BANDS, 0) for name in names}
    images: dict[str, set[int]] = {name: set() for name in names}
    for item in content["annotations"]:
        name = names[item["category_id"] - 1]
        boxes[name] += 1
        bands[name][SIZE_BANDS[(item["area"] >= 32**2) + (item["area"] >= 96**2)]] += 1
        images[name].add(item["image_id"])
    in_images = {name: len(ids) for name, ids in images.items()}
    return VocReport(len(content["images"]), len(content["annotations"]), boxes, in_images, bands, dict(notes))
