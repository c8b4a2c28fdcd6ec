"""Guesses the format of annotations from what their files look like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from ...utils.files import is_image
from ..check.findings import Report
from ..check.images import is_junk
from ..declaration import Declaration
from .csv_table import columns_of
from .labelme import is_labelme
from .text import parse_xml, read_text
from .via import is_via, is_via_csv

__all__ = ["guess_entry", "guess_format"]

# Number of files of a folder that are opened; a labelling tool writes one beside each image.
_LOOKED_AT = 50
_FILE_FIELDS = {"coco": "json", "yolo": "yaml", "darknet": "data"}


def guess_format(path: str) -> str:
    """
    Returns the format of a file or a folder of annotations.

    Args:
        path: path of the file or folder.

    Raises:
        ValueError: in one line, with the layout of each format, if it has none of them.
    """
    return guess_entry(path)["format"]


def guess_entry(path: str, images: str = "") -> dict[str, Any]:
    """
    Makes an entry of ``DATASETS.DECLARED`` for a file or a folder of annotations.

    Args:
        path: path of the file or folder.
        images: folder of the images; ``""`` for ``images`` beside a file, or the file's folder if that has more of
            the images.

    Returns:
        the entry without a name.

    Raises:
        ValueError: in one line, with the layout of each format, if it has none of them.
    """
    if not os.path.exists(path):
        raise ValueError(f"no file or folder {path!r}")
    found = _of_folder(path) if os.path.isdir(path) else (_of_file(path), path)
    name, file = found if found is not None else ("", path)
    if not name:
        raise ValueError(f"{path}: {_what_it_is(path)}; {_formats()}")
    if name == "voc":
        return {"format": name, **({"images": images, "annotations": file} if images else {"root": file})}
    if name == "labelme":
        return {"format": name, "images": images or file, **({"annotations": file} if images else {})}
    if name in _FILE_FIELDS:
        # Lists of YOLO and darknet are relative to their file's folder.
        root = images or (_images_of(name, file) if name == "coco" else os.path.dirname(file) or ".")
        return {"format": name, _FILE_FIELDS[name]: file, "image_root": root}
    return {"format": name, "annotations": file, "images": images or _images_of(name, file)}


def _images_of(name: str, file: str) -> str:
    """Returns the folder that names of images in a file are relative to: ``images`` beside the file, or its own."""
    from . import FORMATS

    folder = os.path.dirname(file) or "."
    beside = os.path.join(folder, "images")
    if not os.path.isdir(beside):
        return folder
    source = FORMATS[name].read(Declaration("", name, file, beside), Report(""))
    names = [str(image.get("file_name")) for image in source.images[:_LOOKED_AT] if isinstance(image, dict)]
    found = {root: sum(os.path.isfile(os.path.join(root, name)) for name in names) for root in (beside, folder)}
    return folder if found[folder] > found[beside] else beside


def _of_file(path: str) -> str:
    """Returns the format of a file; ``""`` for none."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".xml":
        try:
            tag = parse_xml(path).tag
        except (ValueError, OSError):
            return ""
        return {"annotation": "voc", "annotations": "cvat"}.get(tag, "")
    if is_image(path):
        return ""
    text = read_text(path, Report(""))
    if text is None:
        return ""
    start = text.lstrip()
    if start[0] in "{[":
        return _of_json(text)
    keys = {line.partition("=")[0].strip() for line in text.splitlines() if "=" in line}
    if {"names", "train"} <= keys or {"names", "valid"} <= keys:
        return "darknet"
    if ending in (".yaml", ".yml"):
        return "yolo" if any(line.startswith("names") for line in text.splitlines()) else ""
    if is_via_csv(text):
        return "via"
    try:
        columns_of(text)
    except ValueError:
        return ""
    return "csv"


def _of_json(text: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content):
        return "coco"
    if is_via(content):
        return "via"
    return "labelme" if is_labelme(content) else ""


def _of_folder(folder: str) -> tuple[str, str] | None:
    """Returns the format of a folder, and the file or folder to declare."""
    if os.path.isdir(os.path.join(folder, "ImageSets", "Main")):
        return "voc", folder
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not is_junk(name)]
    for ending, name in ((".data", "darknet"), (".yaml", "yolo"), (".yml", "yolo")):
        for path in files:
            if path.lower().endswith(ending) and os.path.isfile(path) and _of_file(path) == name:
                return name, path
    for number, path in enumerate(_annotations_below(folder)):
        if number >= _LOOKED_AT:
            break
        name = _of_file(path)
        if name in ("labelme", "voc"):
            return name, folder
        if name:
            return name, path
    return None


def _annotations_below(folder: str) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for file in sorted(files):
            if not is_junk(file) and file.lower().endswith((".json", ".xml", ".csv", ".tsv")):
                yield os.path.join(path, file)


def _what_it_is(path: str) -> str:
    if os.path.isfile(path):
        return "an image, no annotations" if is_image(path) else "not of a format that is read"
    has_images = any(is_image(file) for _, _, files in os.walk(path) for file in files)
    if not has_images:
        return "a folder with neither annotations nor images"
    return "images without annotations; a folder for each class is declared in DATASETS.IMAGE_FOLDERS"


def _formats() -> str:
    from . import FORMATS

    return "formats are " + "; ".join(f"{form.name}: {form.layout}" for form in FORMATS.values())
