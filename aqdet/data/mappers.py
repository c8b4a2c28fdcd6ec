"""What turns a record of a dataset into the input of a model, with its augmentations."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image


class RandomResizedCrop(T.Augmentation):
    """A random part of the image, resized to a square (1409.4842): area and aspect ratio are drawn.

    Args:
        size: side of the square in pixels.
        min_area: smallest area as a share of the image's; the largest is all of it.
        max_aspect: aspect ratios are log-uniform from ``1 / max_aspect`` to this.
        tries: draws until the part fits in the image; the largest centred square after that.
    """

    def __init__(self, size: int, min_area: float, max_aspect: float = 4 / 3, tries: int = 10) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.TransformList:
        """The crop and the resizing for an image ``(H, W, C)``."""
        height, width = image.shape[:2]
        for _ in range(self.tries):
            area = height * width * np.random.uniform(self.min_area, 1)
            aspect = math.exp(np.random.uniform(-math.log(self.max_aspect), math.log(self.max_aspect)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
                break
        else:
            w = h = min(height, width)
            x, y = (width - w) // 2, (height - h) // 2
        resize = T.ResizeTransform(h, w, self.size, self.size, Image.Resampling.BILINEAR)
        return T.TransformList([T.CropTransform(x, y, w, h), resize])


class CenterCrop(T.Augmentation):
    """The square in the middle of an image that is at least as large.

    Args:
        size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The crop for an image ``(H, W, C)``."""
        height, width = image.shape[:2]
        return T.CropTransform((width - self.size) // 2, (height - self.size) // 2, self.size, self.size)


class ClassificationMapper:
    """Turns a record of an image folder into what the classifier reads.

    Args:
        augmentations: applied in order.
        image_format: see :func:`detectron2.data.detection_utils.read_image`.
    """

    def __init__(self, *, augmentations: Sequence[T.Augmentation], image_format: str) -> None:
        self._augmentations = T.AugmentationList(augmentations)
        self._format = image_format

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with ``image``, uint8 ``(3, H, W)``.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        try:
            image = utils.read_image(record["file_name"], format=self._format)
        except OSError as error:
            raise ValueError(f"image {record['file_name']!r} cannot be read: {error}") from error
        augmented = T.AugInput(image)
        self._augmentations(augmented)
        pixels = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        return {**record, "image": torch.from_numpy(pixels)}


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """The mapper of a config: Detectron2's for detectors, :class:`ClassificationMapper` for ``QuantClassifier``.

    Raises:
        ValueError: in one line, naming a key of ``INPUT`` or ``DATALOADER`` that does not suit a classifier.
    """
    if cfg.MODEL.META_ARCHITECTURE != "QuantClassifier":
        return DatasetMapper(cfg, is_train)
    crop = cfg.INPUT.CLASSIFIER
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError("DATALOADER.ASPECT_RATIO_GROUPING must be False for an image classifier: crops are square")
    if not 0 < crop.MIN_AREA <= 1:
        raise ValueError(f"INPUT.CLASSIFIER.MIN_AREA must be above 0 and at most 1, got {crop.MIN_AREA}")
    if not 0 < crop.CROP_SIZE <= cfg.INPUT.MIN_SIZE_TEST:
        raise ValueError(
            f"INPUT.CLASSIFIER.CROP_SIZE must be from 1 to INPUT.MIN_SIZE_TEST ({cfg.INPUT.MIN_SIZE_TEST}), got "
            f"{crop.CROP_SIZE}"
        )
    if is_train:
        augmentations: list[T.Augmentation] = [RandomResizedCrop(crop.CROP_SIZE, crop.MIN_AREA)]
        if cfg.INPUT.RANDOM_FLIP != "none":
            horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
            augmentations.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    else:
        resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, max_size=sys.maxsize)
        augmentations = [resize, CenterCrop(crop.CROP_SIZE)]
    return ClassificationMapper(augmentations=augmentations, image_format=cfg.INPUT.FORMAT)
