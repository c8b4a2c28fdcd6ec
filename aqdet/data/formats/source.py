"""The records of a dataset as its files have them, which every reader returns and the check reads."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Source"]


@dataclasses.dataclass
class Source:
    """
    A dataset's records as its files have them, faults included.

    Attributes:
        format: name of the format, a key of :data:`aqdet.data.formats.FORMATS`.
        file: the annotation file that findings name if a record has no file of its own.
        image_root: folder of the images; no image outside of it is read.
        images: entries with ``id, file_name`` and, where stated, ``width, height``.
        annotations: entries with ``id, image_id, category_id, bbox`` and COCO's other fields.
        categories: id -> name.
        refused_categories: ids of categories that the reader has refused; their objects are no further findings.
        image_places, annotation_places: (file, record) of each entry, unless they are `file` and the id.
        label_files: the annotation file of each image, where each image has one that `image_places` does not name.
        unread_files: annotation file of one image that could not be read, and has no entry -> images of its name.
        inputs: files and folders that were read, for the cache's fingerprint.
        normalised: whether boxes are relative to the size of the image.
        states_sizes: whether the format states the sizes of images, so that a missing one is a fault.
        states_sides: whether the files give boxes as x, y, width, height, and not by two corners.
    """

    format: str
    file: str
    image_root: str
    images: list[Any] = dataclasses.field(default_factory=list)
    annotations: list[Any] = dataclasses.field(default_factory=list)
    categories: dict[int, str] = dataclasses.field(default_factory=dict)
    refused_categories: set[Any] = dataclasses.field(default_factory=set)
    image_places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    annotation_places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    label_files: list[str] = dataclasses.field(default_factory=list)
    unread_files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    inputs: set[str] = dataclasses.field(default_factory=set)
    normalised: bool = False
    states_sizes: bool = True
    states_sides: bool = False
