"""
One pass over a dataset of any format: every problem in one report, and the data as they will be used.

The readers of the formats turn files into records like those of COCO JSON, as the files have them. Here every
record is held against the policy of :mod:`aqdet.data.check.findings`. What remains is a COCO annotation file with the
original ids, which training and evaluation both read: what is dropped or repaired in one is in the other.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from .findings import Report
from .images import IMAGE_ENDINGS, ImageFolder, ScannedImage, scan_images

__all__ = ["Source", "check_image_folder", "check_source", "find_shared_images", "read_coco"]

# In pixels: by how much a box may reach outside for it to be rounding, of text and of whole pixels; a thin box.
ROUNDING = 1e-3
EDGE = 1.0
THIN = 1.0


@dataclasses.dataclass
class Source:
    """
    A dataset's records as its files have them.

    Attributes:
        format: ``"coco"``, ``"voc"`` or ``"yolo"``.
        file: the annotation file that is named where a record has none of its own.
        image_root: folder of the images, and of everything read.
        images: entries with ``id, file_name`` and, where stated, ``width, height``.
        annotations: entries with ``id, image_id, category_id, bbox`` and what else COCO has.
        categories: id -> name.
        image_places, annotation_places: (file, record) of each entry, where not `file` and the id.
        inputs: files and folders that were read, for the fingerprint.
        normalised: whether boxes are relative to the size of the image.
    """

    format: str
    file: str
    image_root: str
    images: list[Any] = dataclasses.field(default_factory=list)
    annotations: list[Any] = dataclasses.field(default_factory=list)
    categories: dict[int, str] = dataclasses.field(default_factory=dict)
    image_places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    annotation_places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    inputs: set[str] = dataclasses.field(default_factory=set)
    normalised: bool = False


@dataclasses.dataclass
class _Image:
    """An image that can be used; `size` is (width, height), or None if not known."""

    name: str
    size: tuple[int, int] | None
    boxes: int = 0


def read_coco(json_file: str, image_root: str, report: Report) -> Source:
    """Reads a COCO annotation file; what it lacks as a whole goes into the report."""
    source = Source("coco", json_file, image_root, inputs={json_file})
    try:
        with open(json_file, "rb") as file:
            data = file.read()
        if data.startswith(b"\xef\xbb\xbf"):
            report.add("file-bom", json_file)
        content = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        report.add("file-unreadable", json_file, value=f"not JSON: {error}")
        return source
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            report.add("file-format", json_file, field=part, value=f"not COCO JSON: it has no list {part!r}")
            return source
    source.images, source.annotations = content["images"], content["annotations"]
    for index, category in enumerate(content["categories"]):
        record = f"categories[{index}]"
        if not isinstance(category, dict):
            report.add("category-malformed", json_file, record, value=category)
            continue
        key, name = category.get("id"), category.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            report.add("category-name-type", json_file, record, "name", name)
            name = str(name)
        if (
            isinstance(key, int)
            and not isinstance(key, bool)
            and isinstance(name, str)
            and name.strip()
            and key not in source.categories
            and name not in source.categories.values()
        ):
            source.categories[key] = name
        else:
            report.add("category-malformed", json_file, record, value=category)
    if not source.categories and not report.counts["category-malformed"]:
        report.add("file-format", json_file, field="categories", value="'categories' is empty")
    return source


def check_source(source: Source, report: Report, *, pixels: bool) -> dict[str, Any]:
    """
    Checks a dataset.

    Args:
        source: its records.
        report: what is found is added to it.
        pixels: whether every image is decoded; else images are opened only where their size is not stated.

    Returns:
        the records that can be used, as COCO JSON has them.
    """
    checker = _Checker(source, report, pixels)
    images = checker.images()
    annotations = checker.annotations()
    checker.whole()
    report.categories = dict(sorted(source.categories.items()))
    categories = [{"id": key, "name": name} for key, name in report.categories.items()]
    report.facts = {
        "images": len(images),
        "of them without boxes": sum(image.boxes == 0 for image in checker.known.values()),
        "boxes": sum(not a["iscrowd"] for a in annotations),
        "crowd regions": sum(a["iscrowd"] for a in annotations),
    }
    return {"images": images, "annotations": annotations, "categories": categories}


def check_image_folder(root: str, classes: Sequence[str], report: Report, *, pixels: bool) -> Source:
    """
    Checks a folder that has a folder of images for each class; links are followed.

    Args:
        root: the folder.
        classes: names of the folders in it.
        report: what is found is added to it.
        pixels: whether every image is decoded.

    Returns:
        what was read.
    """
    source = Source("folder", root, root, categories=dict(enumerate(classes)), inputs={root})
    names: list[str] = []
    for name in classes:
        found = False
        for folder, _, files in os.walk(os.path.join(root, name)):
            source.inputs.add(folder)
            for file in sorted(files):
                path = os.path.join(folder, file)
                if not file.lower().endswith(IMAGE_ENDINGS):
                    report.add("file-ignored", path)
                    continue
                names.append(os.path.relpath(path, root))
                found = True
        if not found:
            report.add("no-images", os.path.join(root, name))
    paths = [os.path.join(root, name) for name in names]
    source.inputs.update(paths)
    scanned = scan_images(paths, ["pixels" if pixels else "stat"] * len(paths), title=f"images of {report.name}")
    first: dict[str, str] = {}
    for name, path, image in zip(names, paths, scanned, strict=True):
        for kind, value in image.findings:
            report.add(kind, path, value=value)
        identity = image.digest or os.path.realpath(path)
        report.images[name] = identity
        if identity in first:
            report.add("image-twice", path, field="also", value=first[identity])
        first.setdefault(identity, name)
    report.categories = source.categories
    report.facts = {"images": len(names), "classes": len(classes)}
    return source


def find_shared_images(first: Report, second: Report) -> None:
    """Adds to the second report the images that the first dataset has too."""
    known = {identity: name for name, identity in first.images.items()}
    for name, identity in second.images.items():
        if identity in known:
            report_file = f"{second.name}: {name}"
            second.add("image-in-two-sets", report_file, field="also", value=f"{first.name}: {known[identity]}")


class _Checker:
    """The pass over one dataset; `known` are the usable images by their id."""

    def __init__(self, source: Source, report: Report, pixels: bool) -> None:
        self.source = source
        self.report = report
        self.pixels = pixels
        self.folder = ImageFolder(source.image_root)
        self.known: dict[int, _Image] = {}
        self._ids: set[int] = set()
        self._refused: set[int | None] = set()
        self._next_id = 1
        self._objects: set[tuple[Any, ...]] = set()
        self._of_class: collections.Counter[int] = collections.Counter()
        self._raw_boxes: list[tuple[list[float], tuple[int, int]]] = []

    # --- Images ---

    def images(self) -> list[dict[str, Any]]:
        """Checks all images; returns the usable ones."""
        entries = []
        for index, raw in enumerate(self.source.images):
            entry = self._image_entry(index, raw)
            if entry is not None:
                entries.append(entry)
        paths = [os.path.join(self.source.image_root, name) for _, _, name, _ in entries]
        depths = [self._depth(stated) for *_, stated in entries]
        self.source.inputs.update(paths)
        scanned = scan_images(paths, depths, title=f"images of {self.report.name}")
        usable = []
        for (place, key, name, stated), found in zip(entries, scanned, strict=True):
            size = self._image_size(place, name, stated, found)
            self.known[key] = _Image(name, size)
            self.report.images[name] = found.digest or self.folder.real_path(name)
            width, height = size or (0, 0)
            usable.append({"id": key, "file_name": name, "width": width, "height": height})
        self._same_pixels()
        if not self.source.images and not self.report.refused(strict=False):
            self.report.add("no-images", self.source.file)
        return usable

    def _image_entry(self, index: int, raw: Any) -> tuple[tuple[str, str], int, str, Any] | None:
        """(place, id, file name, stated (width, height) or None) of an image whose file exists."""
        add = self.report.add
        if not isinstance(raw, dict):
            add("record-malformed", self.source.file, f"images[{index}]", value=raw)
            return None
        if self.source.image_places:
            place = self.source.image_places[index]
        else:
            place = (self.source.file, f"image {raw['id']}" if "id" in raw else f"images[{index}]")
        key = self._integer(place, "id", raw.get("id"), "image-id", "image-id-type")
        name = raw.get("file_name")
        if not isinstance(name, str) or not name.strip():
            add("image-name", *place, "file_name", name)
            return None
        if key is None:
            return None
        if key in self._ids:
            add("image-id-twice", *place, "file_name", name)
            return None
        self._ids.add(key)
        found, kind = self.folder.find(name)
        if kind:
            add(kind, *place, "file_name", name if kind == "image-path" else found)
        if kind and kind != "image-path":
            self.known[key] = _Image(name, None)
            return None
        return place, key, found, self._stated_size(place, raw)

    def _stated_size(self, place: tuple[str, str], raw: dict[str, Any]) -> tuple[int, int] | None:
        if self.source.normalised:
            return None
        sides = []
        for field in ("width", "height"):
            value = raw.get(field)
            number = _whole(value)
            if number is None or number <= 0:
                self.report.add("image-size-absent", *place, field, value)
                return None
            if type(value) is not int:
                self.report.add("image-size-type", *place, field, value)
            sides.append(number)
        return sides[0], sides[1]

    def _depth(self, stated: tuple[int, int] | None) -> str:
        if self.pixels:
            return "pixels"
        return "stat" if stated is not None and self.source.format == "coco" else "header"

    def _image_size(
        self, place: tuple[str, str], name: str, stated: tuple[int, int] | None, found: ScannedImage
    ) -> tuple[int, int] | None:
        path = os.path.join(self.source.image_root, name)
        for kind, value in found.findings:
            self.report.add(kind, path, place[1], value=value)
        size = (found.width, found.height)
        if not found.width:
            return stated
        if stated is not None and stated != size:
            before_turn = found.turned and stated == size[::-1]
            kind = "image-size-exif" if before_turn else "image-size"
            value = f"{stated[0]}x{stated[1]} stated, {size[0]}x{size[1]} read"
            self.report.add(kind, *place, "width, height", f"{value}: {name}")
        return size

    def _same_pixels(self) -> None:
        first: dict[str, str] = {}
        names: set[str] = set()
        for key, image in self.known.items():
            if image.name in names:
                self.report.add("image-listed-twice", self.source.file, f"image {key}", "file_name", image.name)
            names.add(image.name)
        for name, identity in self.report.images.items():
            if identity in first:
                path = os.path.join(self.source.image_root, name)
                self.report.add("image-twice", path, field="also", value=first[identity])
            first.setdefault(identity, name)

    # --- Annotations ---

    def annotations(self) -> list[dict[str, Any]]:
        """Checks all annotations; returns the usable ones."""
        ids = (raw.get("id") for raw in self.source.annotations if isinstance(raw, dict))
        self._next_id = 1 + max((key for key in ids if type(key) is int), default=0)
        self._ids = {0}
        image_ids = (_whole(raw.get("id")) for raw in self.source.images if isinstance(raw, dict))
        self._refused = set(image_ids) - set(self.known)
        usable = []
        for index, raw in enumerate(self.source.annotations):
            if not isinstance(raw, dict):
                self.report.add("record-malformed", self.source.file, f"annotations[{index}]", value=raw)
                continue
            annotation = self._annotation(index, raw)
            if annotation is not None:
                usable.append(annotation)
        return usable

    def _annotation(self, index: int, raw: dict[str, Any]) -> dict[str, Any] | None:
        if self.source.annotation_places:
            place = self.source.annotation_places[index]
        else:
            place = (self.source.file, f"annotation {raw['id']}" if "id" in raw else f"annotations[{index}]")
        key = self._annotation_id(place, raw)
        image_id = _whole(raw.get("image_id"))
        image = None if image_id is None else self.known.get(image_id)
        if image is None:
            # One of an image that was refused is no finding of its own.
            if image_id is None or image_id not in self._refused:
                self.report.add("annotation-nowhere", *place, "image_id", raw.get("image_id"))
            return None
        category = self._integer(place, "category_id", raw.get("category_id"), "class-unknown", "class-type")
        if category is not None and category not in self.source.categories:
            self.report.add("class-unknown", *place, "category_id", category)
            category = None
        segmentation = self._segmentation(place, raw)
        box = self._box(place, raw, segmentation, image.size)
        crowd = self._crowd(place, raw)
        if box is None or category is None:
            return None
        self._same_object(place, image_id, category, box)
        area = self._area(place, raw, box)
        image.boxes += not crowd
        self._of_class[category] += 1
        fixed = {"id": key, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
        return {**fixed, "segmentation": segmentation} if segmentation else fixed

    def _annotation_id(self, place: tuple[str, str], raw: dict[str, Any]) -> int:
        key = raw.get("id")
        if type(key) is int and key not in self._ids:
            self._ids.add(key)
            return key
        twice = type(key) is int and key != 0
        self.report.add("annotation-id-twice" if twice else "annotation-id", *place, "id", key)
        key, self._next_id = self._next_id, self._next_id + 1
        self._ids.add(key)
        return key

    def _integer(self, place: tuple[str, str], field: str, value: Any, error: str, repaired: str) -> int | None:
        number = _whole(value)
        if number is None:
            self.report.add(error, *place, field, value)
        elif type(value) is not int:
            self.report.add(repaired, *place, field, value)
        return number

    def _segmentation(self, place: tuple[str, str], raw: dict[str, Any]) -> Any:
        """Polygons or RLE that Detectron2 reads; None if there is none."""
        value = raw.get("segmentation")
        if not value:
            return None
        if isinstance(value, dict):
            counts, size = value.get("counts"), value.get("size")
            sized = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
            if isinstance(counts, str | list) and sized:
                return value
        elif isinstance(value, list):
            if all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _all_finite(p) for p in value):
                return value
        self.report.add("segmentation-malformed", *place, "segmentation", value)
        return None

    def _crowd(self, place: tuple[str, str], raw: dict[str, Any]) -> int:
        flags = {}
        for field in ("iscrowd", "ignore"):
            value = raw.get(field, 0)
            if field == "iscrowd" and field not in raw and self.source.format == "coco":
                self.report.add("crowd-absent", *place)
            flag = int(value) if isinstance(value, bool) else _whole(value)
            if flag not in (0, 1):
                self.report.add("crowd-malformed", *place, field, value)
                flag = 0
            elif type(value) is not int:
                self.report.add("crowd-type", *place, field, value)
            flags[field] = flag
        if flags["iscrowd"]:
            self.report.add("crowd", *place)
        elif flags["ignore"]:
            self.report.add("ignore-region", *place)
        return int(any(flags.values()))

    def _box(
        self, place: tuple[str, str], raw: dict[str, Any], segmentation: Any, size: tuple[int, int] | None
    ) -> list[float] | None:
        """x, y, width, height in pixels, inside the image; None if there is no such box."""
        add = self.report.add
        value = raw.get("bbox")
        if value is None or value == []:
            if not isinstance(segmentation, list):
                add("box-missing", *place, "bbox", value)
                return None
            add("box-from-polygon", *place)
            value = _box_of_polygons(segmentation)
        box = _numbers(value)
        if box is None:
            add("box-malformed", *place, "bbox", value)
            return None
        if not all(map(math.isfinite, box)):
            add("box-not-finite", *place, "bbox", value)
            return None
        if any(isinstance(number, str) for number in value):
            add("box-text", *place, "bbox", value)
        if size is not None and self.source.normalised:
            box = [number * side for number, side in zip(box, size * 2, strict=True)]
        x, y, width, height = box
        if width < 0 or height < 0:
            add("box-negative", *place, "bbox", value)
            return None
        if width == 0 or height == 0:
            add("box-empty", *place, "bbox", value)
            return None
        if size is None:
            return box
        self._raw_boxes.append((box, size))
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
        if right <= left or bottom <= top:
            add("box-outside", *place, "bbox", f"{json.dumps(value)} in {size[0]}x{size[1]}")
            return None
        over = max(-x, -y, x + width - size[0], y + height - size[1])
        if over > EDGE:
            add("box-clipped", *place, "bbox", f"{json.dumps(value)} in {size[0]}x{size[1]}")
        elif over > ROUNDING:
            add("box-edge", *place, "bbox", value)
        if over > ROUNDING:
            box = [left, top, right - left, bottom - top]
        if min(box[2:]) <= THIN:
            add("box-thin", *place, "bbox", value)
        return box

    def _area(self, place: tuple[str, str], raw: dict[str, Any], box: list[float]) -> float:
        of_box = box[2] * box[3]
        value = raw.get("area")
        if value is None:
            if self.source.format == "coco":
                self.report.add("area-absent", *place)
            return of_box
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= of_box * 1.01 + 1:
            return value
        clipped = raw.get("bbox") != box and isinstance(value, int | float) and value > of_box
        if not clipped:
            self.report.add("area-wrong", *place, "area", value)
        return of_box

    def _same_object(self, place: tuple[str, str], image_id: int | None, category: int, box: list[float]) -> None:
        known = (image_id, category, *box)
        if known in self._objects:
            self.report.add("box-twice", *place, "bbox", box)
        self._objects.add(known)

    # --- The whole ---

    def whole(self) -> None:
        """What only all records together show."""
        add, file = self.report.add, self.source.file
        for key, image in self.known.items():
            if not image.boxes and image.size is not None:
                add("image-without-boxes", file, f"image {key}", "file_name", image.name)
        for key, name in self.source.categories.items():
            if not self._of_class[key]:
                add("class-without-boxes", file, f"category {key}", "name", name)
        if self.known and not self._of_class:
            add("no-boxes", file)
        boxes = self._raw_boxes
        if not boxes or self.source.format != "coco":
            return
        if all(max(box) <= 1 for box, _ in boxes):
            add("boxes-normalised", file, value=f"{len(boxes)} boxes, e.g. {boxes[0][0]}")
        as_corners = all(w > x and h > y and w <= side_x and h <= side_y for (x, y, w, h), (side_x, side_y) in boxes)
        over = sum(x + w > side_x + EDGE or y + h > side_y + EDGE for (x, y, w, h), (side_x, side_y) in boxes)
        if as_corners and len(boxes) >= 4 and over * 4 >= len(boxes):
            add("boxes-corners", file, value=f"{over} of {len(boxes)} boxes reach outside, and all fit as corners")


def _whole(value: Any) -> int | None:
    """An integer that is given as one, as a float without fraction, or as the text of one."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return _whole(float(value)) if "." in value else int(value)
        except (ValueError, OverflowError):
            return None
    return None


def _numbers(value: Any) -> list[float] | None:
    """Four numbers, given as such or as text."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    numbers = []
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float | str):
            return None
        try:
            as_float = float(number)
        except (ValueError, OverflowError):
            return None
        numbers.append(as_float if isinstance(number, str) else number)
    return numbers


def _all_finite(values: list[Any]) -> bool:
    try:
        return {*map(type, values)} <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:
        return False


def _box_of_polygons(polygons: Sequence[Sequence[float]]) -> list[float]:
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
