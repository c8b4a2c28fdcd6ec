"""
Reader of the entries of ``DATASETS.DECLARED`` and ``IMAGE_FOLDERS``, which also looks up their paths.

It needs neither torch nor Detectron2; :mod:`aqdet.data.registry` registers the declared datasets.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..utils.files import is_junk
from .declaration import IMAGE_FOLDER, Declaration
from .formats import FORMATS, Format
from .formats.guess import guess_format
from .share import Share

__all__ = ["parse_declared", "parse_image_folders"]

_FOLDER_FIELDS = ("name", "root")
# Fields of every entry that choose a part of its images.
_PART_FIELDS = ("split", "share", "seed")
# Fields that name annotations, by which the format of an entry without one is guessed; the most telling first.
_ANNOTATION_FIELDS = ("annotations", "data", "yaml", "root", "images")
_LOOKED_UP = "relative paths are looked up under $DETECTRON2_DATASETS, then in the current folder"


def parse_declared(entries: Any, only: Collection[str] | None = None) -> dict[str, Declaration]:
    """
    Reads the entries of ``DATASETS.DECLARED``.

    Args:
        entries: the value of the key.
        only: names of the entries that are used; None for all.

    Returns:
        the declarations by name.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    if not isinstance(entries, list | tuple):
        example = "{name: ..., json: ..., image_root: ...}"
        raise ValueError(f"DATASETS.DECLARED must be a list of {example}, got {entries!r}")
    found: dict[str, Declaration] = {}
    for index, entry in enumerate(entries):
        if only is not None and isinstance(entry, dict) and entry.get("name") not in only:
            continue
        declaration = _declaration(entry, f"DATASETS.DECLARED[{index}]")
        if found.setdefault(declaration.name, declaration) != declaration:
            raise ValueError(f"DATASETS.DECLARED[{index}].name: {declaration.name!r} is the name of another entry")
    return found


def parse_image_folders(entries: Any, only: Collection[str] | None = None) -> Iterator[Declaration]:
    """
    Reads the entries of ``DATASETS.IMAGE_FOLDERS``. Classes are the folders' names, sorted.

    Args:
        entries: the value of the key.
        only: names of the entries that are used; None for all.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    if not isinstance(entries, list | tuple):
        raise ValueError(f"DATASETS.IMAGE_FOLDERS must be a list of {{name: ..., root: ...}}, got {entries!r}")
    for index, entry in enumerate(entries):
        where = f"DATASETS.IMAGE_FOLDERS[{index}]"
        if not isinstance(entry, dict) or not set(_FOLDER_FIELDS) <= set(entry) <= {*_FOLDER_FIELDS, *_PART_FIELDS}:
            fields, may = ", ".join(_FOLDER_FIELDS), ", ".join(_PART_FIELDS)
            raise ValueError(f"{where} must have the fields {fields}, and may have {may}, got {entry!r}")
        for field in _FOLDER_FIELDS:
            _check_text(entry, field, where)
        if only is not None and entry["name"] not in only:
            continue
        root = existing(entry["root"], f"{where}.root", kind="folder")
        classes = tuple(sorted(f.name for f in Path(root).iterdir() if f.is_dir() and not is_junk(f.name)))
        if not classes:
            raise ValueError(f"{where}.root: {root!r} has no folders, it must have one for each class")
        _, share = _part(entry, where, "a folder for each class")
        yield Declaration(entry["name"], IMAGE_FOLDER, root, root, classes=classes, share=share)


def resolve(path: str) -> str:
    """Returns a relative path under ``$DETECTRON2_DATASETS`` if it exists there, else as it is."""
    path = os.path.expanduser(path)
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", ""))
    under = os.path.join(root, path)
    return under if root and os.path.exists(under) else path


def existing(path: str, where: str, *, kind: str) -> str:
    """
    Looks up a path that has to exist.

    Args:
        path: the path as declared.
        where: config key for the message.
        kind: ``"file"``, ``"folder"``, or ``"file or folder"``.

    Raises:
        ValueError: if the path does not exist, or is of the other kind.
    """
    found = resolve(path)
    if kind == "file" and os.path.isdir(found):
        raise ValueError(f"{where}: {found!r} is a folder, a file is needed")
    if kind == "folder" and os.path.isfile(found):
        raise ValueError(f"{where}: {found!r} is a file, a folder is needed")
    if not os.path.exists(found):
        raise ValueError(f"{where}: no {kind} {found!r}; {_LOOKED_UP}")
    return found


def _declaration(entry: Any, where: str) -> Declaration:
    entry, name = _with_format(entry, where)
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{where}.format must be one of {', '.join(FORMATS)}, got {name!r}")
    form = FORMATS[name]
    _check_fields(form, entry, where)
    for field in {"name", "class_key", *form.paths} & set(entry):
        _check_text(entry, field, where)
    classes, difficult = entry.get("classes"), entry.get("difficult_as_crowd", False)
    if classes is not None and not _are_names(classes):
        raise ValueError(f"{where}.classes must be a list of names, none twice, got {classes!r}")
    if not isinstance(difficult, bool):
        raise ValueError(f"{where}.difficult_as_crowd must be True or False, got {difficult!r}")
    split, share = _part(entry, where, form.name if not form.has_named_splits else "")
    paths = {
        field: existing(entry[field], f"{where}.{field}", kind=kind)
        for field, kind in form.paths.items()
        if field in entry
    }
    try:
        file, image_root = form.locate(paths, split)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
    return Declaration(
        name=entry["name"],
        format=name,
        file=file,
        image_root=existing(image_root, f"{where}.image_root", kind="folder"),
        split=split,
        classes=None if classes is None else tuple(classes),
        difficult_as_crowd=difficult,
        share=share,
        class_key=entry.get("class_key", ""),
    )


def _with_format(entry: Any, where: str) -> tuple[Any, Any]:
    """Returns the entry and its format: the stated one, COCO for a field json, else the one its files look like."""
    if not isinstance(entry, dict) or "format" in entry or "json" in entry:
        return entry, entry.get("format", "coco") if isinstance(entry, dict) else "coco"
    field = next((field for field in _ANNOTATION_FIELDS if field in entry), None)
    if field is None:
        return entry, "coco"
    _check_text(entry, field, where)
    path = existing(entry[field], f"{where}.{field}", kind="file or folder")
    try:
        name = guess_format(path)
    except ValueError as error:
        raise ValueError(f"{where}.format is not given, and {error}") from error
    return {**entry, "format": name}, name


def _check_fields(form: Format, entry: Any, where: str) -> None:
    optional = list(dict.fromkeys((*form.optional, *_PART_FIELDS)))
    for needed in form.needed:
        if isinstance(entry, dict) and set(needed) <= set(entry) <= {*needed, *optional}:
            return
    may = f", and may have {', '.join(optional)}"
    must = " or ".join(", ".join(needed) for needed in form.needed)
    raise ValueError(f"{where} must have the fields {must}{may}, got {entry!r}")


def _check_text(entry: dict[str, Any], field: str, where: str) -> None:
    if not isinstance(entry[field], str) or not entry[field]:
        raise ValueError(f"{where}.{field} must be a non-empty string, got {entry[field]!r}")


def _part(entry: dict[str, Any], where: str, without_splits: str) -> tuple[str, Share | None]:
    """Returns the split's name and its share; `without_splits` is the format's name if it has no named splits."""
    split, share, seed = entry.get("split", ""), entry.get("share"), entry.get("seed", 0)
    if type(seed) is not int:
        raise ValueError(f"{where}.seed must be an integer, got {seed!r}")
    field = "share"
    if not isinstance(split, str):
        if share is not None:
            raise ValueError(f"{where}: one of split and share must be a share, got {split!r} and {share!r}")
        field, split, share = "split", "", split
    elif "split" in entry and (not split or without_splits):
        right = f"a share as 0.8: {without_splits} has no named splits" if without_splits else "a name or a share"
        raise ValueError(f"{where}.split must be {right}, got {split!r}")
    if share is None:
        if "seed" in entry:
            raise ValueError(f"{where}.seed: it is that of a share, as split: 0.8, and there is none")
        return split, None
    try:
        return split, Share.parse(share, seed)
    except ValueError as error:
        raise ValueError(f"{where}.{field} {error}") from error


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value) and all(isinstance(n, str) and n for n in value)
    return is_list and len(set(value)) == len(value)
