"""Image folders: a folder for each class, for classification."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image

from .check.cache import IMAGE_FOLDER, Declaration
from .check.images import IMAGE_ENDINGS

logger = logging.getLogger(__name__)

EVALUATOR_TYPE = "image_classification"
FIELDS = ("name", "root")


def image_folders(
    cfg: CfgNode, resolve: Callable[[str], str], only: Collection[str] | None = None
) -> Iterator[Declaration]:
    """The entries of ``DATASETS.IMAGE_FOLDERS``. Classes are the folders' names, sorted.

    Args:
        cfg: config.
        resolve: looks up a relative path.
        only: names of the entries that are used; None for all.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    declared = cfg.DATASETS.IMAGE_FOLDERS
    if not isinstance(declared, list | tuple):
        raise ValueError(f"DATASETS.IMAGE_FOLDERS must be a list of {{name: ..., root: ...}}, got {declared!r}")
    for index, entry in enumerate(declared):
        where = f"DATASETS.IMAGE_FOLDERS[{index}]"
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise ValueError(f"{where} must have exactly the fields {', '.join(FIELDS)}, got {entry!r}")
        for field in FIELDS:
            if not isinstance(entry[field], str) or not entry[field]:
                raise ValueError(f"{where}.{field} must be a non-empty string, got {entry[field]!r}")
        name, root = entry["name"], resolve(entry["root"])
        if only is not None and name not in only:
            continue
        if not os.path.isdir(root):
            raise ValueError(
                f"{where}.root: no folder {root!r}; relative paths are looked up under $DETECTRON2_DATASETS, then in "
                "the current folder"
            )
        classes = tuple(sorted(folder.name for folder in Path(root).iterdir() if folder.is_dir()))
        if not classes:
            raise ValueError(f"{where}.root: {root!r} has no folders, it must have one for each class")
        if len(classes) == 1:
            logger.warning("%s.root: %r has one class, %r: any classifier is right", where, root, classes[0])
        yield Declaration(name, IMAGE_FOLDER, root, root, classes=classes)


def register_image_folder(declaration: Declaration) -> None:
    """Registers one of :func:`image_folders`; the same may come again.

    Raises:
        ValueError: in one line, if its name is that of other files.
    """
    name, root, classes = declaration.name, declaration.image_root, declaration.classes or ()
    if name in DatasetCatalog:
        if MetadataCatalog.get(name).get("image_root") != root:
            raise ValueError(f"DATASETS.IMAGE_FOLDERS: {name!r} is registered already with other files, choose another")
        return
    DatasetCatalog.register(name, lambda: load_image_folder(root, classes))
    MetadataCatalog.get(name).set(image_root=root, thing_classes=list(classes), evaluator_type=EVALUATOR_TYPE)


def load_image_folder(root: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Records ``{"file_name", "image_id", "label"}``, in the order of classes and file names.

    Raises:
        ValueError: if a class has no image.
    """
    records: list[dict[str, Any]] = []
    other = 0
    for label, name in enumerate(classes):
        files = sorted(path for path in (Path(root) / name).rglob("*") if path.is_file())
        images = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
        if not images:
            raise ValueError(f"folder {str(Path(root) / name)!r} has no image ({', '.join(IMAGE_ENDINGS)})")
        other += len(files) - len(images)
        for path in images:
            records.append({"file_name": str(path), "image_id": len(records), "label": label})
    if other:
        logger.warning("%s: %d files that are no images by their names are left out", root, other)
    return records


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
    """A record of :func:`load_image_folder` to what the classifier reads.

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
