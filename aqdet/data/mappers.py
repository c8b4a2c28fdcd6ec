"""Mappers, which turn a record of a dataset into the augmented input of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from PIL import Image
from torchvision import transforms as T


class ClassificationMapper:
    """Turns a record of an image folder into what the classifier reads.

    Args:
        transform: torchvision transforms of a Pillow image.
        image_format: see :func:`detectron2.data.detection_utils.read_image`.
    """

    def __init__(self, *, transform: Callable[[Image.Image], Image.Image], image_format: str) -> None:
        self._transform = T.Compose([transform, T.PILToTensor()])
        self._format = image_format

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns the record with ``image``, uint8 ``(3, H, W)``.

        Raises:
            ValueError: naming the file, if it cannot be read.
        """
        try:
            image = utils.read_image(record["file_name"], format=self._format)
        except OSError as error:
            raise ValueError(f"image {record['file_name']!r} cannot be read: {error}") from error
        return {**record, "image": self._transform(Image.fromarray(image))}


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Returns the mapper of a config: Detectron2's, or for ``QuantClassifier`` a :class:`ClassificationMapper`.

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
        transforms = [T.RandomResizedCrop(crop.CROP_SIZE, (crop.MIN_AREA, 1.0))]
        if cfg.INPUT.RANDOM_FLIP != "none":
            flip = T.RandomHorizontalFlip if cfg.INPUT.RANDOM_FLIP == "horizontal" else T.RandomVerticalFlip
            transforms.append(flip())
    else:
        transforms = [T.Resize(cfg.INPUT.MIN_SIZE_TEST), T.CenterCrop(crop.CROP_SIZE)]
    return ClassificationMapper(transform=T.Compose(transforms), image_format=cfg.INPUT.FORMAT)
