"""A collector of images and objects of named classes into the records of one :class:`Source`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..check.findings import Report
from ..declaration import Declaration
from .outlines import Outline
from .source import Source

__all__ = ["CLASS_NAMES", "Collector", "says_yes"]

# Names of the field with the class of an object, in lower case, the most telling first.
CLASS_NAMES = (
    *("class", "class_name", "classname", "class name", "label", "label_name", "labelname", "category"),
    *("category_name", "object_class", "object", "name", "type"),
)

# Texts that mean yes in an attribute such as "difficult".
_YES = ("1", "true", "yes", "y")


class Collector:
    """
    Adds records to a source, and gives the classes their ids at the end, from 1.

    Args:
        source: receives the records.
        report: receives the findings.
        declaration: the dataset. Its classes are used if it has some, else those that the files declare, else the
            sorted names of all objects.
    """

    def __init__(self, source: Source, report: Report, declaration: Declaration) -> None:
        self.source = source
        self.report = report
        self.difficult_as_crowd = declaration.difficult_as_crowd
        self._declared = None if declaration.classes is None else list(declaration.classes)
        self._labels: list[str] = []

    def declare(self, names: Sequence[str]) -> None:
        """Adds the classes that a file declares, in their order, unless the declaration has classes."""
        if self._declared is None and names:
            self._declared = list(dict.fromkeys(names))

    def add_image(self, name: Any, place: tuple[str, str], width: Any = None, height: Any = None) -> int:
        """Adds an image and returns its id; its size is left out where the format has none."""
        image_id = len(self.source.images) + 1
        sizes = {} if width is None and height is None else {"width": width, "height": height}
        self.source.images.append({"id": image_id, "file_name": name, **sizes})
        self.source.image_places.append(place)
        return image_id

    def add_object(
        self, image_id: int, place: tuple[str, str], label: Any, outline: Outline, *, difficult: bool = False
    ) -> None:
        """Adds an object, or a finding if it has no class."""
        if isinstance(label, int | float) and not isinstance(label, bool):
            self.report.add("category-name-type", *place, "class", label)
            label = str(label)
        if not isinstance(label, str) or not label.strip():
            self.report.add("object-malformed", *place, "class", label if label else "an object without a class")
            return
        if not all(map(math.isfinite, outline.box)):
            self.report.add("box-not-finite", *place, "bbox", outline.box)
            return
        if outline.segmentation is not None:
            self.report.add("box-from-polygon", *place)
        if difficult and not self.difficult_as_crowd:
            self.report.add("difficult", *place)
        annotation = {
            "id": len(self.source.annotations) + 1,
            "image_id": image_id,
            "bbox": outline.box,
            "ignore": int(difficult and self.difficult_as_crowd),
        }
        if outline.segmentation is not None:
            annotation["segmentation"] = outline.segmentation
        self.source.annotations.append(annotation)
        self.source.annotation_places.append(place)
        self._labels.append(label.strip())

    def finish(self) -> Source:
        """Sets the classes and returns the source."""
        names = sorted(set(self._labels)) if self._declared is None else self._declared
        self.source.categories = dict(enumerate(names, 1))
        ids = {name: key for key, name in self.source.categories.items()}
        for annotation, label in zip(self.source.annotations, self._labels, strict=True):
            annotation["category_id"] = ids.get(label, f"{label}: not among the classes")
        return self.source


def says_yes(value: Any) -> bool:
    """Returns whether an attribute such as "difficult" is set: to ``True``, 1, or a text that means yes."""
    return str(value).strip().lower() in _YES
