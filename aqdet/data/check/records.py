"""
One pass over a dataset of any format, which reports every problem and returns the usable data.

The readers of :mod:`aqdet.data.formats` turn files into records like those of COCO JSON, faults included. Here every
record is checked against the policy of :mod:`aqdet.data.check.findings`. The usable records become a COCO annotation
file with the original ids, which training and evaluation both read, so that both have the same repairs.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ..formats.source import Source
from .annotation_records import AnnotationRecords
from .findings import Report
from .image_files import scan_images
from .image_records import ImageRecords
from .statistics import Statistics

__all__ = ["check_labelled_images", "check_source", "find_shared_images"]


def check_source(source: Source, report: Report, *, pixels: bool, masks: bool = False) -> dict[str, Any]:
    """
    Checks a dataset of boxes.

    Args:
        source: the dataset's records.
        report: receives the findings.
        pixels: whether every image is decoded; else images are opened only where their size is not stated.
        masks: whether segmentations are checked as a training of masks reads them.

    Returns:
        the usable records in the form of COCO JSON.
    """
    images = ImageRecords(source, report, pixels=pixels)
    usable_images = images.check()
    annotations = AnnotationRecords(source, report, images.known, masks=masks)
    usable_annotations = annotations.check()
    for key, image in images.known.items():
        if not image.boxes and image.size is not None and not image.refused:
            report.add("image-without-boxes", source.file, f"image {key}", "file_name", image.name)
    for key, name in source.categories.items():
        if not annotations.of_class[key]:
            report.add("class-without-boxes", source.file, f"category {key}", "name", name)
    _find_alike_classes(source, report)
    has_boxes = any(image.boxes or image.refused for image in images.known.values())
    if images.known and not has_boxes:
        report.add("no-boxes", source.file)
    annotations.check_whole()
    report.categories = dict(sorted(source.categories.items()))
    categories = [{"id": key, "name": name} for key, name in report.categories.items()]
    report.facts = {
        "images": len(usable_images),
        "of them without boxes": sum(image.boxes == 0 for image in images.known.values()),
        "boxes": sum(not a["iscrowd"] for a in usable_annotations),
        "crowd regions": sum(a["iscrowd"] for a in usable_annotations),
    }
    content = {"images": usable_images, "annotations": usable_annotations, "categories": categories}
    report.statistics = Statistics.of(content, images.colours)
    return content


def _find_alike_classes(source: Source, report: Report) -> None:
    first: dict[str, str] = {}
    for key, name in source.categories.items():
        plain = re.sub(r"[\s_-]+", "", name).casefold()
        if plain in first:
            report.add("class-alike", source.file, f"category {key}", "name", f"{name}, beside {first[plain]}")
        first.setdefault(plain, name)


def check_labelled_images(source: Source, report: Report, *, pixels: bool) -> None:
    """
    Checks a dataset of images with a class each.

    Args:
        source: the dataset's records.
        report: receives the findings.
        pixels: whether every image is decoded.
    """
    names = [image["file_name"] for image in source.images]
    paths = [os.path.join(source.image_root, name) for name in names]
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
    _find_alike_classes(source, report)
    report.categories = source.categories
    report.facts = {"images": len(names), "classes": len(source.categories)}


def find_shared_images(first: Report, second: Report) -> None:
    """Adds to the second report the images that the first dataset has too."""
    known = {identity: name for name, identity in first.images.items()}
    for name, identity in second.images.items():
        if identity in known:
            report_file = f"{second.name}: {name}"
            second.add("image-in-two-sets", report_file, field="also", value=f"{first.name}: {known[identity]}")
