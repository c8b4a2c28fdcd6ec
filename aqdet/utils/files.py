"""Files that are written completely or not at all, strict JSON, checksums, and endings of images.

Only the standard library is imported, so that programs without torch can use it, too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

IMAGE_ENDINGS = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings, in lower case, of the names of image files that OpenCV or Pillow reads."""

_JUNK_NAMES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
_JUNK_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")

StrPath = str | os.PathLike[str]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_image(path: StrPath) -> bool:
    """Returns whether the name of a file has the ending of an image, in upper or lower case."""
    return Path(path).suffix.lower() in IMAGE_ENDINGS


def is_junk(name: str) -> bool:
    """Returns whether a file or folder is left behind by a system or a tool: hidden, ``Thumbs.db``, a cache."""
    lower = os.path.basename(name).lower()
    return lower.startswith((".", "~$")) or lower in (*_JUNK_NAMES, *_JUNK_FOLDERS) or lower.endswith(".cache")


@contextlib.contextmanager
def replacing(
    path: StrPath,
    *,
    keep_ending: bool = False,
    shared: bool = False,
    durable: bool = False,
    needed: int | None = None,
) -> Iterator[Path]:
    """Gives the path of a file beside the target, which replaces the target when the block ends without an error.

    If the block raises, the file beside the target is removed and the target stays as it was::

        with replacing("curve.png", keep_ending=True) as aside:
            figure.savefig(aside)

    Args:
        path: The target. Its folder is made if it does not exist.
        keep_ending: Whether the file beside the target is named ``curve.part.png`` instead of ``curve.png.part``, for
            writers that choose their format by the ending.
        shared: Whether several processes may write the same target; each then gets a file of its own.
        durable: Whether the content is flushed to disk before the target is replaced, so that it survives a power cut.
        needed: Size of the content in bytes, if known, for the message that a disk is full.

    Raises:
        OSError: Naming the target and, if the disk is full, the free space.
    """
    target = Path(path)
    part = f"{os.getpid()}.part" if shared else "part"
    aside = target.with_name(f"{target.stem}.{part}{target.suffix}" if keep_ending else f"{target.name}.{part}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        yield aside
        if durable:
            _flush_to_disk(aside)
        os.replace(aside, target)
        if durable:
            _flush_to_disk(target.parent)  # makes the renaming durable
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(aside)):
            raise named(error, target, needed) from error
        raise


@contextlib.contextmanager
def open_replacing(
    path: StrPath,
    mode: str = "w",
    *,
    shared: bool = False,
    durable: bool = False,
    needed: int | None = None,
    errors: str | None = None,
) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` when the block ends without an error; see :func:`replacing`.

    Args:
        path: The target.
        mode: ``"w"`` for text, which is written in UTF-8, or ``"wb"``.
        shared, durable, needed: See :func:`replacing`.
        errors: See :func:`open`.
    """
    encoding = None if "b" in mode else "utf-8"
    with (
        replacing(path, shared=shared, durable=durable, needed=needed) as aside,
        open(aside, mode, encoding=encoding, errors=errors) as file,
    ):
        yield file


def write_text(path: StrPath, text: str, *, shared: bool = False, errors: str | None = None) -> None:
    """Writes a text in UTF-8, completely or not at all; see :func:`replacing`."""
    with open_replacing(path, shared=shared, errors=errors) as file:
        file.write(text)


def write_json(path: StrPath, value: Any, *, indent: int | None = 1, shared: bool = False) -> None:
    """Writes the result of :func:`to_json`, completely or not at all; see :func:`replacing`."""
    write_text(path, to_json(value, indent=indent) + "\n", shared=shared)


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as standard JSON, which has neither NaN nor infinity: they become ``null``.

    Args:
        value: Mappings, lists, tuples, strings, numbers, booleans and None.
        options: Arguments of :func:`json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError):  # the value has a number that JSON does not have, or a mapping that is no dict
        return json.dumps(_without_non_finite(value), allow_nan=False, **options)


def from_json(text: str) -> Any:
    """Reads JSON; NaN and infinities, which standard JSON does not have but older files hold, become None.

    Raises:
        ValueError: If the text is no JSON.
    """
    return json.loads(text, parse_constant=lambda _: None)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(entry) for entry in value]
    return value


def refuse_replacing(outputs: Iterable[tuple[str, StrPath | None]], inputs: Iterable[StrPath | None] = ()) -> None:
    """Refuses outputs of a program that would replace what it reads, or each other.

    Args:
        outputs: pairs of an option and its file, which is None or "" where the option is not given.
        inputs: files that are read; None and "" are passed over.

    Raises:
        ValueError: in one line, naming the option and the file.
    """
    read = {os.path.realpath(path) for path in inputs if path}
    written: dict[str, str] = {}
    for option, path in outputs:
        if not path:
            continue
        place = os.path.realpath(path)
        if place in read:
            raise ValueError(f"{option} {path} would replace a file that is read: name another one")
        other = written.setdefault(place, option)
        if other != option:
            raise ValueError(f"{other} and {option} are both {path}: name two files")


def sha256(path: StrPath) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named(error: OSError, path: StrPath, needed: int | None = None) -> OSError:
    """Returns the error with a message in one line that names a file and, if the disk is full, the space needed.

    Args:
        error: The operating system's error.
        path: The file that was to be written.
        needed: Its size in bytes, if known.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _FULL:
        room = f"about {megabytes(needed)} are needed, " if needed is not None else ""
        with contextlib.suppress(OSError):
            room += f"{megabytes(shutil.disk_usage(Path(path).parent).free)} are free"
        reason += f" ({room.removesuffix(', ')})" if room else ""
    return type(error)(error.errno or errno.EIO, reason, str(path))


def megabytes(size: int) -> str:
    """Returns a number of bytes as text in MB, with one decimal below 10 MB."""
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
