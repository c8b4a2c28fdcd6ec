"""Selection of a share of a dataset: its images, annotations and findings."""

from __future__ import annotations

from ..formats.source import Source
from ..share import Share
from .findings import Report
from .images import ImageFolder
from .values import whole_number

__all__ = ["select_share"]


def select_share(source: Source, share: Share, found: Report, report: Report) -> None:
    """
    Reduces a dataset to the images of a share; the choice does not depend on how paths are written.

    Args:
        source: the dataset; records outside the share are removed.
        share: the part to keep.
        found: the reader's findings, with all records.
        report: receives these findings, but for those on files that only images outside the share have.
    """
    named = [raw for raw in source.images if isinstance(raw, dict) and isinstance(raw.get("file_name"), str)]
    names = [raw["file_name"] for raw in named]
    outside = {
        id(raw)
        for raw, name, (relative, kind) in zip(
            named, names, ImageFolder(source.image_root).find_all(names), strict=True
        )
        if not share.takes(name if kind in ("image-missing", "image-outside") else relative)
    }
    kept = [index for index, raw in enumerate(source.images) if id(raw) not in outside]
    if source.images and not kept:
        value = f"none of {len(source.images)} images are in the share {share}: choose another seed"
        report.add("no-images", source.file, value=value)
    foreign = _label_files(source, set(range(len(source.images))) - set(kept)) - _label_files(source, set(kept))
    foreign.update(file for file, names in source.unread_files.items() if not any(map(share.takes, names)))
    ids_kept = {_key(source.images[index].get("id")) for index in kept if isinstance(source.images[index], dict)}
    ids_outside = {_key(raw.get("id")) for raw in named if id(raw) in outside} - ids_kept
    source.images = [source.images[index] for index in kept]
    if source.image_places:
        source.image_places = [source.image_places[index] for index in kept]
    if source.label_files:
        source.label_files = [source.label_files[index] for index in kept]
    annotations = [
        index
        for index, raw in enumerate(source.annotations)
        if not isinstance(raw, dict) or _key(raw.get("image_id")) not in ids_outside
    ]
    source.annotations = [source.annotations[index] for index in annotations]
    if source.annotation_places:
        source.annotation_places = [source.annotation_places[index] for index in annotations]
    for finding in found.findings:
        if finding.file not in foreign:
            report.add(finding.kind, finding.file, finding.record, finding.field, finding.value)


def _key(image_id: object) -> object:
    number = whole_number(image_id)
    return repr(image_id) if number is None else number


def _label_files(source: Source, indices: set[int]) -> set[str]:
    """Returns the files that hold the annotations of these images and of no others, where a format has such files."""
    files = [*source.label_files] or [""] * len(source.images)
    places = [place[0] for place in source.image_places] or files
    return {name for index in indices for name in (files[index], places[index])} - {source.file, ""}
