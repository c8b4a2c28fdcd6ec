"""Checks of a dataset's images: their records, and their files as the reader sees them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ..formats.source import Source
from .findings import Report
from .image_files import ScannedImage, scan_images
from .images import ImageFolder
from .values import integer_of, whole_number

__all__ = ["ImageRecords", "UsableImage"]


@dataclasses.dataclass
class UsableImage:
    """
    An image that can be used; `size` is (width, height), or None if it is not known.

    `refused` says whether an object of it is of a class that is an error.
    """

    name: str
    size: tuple[int, int] | None
    boxes: int = 0
    refused: bool = False


class ImageRecords:
    """
    The pass over the images of one dataset.

    Args:
        source: the dataset's records.
        report: receives the findings.
        pixels: whether every image is decoded; else images are opened only where their size is not stated.

    Attributes:
        known: the usable images by their id.
        colours: result of :func:`aqdet.data.check.statistics.colours_of` for each image whose pixels were read.
    """

    def __init__(self, source: Source, report: Report, *, pixels: bool) -> None:
        self.source = source
        self.report = report
        self.pixels = pixels
        self.folder = ImageFolder(source.image_root)
        self.known: dict[int, UsableImage] = {}
        self.colours: list[tuple[float, ...]] = []
        self._ids: set[int] = set()

    def check(self) -> list[dict[str, Any]]:
        """Checks all images; returns the usable ones."""
        named = [entry for index, raw in enumerate(self.source.images) if (entry := self._named(index, raw))]
        entries = []
        for (place, key, name, raw), (found, kind) in zip(
            named, self.folder.find_all([name for _, _, name, _ in named]), strict=True
        ):
            if kind in ("image-missing", "image-outside"):
                self.report.add(kind, *place, "file_name", found)
                self.known[key] = UsableImage(name, None)
                continue
            if kind:
                self.report.add(kind, *place, "file_name", name if kind == "image-path" else f"{name} -> {found}")
            entries.append((place, key, found, self._stated_size(place, raw)))
        paths = [os.path.join(self.source.image_root, name) for _, _, name, _ in entries]
        depths = [self._depth(stated) for *_, stated in entries]
        self.source.inputs.update(paths)
        scanned = scan_images(paths, depths, title=f"images of {self.report.name}")
        usable = []
        for (place, key, name, stated), file in zip(entries, scanned, strict=True):
            size = self._image_size(place, name, stated, file)
            self.known[key] = UsableImage(name, size)
            self.report.images[name] = file.digest or self.folder.real_path(name)
            if file.colours:
                self.colours.append(file.colours)
            width, height = size or (0, 0)
            usable.append({"id": key, "file_name": name, "width": width, "height": height})
        self._same_pixels()
        if not self.source.images and not self.report.refused(strict=False):
            self.report.add("no-images", self.source.file)
        return usable

    def _named(self, index: int, raw: Any) -> tuple[tuple[str, str], int, str, dict[str, Any]] | None:
        """Returns (place, id, file name, record) of an image; None if it lacks an id or a file name, with a finding."""
        add = self.report.add
        if not isinstance(raw, dict):
            add("record-malformed", self.source.file, f"images[{index}]", value=raw)
            return None
        if self.source.image_places:
            place = self.source.image_places[index]
        else:
            place = (self.source.file, f"image {raw['id']}" if "id" in raw else f"images[{index}]")
        key = integer_of(self.report, place, "id", raw.get("id"), "image-id", "image-id-type")
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
        return place, key, name, raw

    def _stated_size(self, place: tuple[str, str], raw: dict[str, Any]) -> tuple[int, int] | None:
        if self.source.normalised or not self.source.states_sizes:
            return None
        sides = []
        for field in ("width", "height"):
            value = raw.get(field)
            number = whole_number(value)
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
