"""Images for an export to be measured on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from numpy.typing import NDArray

from ..data import register_declared


def network_image(cfg: CfgNode, file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """An image file as the network reads it, ``(3, H, W)`` in ``cfg.INPUT.FORMAT``.

    Raises:
        OSError: if it cannot be read.
    """
    image = read_image(os.fspath(file), cfg.INPUT.FORMAT)
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    return resize.get_transform(image).apply_image(image).transpose(2, 0, 1)


def training_images(
    cfg: CfgNode, number: int, progress: Callable[[str], object] = lambda _: None
) -> list[NDArray[np.uint8]]:
    """Images of the training set, from which quantizers were calibrated, spread over it.

    Args:
        cfg: names the set.
        number: of images.
        progress: is told if the set is not to be had, which is no error: the images are not shipped.
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
