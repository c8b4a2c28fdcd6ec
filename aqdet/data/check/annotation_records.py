"""Checks of a dataset's annotations: ids, classes, boxes, segmentations and flags."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

from ..formats.source import Source
from .findings import Report
from .image_records import UsableImage
from .segmentations import check_segmentation, is_polygons, is_rle
from .values import box_of_polygons, four_numbers, integer_of, polygon_of_box, whole_number

__all__ = ["AnnotationRecords"]

# Pixels that a box of decimal or of whole numbers may reach outside by rounding, and the side of a thin box.
ROUNDING = 1e-3
EDGE = 1.0
THIN = 1.0
# Number of boxes from which on all together say whether they are corners or sizes.
_FEW = 4


class AnnotationRecords:
    """
    The pass over the annotations of one dataset.

    Args:
        source: the dataset's records.
        report: receives the findings.
        images: the usable images by their id, which count their boxes.
        masks: whether segmentations are checked as a training of masks reads them.

    Attributes:
        of_class: number of usable boxes and crowd regions of each class.
    """

    def __init__(self, source: Source, report: Report, images: dict[int, UsableImage], *, masks: bool = False) -> None:
        self.source = source
        self.report = report
        self.images = images
        self.masks = masks
        self.of_class: collections.Counter[int] = collections.Counter()
        self._ids: set[int] = {0}
        self._refused: set[int | str] = set()
        # A name that is a number could be an id.
        self._ids_of_names = {
            name.strip(): key
            for key, name in source.categories.items()
            if source.format in ("coco", "yolo") and whole_number(name) is None
        }
        self._next_id = 1
        self._objects: set[tuple[Any, ...]] = set()
        # Boxes with an area, those that end before they start, and the sizes of their images.
        self._raw_boxes: list[tuple[list[float], tuple[int, int]]] = []
        self._negative_boxes: list[tuple[list[float], tuple[int, int] | None]] = []

    def check(self) -> list[dict[str, Any]]:
        """Checks all annotations; returns the usable ones."""
        ids = (raw.get("id") for raw in self.source.annotations if isinstance(raw, dict))
        self._next_id = 1 + max((key for key in ids if type(key) is int), default=0)
        for raw in self.source.images:
            if isinstance(raw, dict):
                number = whole_number(raw.get("id"))
                self._refused.add(repr(raw.get("id")) if number is None else number)
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
        image_id = whole_number(raw.get("image_id"))
        image = None if image_id is None else self.images.get(image_id)
        if image is None:
            # The image was refused, which is a finding already.
            named = repr(raw.get("image_id")) if image_id is None else image_id
            if raw.get("image_id") is None or named not in self._refused:
                self.report.add("annotation-nowhere", *place, "image_id", raw.get("image_id"))
            return None
        category = self._category(place, raw.get("category_id"))
        image.refused |= category is None
        segmentation = self._segmentation(place, raw)
        box = self._box(place, raw, segmentation, image.size)
        crowd = self._crowd(place, raw)
        if box is None or category is None:
            return None
        self._same_object(place, image_id, category, box)
        area = self._area(place, raw, box)
        if self.masks and raw.get("segmentation"):
            segmentation = check_segmentation(self.report, place, raw["segmentation"], box, image.size)
            if segmentation is None:
                segmentation, crowd = [polygon_of_box(box)], 1
        elif self.masks and crowd:  # without which the masks of the whole dataset could not be evaluated
            segmentation = [polygon_of_box(box)]
        image.boxes += not crowd
        self.of_class[category] += 1
        fixed = {"id": key, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
        return {**fixed, "segmentation": segmentation} if segmentation else fixed

    def _category(self, place: tuple[str, str], value: Any) -> int | None:
        refused = self.source.refused_categories
        if not self.source.categories and self.report.number("error"):
            # There is no class at all, which is a finding already.
            return None
        if isinstance(value, int | float | str) and (value in refused or whole_number(value) in refused):
            # The category was refused, which is a finding already.
            return None
        if isinstance(value, str) and value.strip() in self._ids_of_names:
            self.report.add("class-type", *place, "category_id", value)
            return self._ids_of_names[value.strip()]
        category = integer_of(self.report, place, "category_id", value, "class-unknown", "class-type")
        if category is not None and category not in self.source.categories:
            self.report.add("class-unknown", *place, "category_id", category)
            return None
        return category

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

    def _segmentation(self, place: tuple[str, str], raw: dict[str, Any]) -> Any:
        """Returns polygons or RLE of the form that Detectron2 reads; None if there is no such segmentation."""
        value = raw.get("segmentation")
        if not value:
            return None
        if is_polygons(value) or is_rle(value):
            return value
        if not self.masks:  # with masks, check_segmentation says it with the other faults
            self.report.add("segmentation-malformed", *place, "segmentation", value)
        return None

    def _crowd(self, place: tuple[str, str], raw: dict[str, Any]) -> int:
        flags = {}
        for field in ("iscrowd", "ignore"):
            value = raw.get(field, 0)
            if field == "iscrowd" and field not in raw and self.source.format == "coco":
                self.report.add("crowd-absent", *place)
            flag = int(value) if isinstance(value, bool) else whole_number(value)
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
        """Returns x, y, width, height in pixels, inside the image; None if there is no such box."""
        add = self.report.add
        value = raw.get("bbox")
        if value is None or value == []:
            if not isinstance(segmentation, list):
                add("box-missing", *place, "bbox", value)
                return None
            add("box-from-polygon", *place)
            value = box_of_polygons(segmentation)
        box = four_numbers(value)
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
            self._negative_boxes.append((box, size))
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

    def check_whole(self) -> None:
        """Adds findings that only all boxes together show: other units, or sizes and corners in each other's place."""
        boxes = self._raw_boxes
        if self.source.normalised:
            return
        file = self.source.file
        # VOC's boxes start a pixel further left and above, and end where the file says.
        if boxes and all(max(box) <= 1 or max(box[0] + box[2], box[1] + box[3]) <= 1 for box, _ in boxes):
            self.report.add("boxes-normalised", file, value=f"{len(boxes)} boxes, e.g. {boxes[0][0]}")
        elif self.source.states_sides:
            over = sum(x + w > side_x + EDGE or y + h > side_y + EDGE for (x, y, w, h), (side_x, side_y) in boxes)
            fit = all(w > x and h > y and w <= side_x and h <= side_y for (x, y, w, h), (side_x, side_y) in boxes)
            if fit and len(boxes) >= _FEW and over * 4 >= len(boxes):
                value = f"{over} of {len(boxes)} boxes reach outside, and all fit as corners"
                self.report.add("boxes-corners", file, value=value)
        else:
            negatives = [(box, size) for box, size in self._negative_boxes if size is not None]
            every, negative = boxes + negatives, len(negatives)
            fit = all(
                x + w >= 0 and y + h >= 0 and 2 * x + w <= side_x + EDGE and 2 * y + h <= side_y + EDGE
                for (x, y, w, h), (side_x, side_y) in every
            )
            if fit and len(every) >= _FEW and negative * 4 >= len(every):
                value = f"{negative} of {len(every)} boxes end before they start, and all fit as x, y, width, height"
                self.report.add("boxes-sides", file, value=value)
