"""Files of detections: COCO results as JSON, and rows as CSV."""

from __future__ import annotations

import collections
import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..utils.files import open_replacing
from .decode import Detections
from .folder import Description
from .sources import PictureSource

COLUMNS = ("filename", "frame", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", "score")


class CocoResults:
    """Writes detections as COCO results: a list of ``{image_id, category_id, bbox, score}``.

    With masks there is a ``segmentation`` too, as run lengths.

    A category is the id that the detector's folder has for the class, or the class's index if it has none.

    Args:
        file: The open file; :func:`coco_results` opens and completes it.
        description: The description of the detector.
        threshold: The lowest score of a detection that is written.
        image_ids: Name of an image -> its id. The id of any other image is its name without ending if that is a number,
            as for COCO's images, or else its name. Frames of videos have ``name#frame``.
    """

    def __init__(self, file: IO[str], description: Description, threshold: float, image_ids: Mapping[str, Any]) -> None:
        self._file = file
        self._threshold = threshold
        self._image_ids = image_ids
        pairs = enumerate(description.category_ids)
        self._categories = [index if category is None else category for index, category in pairs]
        self._separator = "["

    def add(self, source: PictureSource, frame: int | None, image: np.ndarray, found: Detections) -> None:
        """Writes the detections of an image."""
        image_id = self._image_id(source, frame)
        found = found[found.scores >= self._threshold]
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
        for index, (box, score, cls) in enumerate(rows):
            x1, y1, x2, y2 = box
            entry = {
                "image_id": image_id,
                "category_id": self._categories[cls],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            if found.masks is not None:
                entry["segmentation"] = run_lengths(found.masks[index])
            self._file.write(f"{self._separator}\n{json.dumps(entry)}")
            self._separator = ","

    def finish(self) -> None:
        """Ends the list."""
        self._file.write("[]\n" if self._separator == "[" else "\n]\n")

    def _image_id(self, source: PictureSource, frame: int | None) -> Any:
        if frame is not None:
            return f"{source.name}#{frame}"
        if source.name in self._image_ids:
            return self._image_ids[source.name]
        stem = Path(source.name).stem
        return int(stem) if stem.isdecimal() else source.name


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Returns a mask ``(H, W)`` as COCO's uncompressed RLE: pixels of 0 and of 1 in turn, down the columns."""
    flat = np.concatenate([[False], mask.T.reshape(-1)])
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]), [mask.size]])
    return {"size": list(mask.shape), "counts": np.diff(starts).tolist()}


class CsvRows:
    """Writes a row for each detection: :data:`COLUMNS`, boxes in pixels; ``frame`` is empty for an image.

    Args:
        file: The open file.
        description: The description of the detector.
        threshold: The lowest score of a detection that has a row.
    """

    def __init__(self, file: IO[str], description: Description, threshold: float) -> None:
        self._classes = description.classes
        self._threshold = threshold
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def add(self, source: PictureSource, frame: int | None, image: np.ndarray, found: Detections) -> None:
        """Writes the rows of an image."""
        height, width = image.shape[:2]
        kept = found[found.scores >= self._threshold]
        for box, score, cls in zip(kept.boxes, kept.scores, kept.classes, strict=True):
            place = (source.name, "" if frame is None else frame, width, height, self._classes[cls])
            self._writer.writerow((*place, *(f"{edge:.2f}" for edge in box), f"{score:.5f}"))


@contextlib.contextmanager
def coco_results(
    path: str, description: Description, threshold: float, image_ids: Mapping[str, Any]
) -> Iterator[CocoResults]:
    """Opens :class:`CocoResults`; the file appears when the block ends without an error."""
    with open_replacing(path) as file:
        results = CocoResults(file, description, threshold, image_ids)
        yield results
        results.finish()


@contextlib.contextmanager
def csv_rows(path: str, description: Description, threshold: float) -> Iterator[CsvRows]:
    """Opens :class:`CsvRows`; the file appears when the block ends without an error."""
    with open_replacing(path) as file:
        yield CsvRows(file, description, threshold)


def number_ids(sources: Sequence[PictureSource]) -> dict[str, Any]:
    """Returns the ids of images without an annotation file: the number that is a name, if no other image has it.

    Returns:
        Name of a source -> its number, or its name where several images have one number.
    """
    images = [source.name for source in sources if source.kind == "image"]
    numbers = {name: int(Path(name).stem) for name in images if Path(name).stem.isdecimal()}
    counts = collections.Counter(numbers.values())
    return {name: numbers[name] if counts[numbers.get(name, -1)] == 1 else name for name in images}


def read_image_ids(path: str, sources: Sequence[PictureSource]) -> dict[str, Any]:
    """Reads ids of images from an annotation file in COCO's format.

    An image is found by the end of its path: the longest ``file_name`` that the path ends with.

    Returns:
        Name of a source -> id.

    Raises:
        ValueError: In one line, if the file cannot be read, or does not name an image.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)["images"]
        by_name = {str(entry["file_name"]): entry["id"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--annotations {path}: not an annotation file in COCO's format ({error!r})") from error
    ids: dict[str, Any] = {}
    named: dict[str, str] = {}
    for source in sources:
        if source.kind != "image":
            continue
        parts = Path(os.path.abspath(source.name)).parts
        ends = ("/".join(parts[index:]) for index in range(1, len(parts)))
        name = next((end for end in ends if end in by_name), None)
        if name is None:
            raise ValueError(f"--annotations {path} names no image {source.name}")
        other = named.setdefault(name, source.name)
        if other != source.name:
            raise ValueError(f"--annotations {path}: {name!r} is the name of both {other} and {source.name}")
        ids[source.name] = by_name[name]
    return ids
