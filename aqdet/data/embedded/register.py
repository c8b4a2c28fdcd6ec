"""Registers the embedded dataset with Detectron2; it is drawn on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .. import cache_folder
from .folder import SHAPE_SPLITS, make_shapes, shapes_folder
from .scenes import KEYPOINTS, SHAPE_CLASSES


def set_cache_dir(path: str) -> None:
    """Sets the cache folder, and with it the embedded dataset's; see :func:`aqdet.data.cache_folder.set_cache_dir`."""
    cache_folder.set_cache_dir(path)
    for split in SHAPE_SPLITS:
        _set_metadata(split)


def _folder(split: str) -> Path:
    return shapes_folder(split, cache_folder.cache_dir())


def _set_metadata(split: str) -> None:
    name = f"aqdet_shapes_{split}"
    MetadataCatalog.pop(name, None)
    folder = _folder(split)
    MetadataCatalog.get(name).set(
        json_file=str(folder / "annotations.json"),
        image_root=str(folder / "images"),
        evaluator_type="coco",
        thing_classes=list(SHAPE_CLASSES),
        keypoint_names=list(KEYPOINTS),
        keypoint_flip_map=[("left", "right")],
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(SHAPE_CLASSES))},
    )


def _load(split: str) -> list[dict[str, Any]]:
    spec, folder = SHAPE_SPLITS[split], _folder(split)
    json_file = make_shapes(folder, num_images=spec.num_images, seed=spec.seed)
    return load_coco_json(str(json_file), str(folder / "images"), f"aqdet_shapes_{split}")


for _split in SHAPE_SPLITS:
    if f"aqdet_shapes_{_split}" not in DatasetCatalog:
        DatasetCatalog.register(f"aqdet_shapes_{_split}", lambda split=_split: _load(split))
        _set_metadata(_split)
