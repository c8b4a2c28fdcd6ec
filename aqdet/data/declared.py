"""Datasets declared in a config, and checks of the data against the config before training."""

from __future__ import annotations

import difflib
import json
import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .builtin import set_cache_dir
from .classification import register_image_folders

__all__ = ["check_num_classes", "register_declared"]

logger = logging.getLogger(__name__)

FIELDS = ("name", "json", "image_root")
# Where a meta-architecture, with or without "Quant" in front, is told its number of classes.
NUM_CLASSES_NODES = {
    "RetinaNet": "RETINANET",
    "FCOS": "FCOS",
    "Classifier": "CLASSIFIER",
    "GeneralizedRCNN": "ROI_HEADS",
}


def register_declared(cfg: CfgNode) -> None:
    """
    Registers ``DATASETS.DECLARED`` and ``IMAGE_FOLDERS`` and checks that the datasets to train and test on exist.

    Every process of a job has to call it. The same declaration may come again.

    Args:
        cfg: config; ``DATASETS.CACHE_DIR`` is applied too.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    set_cache_dir(cfg.DATASETS.CACHE_DIR)
    declared = cfg.DATASETS.DECLARED
    if not isinstance(declared, list | tuple):
        raise ValueError(
            f"DATASETS.DECLARED must be a list of {{{', '.join(f'{f}: ...' for f in FIELDS)}}}, got {declared!r}"
        )
    for index, entry in enumerate(declared):
        _register(entry, f"DATASETS.DECLARED[{index}]")
    register_image_folders(cfg, _resolve)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                close = difflib.get_close_matches(name, DatasetCatalog.list(), 4)
                hint = f"did you mean {' or '.join(close)}" if close else "declare it in DATASETS.DECLARED"
                raise ValueError(f"DATASETS.{key}: no dataset {name!r}, {hint}")


def check_num_classes(cfg: CfgNode) -> None:
    """
    Checks the number of classes in the config against the datasets, and these against each other.

    Args:
        cfg: config whose datasets are registered.

    Raises:
        ValueError: in one line, naming the config key or the datasets that disagree.
    """
    node = NUM_CLASSES_NODES.get(cfg.MODEL.META_ARCHITECTURE.removeprefix("Quant"))
    first, expected = "", None
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = _thing_classes(name)
        if classes is None:
            logger.warning("Dataset %s does not name its classes: their number is not checked", name)
            continue
        if expected is None:
            first, expected = name, classes
        if classes != expected:
            raise ValueError(
                f"datasets {first} and {name} have different classes: {_listed(expected)} and {_listed(classes)}"
            )
        if node is not None and len(classes) != cfg.MODEL[node].NUM_CLASSES:
            raise ValueError(
                f"MODEL.{node}.NUM_CLASSES is {cfg.MODEL[node].NUM_CLASSES}, but {name} has "
                f"{len(classes)} classes: {_listed(classes)}"
            )


def _register(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != set(FIELDS):
        raise ValueError(f"{where} must have exactly the fields {', '.join(FIELDS)}, got {entry!r}")
    for field in FIELDS:
        if not isinstance(entry[field], str) or not entry[field]:
            raise ValueError(f"{where}.{field} must be a non-empty string, got {entry[field]!r}")
    name, json_file, image_root = entry["name"], _resolve(entry["json"]), _resolve(entry["image_root"])
    roots = "relative paths are looked up under $DETECTRON2_DATASETS, then in the current folder"
    if not os.path.isfile(json_file):
        raise ValueError(f"{where}.json: no file {json_file!r}; {roots}")
    if not os.path.isdir(image_root):
        raise ValueError(f"{where}.image_root: no folder {image_root!r}; {roots}")
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
            raise ValueError(f"{where}.name: {name!r} is registered already with other files, choose another name")
        return
    categories = sorted(_read_categories(json_file, where).items())
    metadata = {
        "thing_classes": [class_name for _, class_name in categories],
        "thing_dataset_id_to_contiguous_id": {key: i for i, (key, _) in enumerate(categories)},
    }
    register_coco_instances(name, metadata, json_file, image_root)


def _resolve(path: str) -> str:
    """A relative path under ``$DETECTRON2_DATASETS`` if it exists there, else as it is."""
    path = os.path.expanduser(path)
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", ""))
    under = os.path.join(root, path)
    return under if root and os.path.exists(under) else path


def _read_categories(json_file: str, where: str) -> dict[int, str]:
    """Category id -> name of a COCO annotation file."""
    refused = f"{where}.json: {json_file!r} is not COCO JSON"
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{refused}: {error}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{refused}: it has no list {part!r}")
    categories: dict[int, str] = {}
    for category in content["categories"]:
        key, name = (category.get(k) if isinstance(category, dict) else None for k in ("id", "name"))
        if type(key) is not int or not isinstance(name, str) or not name:
            raise ValueError(f"{refused}: a category needs an integer id and a name, got {category!r}")
        if key in categories or name in categories.values():
            raise ValueError(f"{refused}: category {category!r} has the id or the name of another one")
        categories[key] = name
    if not categories:
        raise ValueError(f"{refused}: 'categories' is empty")
    return categories


def _thing_classes(name: str) -> list[str] | None:
    """Class names of a registered dataset; it is loaded if they are known only then."""
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    classes = MetadataCatalog.get(name).get("thing_classes")
    return None if classes is None else list(classes)


def _listed(classes: list[str]) -> str:
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
