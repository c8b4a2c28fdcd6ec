"""The sources and the targets of pictures: images, folders of them, videos, cameras and network streams."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ..utils.files import IMAGE_ENDINGS, is_junk

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
WRITTEN_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WRITTEN_VIDEO = ".mp4"


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """Something to read pictures from.

    Attributes:
        name: Path of a file, URL of a stream, or number of a camera, as it was given.
        kind: The kind of source. All frames of a video are read; a live stream goes on until it is stopped, and frames
            that come while the detector is busy are skipped.
        target: The path of its picture, relative to the output folder.
    """

    name: str
    kind: Literal["image", "video", "stream"]
    target: Path


def find_sources(inputs: Sequence[str], output: str | None = None) -> tuple[list[PictureSource], int]:
    """Returns the sources that inputs name: files, folders with all below them, glob patterns, URLs and cameras.

    Each source is there once.

    Args:
        inputs: The inputs; a whole number that is no file is a camera.
        output: The file or folder of the pictures. If it lies in a folder that is read, it is skipped, since it may
            hold the pictures of an earlier run.

    Returns:
        The sources, and the number of files in input folders that are neither images nor videos by their names, or
        that a system or a tool has left there, as ``._0.jpg``.

    Raises:
        ValueError: In one line, if an input leads to nothing.
    """
    found: dict[str, PictureSource] = {}
    others = 0
    for text in inputs:
        live = _stream(text)
        if live is not None:
            found.setdefault(text, live)
            continue
        path = Path(text).expanduser()
        if path.is_dir():
            pairs, left_out = _in_folder(path, output)
            others += left_out
        else:
            matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            pairs = [(p, Path(p.name)) for p in matches if p.is_file()]
            if not pairs:
                raise ValueError(f"input {text!r}: no such file or folder, and no match as a pattern")
        for file, target in pairs:
            found.setdefault(str(file.resolve()), _file(file, target))
    if not found:
        endings = " ".join((*IMAGE_ENDINGS, *VIDEO_ENDINGS))
        raise ValueError(f"no image or video in {', '.join(inputs)} (endings: {endings})")
    return list(found.values()), others


def _stream(text: str) -> PictureSource | None:
    """Returns a camera or a network stream; None if the text is the name of a file."""
    if re.fullmatch(r"\d+", text) and not os.path.exists(text):
        return PictureSource(text, "stream", Path(f"camera_{text}{WRITTEN_VIDEO}"))
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        return None
    url = urlsplit(text)
    path = Path(url.path)
    # A file that is read over the network ends, and is no live stream.
    kind: Literal["video", "stream"] = "video" if path.suffix.lower() in VIDEO_ENDINGS else "stream"
    stem = re.sub(r"[^\w.-]+", "_", f"{url.hostname or ''}_{path.stem}").strip("_")
    return PictureSource(text, kind, Path(f"{stem or 'stream'}{WRITTEN_VIDEO}"))


def _in_folder(folder: Path, output: str | None) -> tuple[list[tuple[Path, Path]], int]:
    """Returns the images and videos below a folder with their paths in it, and the number of other files."""
    # A link to nothing is no picture either, and counted.
    files = sorted(_files_below(folder))
    if output is not None:
        written, root = Path(output).resolve(), folder.resolve()
        if root in written.parents:
            files = [path for path in files if not path.resolve().is_relative_to(written)]
        elif not root.is_relative_to(written):  # but a link in it may lead there
            files = [path for path in files if root in path.resolve().parents or written not in path.resolve().parents]
    named = [path for path in files if path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS)]
    media = [path for path in named if path.is_file() and not any(map(is_junk, path.relative_to(folder).parts))]
    return [(path, path.relative_to(folder)) for path in media], len(files) - len(media)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder, links to folders followed, each once and by its own name if it has one."""
    seen: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        links = []
        for path, folders, files in os.walk(waiting.pop(0)):
            if os.path.realpath(path) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(path))
            links += [os.path.join(path, name) for name in sorted(folders) if os.path.islink(os.path.join(path, name))]
            yield from (Path(path, file) for file in files)
        waiting += links


def _file(path: Path, target: Path) -> PictureSource:
    if path.suffix.lower() in VIDEO_ENDINGS:
        return PictureSource(str(path), "video", target.with_suffix(WRITTEN_VIDEO))
    keeps = target.suffix.lower() in WRITTEN_IMAGES
    return PictureSource(str(path), "image", target if keeps else target.with_suffix(".png"))


def output_paths(sources: Sequence[PictureSource], output: str) -> list[Path]:
    """Returns the file for the picture of each source, below a folder or, for a single source, as it is given.

    A name with an ending is a file unless a folder of that name exists or a slash follows it.

    Raises:
        ValueError: In one line, if the file cannot be written in that format, there are several sources for it, two
            pictures would have one name, or an input would be replaced.
    """
    target = Path(output)
    ending = target.suffix.lower()
    is_file = bool(re.fullmatch(r"\.[a-z][a-z0-9]{1,4}", ending)) and not (output.endswith("/") or target.is_dir())
    if is_file:
        if ending not in (*WRITTEN_IMAGES, WRITTEN_VIDEO):
            raise ValueError(
                f"--output {output!r}: pictures are written as {', '.join(WRITTEN_IMAGES)}, videos as .mp4"
            )
        if len(sources) > 1:
            raise ValueError(f"--output {output!r} is one file, for {len(sources)} inputs: name a folder")
        if (sources[0].kind == "image") == (ending == WRITTEN_VIDEO):
            raise ValueError(f"--output {output!r}: {sources[0].name} is {_a(sources[0].kind)}")
    above = target.parent if is_file else target
    taken_by = next((place for place in (above, *above.parents) if place.exists()), above)
    if not taken_by.is_dir():
        raise ValueError(f"--output {output!r}: {str(taken_by)!r} is a file, not a folder")
    paths = [target] if is_file else [target / source.target for source in sources]
    taken: dict[Path, PictureSource] = {}
    for source, path in zip(sources, paths, strict=True):
        other = taken.setdefault(path, source)
        if other is not source:
            raise ValueError(
                f"inputs {other.name!r} and {source.name!r} would both be written to {str(source.target)!r}: run each "
                "with an --output of its own"
            )
    read = collections.defaultdict(str, {_identity(s.name): s.name for s in sources if os.path.isfile(s.name)})
    for path in paths:
        if path.exists() and read[_identity(path)]:
            raise ValueError(f"--output {output!r} would replace the input {str(path)!r}: name another place")
    return paths


def _a(kind: str) -> str:
    return {"image": "an image, which is not written as .mp4", "video": "a video, which is written as .mp4"}.get(
        kind, "a stream, which is written as .mp4"
    )


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
