"""Images on which an export is measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from numpy.typing import NDArray

from ..data import register_declared
from ..utils.files import IMAGE_ENDINGS, is_image


def network_image(cfg: CfgNode, file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Reads and resizes an image file for the network: ``(3, H, W)`` in ``cfg.INPUT.FORMAT``.

    Raises:
        OSError: If it cannot be read.
    """
    image = read_image(os.fspath(file), cfg.INPUT.FORMAT)
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    return resize.get_transform(image).apply_image(image).transpose(2, 0, 1)


def images_of(cfg: CfgNode, paths: Sequence[str], limit: int) -> list[NDArray[np.uint8]]:
    """Reads the images of files and folders for the network, each ``(3, H, W)``.

    Args:
        cfg: The config of the detector.
        paths: Files and folders, as ``--images`` names them.
        limit: The largest number of images; of more images, evenly spread ones are taken.

    Raises:
        FileNotFoundError, ValueError: In one line that names the path, if it does not exist or is no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"--images {path} does not exist")
        found = sorted(p for p in path.iterdir() if p.is_file() and is_image(p)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"--images {path} has no {', '.join(IMAGE_ENDINGS)} file")
        files += found
    number = min(limit, len(files))
    images = []
    for file in (files[i * len(files) // number] for i in range(number)):
        try:
            images.append(network_image(cfg, file))
        except OSError as error:
            raise ValueError(f"--images {file} cannot be read: {error}") from error
    return images


def training_images(
    cfg: CfgNode, number: int, progress: Callable[[str], object] = lambda _: None
) -> list[NDArray[np.uint8]]:
    """Reads images spread over the training set, on which quantizers were calibrated.

    Args:
        cfg: The config, which names the set.
        number: The number of images.
        progress: A function that is called with a line of text if the set is not available. That is no error, since
            these images are not shipped.
    """
    if not cfg.DATASETS.TRAIN:
        return []
    try:
        register_declared(cfg, train=True)
        records: Sequence[dict] = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
        chosen = [records[i * len(records) // number] for i in range(min(number, len(records)))]
        return [network_image(cfg, record["file_name"]) for record in chosen]
    except (ValueError, OSError, KeyError) as error:
        progress(f"ranges are not compared with the training images: {' '.join(str(error).split())}")
        return []
