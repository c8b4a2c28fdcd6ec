"""Folders of the embedded dataset in COCO's format; each folder is written once, and appears complete."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from iopath.common.file_io import file_lock

from ...utils.progress import progress_bar
from . import scenes
from .scenes import IMAGE_SIZE, KEYPOINTS, SHAPE_CLASSES, draw_scene

__all__ = ["SHAPE_SPLITS", "make_shapes", "shapes_folder"]

logger = logging.getLogger(__name__)

VERSION = 1
STALE_SECONDS = 3600


@dataclass(frozen=True)
class SplitSpec:
    """The seed and the number of images of a split of the embedded dataset."""

    num_images: int
    seed: int


# "test" is for small differences, as between a detector and its export, which 200 images are too few to show.
SHAPE_SPLITS = {"train": SplitSpec(800, seed=1), "val": SplitSpec(200, seed=2), "test": SplitSpec(2000, seed=3)}


def make_shapes(folder: str | os.PathLike[str], *, num_images: int, seed: int, size: int = IMAGE_SIZE) -> Path:
    """
    Writes a dataset of drawn scenes, ``annotations.json`` and ``images/*.png``, once.

    The folder is filled under another name and then renamed, so that it is complete or does not exist. Processes that
    ask for it at the same time wait for the first one. A folder that exists is used as it is.

    Args:
        folder: the dataset's folder; its name is not used for anything else.
        num_images: number of images.
        seed: seed of the dataset; image ``i`` is ``draw_scene(seed, i, size)``.
        size: height and width of the images in pixels.

    Returns:
        the path of the annotation file.

    Raises:
        ValueError: if the folder was changed since it was written.
    """
    folder = Path(folder)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder)):
            if not folder.exists():
                _remove_stale_parts(folder)
                _write_folder(folder, num_images, seed, size)
    found = len(list((folder / "images").glob("*.png")))
    if found != num_images or not (folder / "annotations.json").is_file():
        raise ValueError(
            f"embedded dataset {folder} is damaged: {found} of {num_images} images, annotations "
            f"{'present' if (folder / 'annotations.json').is_file() else 'missing'}; "
            "delete the folder and it is written again"
        )
    return folder / "annotations.json"


def shapes_folder(split: str, cache_dir: str | os.PathLike[str]) -> Path:
    """Returns the folder of a split.

    Its name holds a digest of the generator and of what it runs on, so that a changed generator never meets an old
    folder.

    Args:
        split: A key of ``SHAPE_SPLITS``.
        cache_dir: The folder that holds the embedded datasets.
    """
    digest = hashlib.sha256()
    for file in (scenes.__file__, __file__):
        digest.update(Path(file).read_bytes())
    digest.update(repr((SHAPE_SPLITS[split], IMAGE_SIZE, cv2.__version__, np.__version__)).encode())
    return Path(cache_dir) / f"shapes_{split}_v{VERSION}_{digest.hexdigest()[:12]}"


def _remove_stale_parts(folder: Path) -> None:
    """Removes unfinished folders that a killed process left behind; recent ones may be another machine's at work."""
    for part in folder.parent.glob(f".{folder.name}.part-*"):
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(part, ignore_errors=True)


def _write_folder(folder: Path, num_images: int, seed: int, size: int) -> None:
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    try:
        part.chmod(0o755)
        (part / "images").mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in progress_bar(range(num_images), unit="image", title=f"drawing {folder.name}"):
            image, objects = draw_scene(seed, index, size)
            name = f"{index:06d}.png"
            if not cv2.imwrite(str(part / "images" / name), image):
                raise OSError(f"cannot write {part / 'images' / name}")
            images.append({"id": index + 1, "file_name": name, "height": size, "width": size})
            for obj in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **obj})
        content = {
            "info": {"description": "aqdet shapes", "version": str(VERSION), "seed": seed},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": i, "name": name, "supercategory": "shape", "keypoints": list(KEYPOINTS), "skeleton": []}
                for i, name in enumerate(SHAPE_CLASSES, 1)
            ],
        }
        (part / "annotations.json").write_text(json.dumps(content))
        try:
            os.rename(part, folder)
        except OSError:
            # Without working locks (some network file systems) another process may be first.
            if not folder.exists():
                raise
        logger.info("Wrote %d images with %d objects to %s", num_images, len(annotations), folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
