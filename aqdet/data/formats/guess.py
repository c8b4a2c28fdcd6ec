"""Guesses the format of annotations from what their files look like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from ...utils.files import is_image, is_junk
from ..check.findings import Report
from ..declaration import Declaration
from .csv_table import columns_of
from .data_yaml import is_list_of_names
from .labelme import is_labelme
from .other_tools import what_else
from .text import parse_xml, read_text
from .via import is_via, is_via_csv

__all__ = ["file_of", "guess_entries", "guess_format"]

# Number of files of a folder that are opened; a labelling tool writes one beside each image.
_LOOKED_AT = 50
_FILE_FIELDS = {"coco": "json", "yolo": "yaml", "darknet": "data"}
_ANNOTATION_ENDINGS = (".json", ".xml", ".csv", ".tsv")
_ANNOTATION_FOLDERS = ("annotations", "annotation", "labels")


def guess_format(path: str) -> str:
    """
    Returns the format of a file or a folder of annotations.

    Args:
        path: path of the file or folder.

    Raises:
        ValueError: in one line, with the layout of each format, if it has none of them.
    """
    return guess_entries(path)[0]["format"]


def guess_entries(path: str, images: str = "") -> list[dict[str, Any]]:
    """
    Makes entries of ``DATASETS.DECLARED`` for a file or a folder of annotations.

    Args:
        path: path of the file or folder.
        images: folder of the images; ``""`` for ``images`` beside a file, or the file's folder, or the one above it,
            whichever has more of the images.

    Returns:
        the entries without names: one, or one for each file of annotations in the folders of a folder.

    Raises:
        ValueError: in one line, with the layout of each format, if it has none of them.
    """
    if not os.path.exists(path):
        raise ValueError(f"no file or folder {path!r}")
    found = _of_folder(path) if os.path.isdir(path) else [(_of_file(path), path)]
    if not found or not found[0][0]:
        raise ValueError(f"{path}: {_what_it_is(path)}; {_formats()}")
    return [_entry(name, file, images) for name, file in found]


def _entry(name: str, file: str, images: str) -> dict[str, Any]:
    if name == "voc":
        return {"format": name, **({"images": images, "annotations": file} if images else {"root": file})}
    if name == "labelme":
        return {"format": name, "images": images or file, **({"annotations": file} if images else {})}
    if name in _FILE_FIELDS:
        root = images or (_images_of(name, file) if name == "coco" else _home_of(file))
        return {"format": name, _FILE_FIELDS[name]: file, "image_root": root}
    return {"format": name, "annotations": file, "images": images or _images_of(name, file)}


def file_of(entry: dict[str, Any]) -> str:
    """Returns the file or folder of annotations of an entry of ``DATASETS.DECLARED``."""
    return next(entry[field] for field in (*_FILE_FIELDS.values(), "annotations", "root", "images") if field in entry)


def _home_of(file: str) -> str:
    """Returns the folder that the files of YOLO and darknet are relative to: the file's, or the one above labels."""
    folder = os.path.dirname(file) or "."
    if is_list_of_names(file) and os.path.basename(os.path.abspath(folder)).lower() == "labels":
        return os.path.dirname(os.path.abspath(folder))
    return folder


def _images_of(name: str, file: str) -> str:
    """Returns the folder that has most of the images a file names, of those near the file."""
    from . import FORMATS

    folder = os.path.dirname(file) or "."
    near = [os.path.join(folder, "images"), folder]
    if os.path.basename(os.path.abspath(folder)).lower() in _ANNOTATION_FOLDERS:
        above = os.path.dirname(os.path.abspath(folder))
        near += [os.path.join(above, "images"), above]
    near = [root for root in near if os.path.isdir(root)]
    source = FORMATS[name].read(Declaration("", name, file, near[0]), Report(""))
    names = [str(image.get("file_name")) for image in source.images[:_LOOKED_AT] if isinstance(image, dict)]
    found = [sum(os.path.isfile(os.path.join(root, name)) for name in names) for root in near]
    if not any(found):
        # They may lie in folders that the names do not have: the root is then the first folder with any images.
        found = [any(is_image(other) for _, _, others in os.walk(root) for other in others) for root in near]
    return near[found.index(max(found))]


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
    if is_list_of_names(path):
        return "yolo"
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
        return "yolo" if any(line.lower().startswith("names") for line in text.splitlines()) else ""
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


def _of_folder(folder: str) -> list[tuple[str, str]]:
    """Returns the format and the file or folder of each dataset in a folder."""
    if os.path.isdir(os.path.join(folder, "ImageSets", "Main")):
        return [("voc", folder)]
    configs = _configs_in(folder)
    if configs:
        return configs[:1]
    # Darknet's own tree has obj.data in data or cfg.
    configs = [config for below in _entries(folder) if below.is_dir() for config in _configs_in(below.path)[:1]]
    if configs:
        return [config for config in configs if config[0] == configs[0][0]]
    found: list[tuple[str, str]] = []
    for number, path in enumerate(_annotations_below(folder)):
        if number >= _LOOKED_AT:
            break
        name = _of_file(path)
        if name in ("labelme", "voc"):
            return found or [(name, folder)]
        if name and (not found or name == found[0][0]):
            found.append((name, path))
    return found or [("yolo", path) for path in _lists_of_names_below(folder)]


def _configs_in(folder: str) -> list[tuple[str, str]]:
    """Returns the format and the path of each file of a folder that says where a dataset's images are."""
    files = [entry.path for entry in _entries(folder) if entry.is_file()]
    return [
        (name, path)
        for ending, name in ((".data", "darknet"), (".yaml", "yolo"), (".yml", "yolo"))
        for path in files
        if path.lower().endswith(ending) and _of_file(path) == name
    ]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    return sorted((entry for entry in os.scandir(folder) if not is_junk(entry.name)), key=lambda entry: entry.name)


def _annotations_below(folder: str) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for file in sorted(files):
            if not is_junk(file) and file.lower().endswith(_ANNOTATION_ENDINGS):
                yield os.path.join(path, file)


def _lists_of_names_below(folder: str) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        yield from (os.path.join(path, file) for file in sorted(files) if is_list_of_names(file))


def _what_it_is(path: str) -> str:
    if os.path.isfile(path):
        return "an image, no annotations" if is_image(path) else what_else(path)
    names = [file for _, _, files in os.walk(path) for file in files if not is_junk(file)]
    if not any(map(is_image, names)):
        return "a folder with neither annotations nor images"
    configs = [name for name in sorted(os.listdir(path)) if name.lower().endswith((".yaml", ".yml"))]
    if configs:
        return (
            f"images without annotations of a format that is read, and {configs[0]} has no names of classes, as YOLO's"
        )
    stems = {os.path.splitext(name)[0] for name in names if is_image(name)}
    if any(os.path.splitext(name)[0] in stems for name in names if name.lower().endswith(".txt")):
        return "images with text files, as YOLO's, but no names of classes: write a classes.txt with a name a line"
    others = [os.path.join(folder, file) for folder, _, files in os.walk(path) for file in sorted(files)]
    for other in [other for other in others if other.lower().endswith(_ANNOTATION_ENDINGS)][:_LOOKED_AT]:
        return f"no annotations of a format that is read, and {os.path.relpath(other, path)} is {what_else(other)}"
    return "images without annotations; a folder for each class is declared in DATASETS.IMAGE_FOLDERS"


def _formats() -> str:
    from . import FORMATS

    return "formats are " + "; ".join(f"{form.name}: {form.layout}" for form in FORMATS.values())
