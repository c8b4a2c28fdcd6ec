"""A cache of checks of declared datasets; a check is kept until one of the files that it read changes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...utils.files import to_json, write_text
from ..cache_folder import cache_dir
from ..declaration import IMAGE_FOLDER, Declaration
from ..formats import FORMATS, Source
from ..formats.folders import read_folders
from .findings import Report
from .records import check_labelled_images, check_source
from .selection import select_share

__all__ = ["check_declaration", "checked"]


def check_declaration(
    declaration: Declaration, *, pixels: bool, masks: bool = False
) -> tuple[Report, dict[str, Any], Source]:
    """
    Checks a dataset.

    Args:
        declaration: the declaration of the dataset.
        pixels: whether to decode all images.
        masks: whether to check segmentations as a training of masks reads them.

    Returns:
        the report, the usable records in the form of COCO JSON, and the files that were read.
    """
    report = Report(declaration.name)
    if declaration.format == IMAGE_FOLDER:
        source = read_folders(declaration, report)
        check_labelled_images(source, report, pixels=pixels)
        return report, {}, source
    read = FORMATS[declaration.format].read
    if declaration.share is None:
        source = read(declaration, report)
    else:
        found = Report(declaration.name, notes_kept=None)
        source = read(declaration, found)
        select_share(source, declaration.share, found, report)
    return report, check_source(source, report, pixels=pixels, masks=masks), source


def checked(declaration: Declaration, *, pixels: bool, masks: bool = False) -> tuple[Report, str]:
    """
    Checks a dataset, or takes the report from the cache, where those without errors are kept.

    Args:
        declaration: the declaration of the dataset.
        pixels: whether all images have to be decoded.
        masks: whether segmentations have to be checked as a training of masks reads them.

    Returns:
        the report, and the COCO JSON to train on and to evaluate with: the declared file itself if it needs no
        change, else a file in the cache, which exists if the report has no errors. For an image folder, the folder.

    Raises:
        ValueError: naming ``DATASETS.CACHE_DIR``, if nothing can be written there.
    """
    entry = cache_dir() / "checked" / (_key(declaration) + "-masks" * masks)
    usable = entry.with_suffix(".json")
    report_file = entry.with_suffix(".pixels.report" if pixels else ".labels.report")
    kept = _read_cache(report_file, declaration)
    if kept is not None:
        report, is_copied = kept
        if usable.is_file() or not is_copied:
            return report, str(usable) if is_copied else declaration.file
    report, content, source = check_declaration(declaration, pixels=pixels, masks=masks)
    is_whole = declaration.format == "coco" and declaration.share is None and not report.changes
    is_copied = declaration.format != IMAGE_FOLDER and not is_whole
    json_file = str(usable) if is_copied else declaration.file
    if report.refused(strict=False):
        # A report with errors is not kept: the remedy may be a new file, which is not among those that were read.
        return report, json_file
    noted = {"inputs": _stamps(source.inputs), "is_copied": is_copied, "report": report.as_dict()}
    try:
        if is_copied:
            write_text(usable, to_json(content), shared=True, errors="surrogatepass")
        write_text(report_file, to_json(noted), shared=True, errors="surrogatepass")
    except OSError as error:
        raise ValueError(
            f"DATASETS.CACHE_DIR: the check of {declaration.name} cannot be kept in {str(entry.parent)!r}: {error}"
        ) from error
    return report, json_file


def _read_cache(path: Path, declaration: Declaration) -> tuple[Report, bool] | None:
    """Returns a kept report and whether the data had to be copied; None if a file that the check read has changed."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
        if noted["inputs"] != _stamps(noted["inputs"]):
            return None
        return Report.from_dict(noted["report"], declaration.name), noted["is_copied"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(declaration: Declaration) -> str:
    """Returns a digest of the declared paths and options, the annotation file's content, and the code that checks."""
    file, image_root = os.path.abspath(declaration.file), os.path.abspath(declaration.image_root)
    fields = dataclasses.replace(declaration, name="", file=file, image_root=image_root)
    digest = hashlib.blake2b(repr(fields).encode("utf-8", "surrogateescape"), digest_size=16)
    digest.update(_code())
    if os.path.isfile(declaration.file):
        digest.update(Path(declaration.file).read_bytes())
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    here = Path(__file__).parent.parent
    files = sorted(path for folder in ("check", "formats") for path in (here / folder).glob("*.py"))
    return b"".join(path.read_bytes() for path in (*files, here / "share.py"))


def _stamps(paths: Iterable[str]) -> dict[str, list[int] | None]:
    """Returns size and time of the last change of each file; None for a file that does not exist."""
    stamps: dict[str, list[int] | None] = {}
    for path in sorted(paths):
        try:
            status = os.stat(path)
            stamps[path] = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            stamps[path] = None
    return stamps
