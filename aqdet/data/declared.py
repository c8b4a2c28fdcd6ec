"""Datasets declared in a config, and checks of the data against the config before training."""

from __future__ import annotations

import difflib
import json
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .builtin import set_cache_dir

FIELDS = ("name", "json", "image_root")


def _resolve(path: str) -> str:
    """A relative path under ``$DETECTRON2_DATASETS`` if it exists there, else as it is."""
    root = os.environ.get("DETECTRON2_DATASETS", "")
    under = os.path.join(os.path.expanduser(root), path)
    return under if root and os.path.exists(under) else path


def register_declared(cfg: CfgNode) -> None:
    """Registers ``DATASETS.DECLARED`` and checks that the datasets to train and test on exist.

    Args:
        cfg: config; ``DATASETS.CACHE_DIR`` is applied too.

    Raises:
        ValueError: in one line, naming the entry, the field, the value and what would be right.
    """
    set_cache_dir(cfg.DATASETS.CACHE_DIR)
    for index, entry in enumerate(cfg.DATASETS.DECLARED):
        where = f"DATASETS.DECLARED[{index}]"
        if not isinstance(entry, dict) or set(entry) != set(FIELDS):
            raise ValueError(f"{where} must have exactly the fields {', '.join(FIELDS)}, got {entry!r}")
        for field in FIELDS:
            if not isinstance(entry[field], str) or not entry[field]:
                raise ValueError(f"{where}.{field} must be a non-empty string, got {entry[field]!r}")
        json_file, image_root = _resolve(entry["json"]), _resolve(entry["image_root"])
        if not os.path.isfile(json_file):
            raise ValueError(
                f"{where}.json: no file {json_file!r}; paths are relative to $DETECTRON2_DATASETS or the current folder"
            )
        if not os.path.isdir(image_root):
            raise ValueError(
                f"{where}.image_root: no folder {image_root!r}; paths are relative to "
                "$DETECTRON2_DATASETS or the current folder"
            )
        name = entry["name"]
        if name in DatasetCatalog:
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
                raise ValueError(f"{where}.name: {name!r} is registered already with other files, choose another name")
            continue
        classes = _class_names(json_file, where)
        register_coco_instances(name, {"thing_classes": classes}, json_file, image_root)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                close = difflib.get_close_matches(name, DatasetCatalog.list(), 4)
                hint = f"did you mean {' or '.join(close)}" if close else "declare it in DATASETS.DECLARED"
                raise ValueError(f"DATASETS.{key}: no dataset {name!r}, {hint}")


def _class_names(json_file: str, where: str) -> list[str]:
    """Names in the order of category ids, which is the order of Detectron2's contiguous ids."""
    try:
        with open(json_file, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}.json: {json_file!r} is not COCO JSON with categories: {error!r}") from error


def check_num_classes(cfg: CfgNode) -> None:
    """Checks the number of classes in the config against the datasets, and these against each other.

    Raises:
        ValueError: in one line, naming the config key or the datasets that disagree.
    """
    classes = {
        name: list(MetadataCatalog.get(name).get("thing_classes") or [])
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    }
    known = {name: names for name, names in classes.items() if names}
    for name, names in known.items():
        first, expected = next(iter(known.items()))
        if names != expected:
            raise ValueError(f"datasets {first} and {name} have different classes: {expected} and {names}")
        key = "RETINANET" if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE else "ROI_HEADS"
        if len(names) != cfg.MODEL[key].NUM_CLASSES:
            raise ValueError(
                f"MODEL.{key}.NUM_CLASSES is {cfg.MODEL[key].NUM_CLASSES}, but {name} has "
                f"{len(names)} classes: {', '.join(names[:10])}"
            )
