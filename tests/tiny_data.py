"""A COCO dataset of a few small images, and configs that train on it in seconds."""

import json

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import make_cfg
from PIL import Image

from aqdet.data import register_declared

CLASSES = ("disc", "cross", "ring")
NARROW = (
    "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8"
).split()
"""Of a trunk with few weights, whose steps and checkpoints take a fraction of the time; ResNet-18 has one width."""


def write_dataset(folder, name, *, num_images=4, size=64, empty=(), classes=CLASSES):
    """Images of noise, each with an object of the first two classes, or none where its index is in ``empty``.

    Returns an entry of DATASETS.DECLARED.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(num_images):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "width": size, "height": size})
        boxes = [] if index in empty else [[4, 5, 36, 33], [20, 10, 30, 50]]
        for number, box in enumerate(boxes[: len(classes)]):
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": number + 1}
            annotations.append({**annotation, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": i + 1, "name": c} for i, c in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return {"name": name, "json": str(path), "image_root": str(folder)}


def register_image(folder, name, annotations, categories):
    """Registers a dataset with one image of 100x100, number 5, whose file nothing reads; returns its name."""
    images = [{"id": 5, "file_name": "x.png", "width": 100, "height": 100}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "a.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(folder / "a.json"), str(folder))
    DatasetCatalog.get(name)
    return name


def write_image_folder(folder, name, *, per_class=2, size=48, classes=CLASSES):
    """Images of noise, brighter from class to class. Returns an entry of DATASETS.IMAGE_FOLDERS."""
    rng = np.random.default_rng(0)
    for label, class_name in enumerate(classes):
        (folder / class_name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(60 * label, 60 * label + 60, (size, size + 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / class_name / f"{index}.png")
    return {"name": name, "root": str(folder)}


def write_yolo(
    root, labels=("0 0.5 0.5 0.25 0.5", "1 0.25 0.25 0.5 0.5\n0 0.5 0.5 1 1"), names=("disc", "cross"), **more
):
    """A YOLO folder with images of 64x32 in a split ``train``, one for each text of labels; None for no file."""
    rng = np.random.default_rng(0)
    for name in ("images/train", "labels/train"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for index, label in enumerate(labels):
        pixels = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/train/bild ü {index}.png")
        if label is not None:
            (root / f"labels/train/bild ü {index}.txt").write_text(label)
    content = {
        "path": ".",
        "train": "images/train",
        "names": dict(names) if isinstance(names, dict) else names and list(names),
        **more,
    }
    (root / "data.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return root


def train_overrides(entry, output_dir, max_iter=4):
    """``KEY VALUE ...`` of a training of ``max_iter`` iterations on two images each."""
    return [
        *("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", str((entry["name"],))),
        *("DATASETS.TEST", str((entry["name"],)), "OUTPUT_DIR", str(output_dir), "SEED", "1"),
        *("DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", str(max_iter), "SOLVER.BASE_LR", "0.01"),
        *("SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()", "MODEL.QUANT.CALIBRATION.NUM_BATCHES", "2"),
        *("MODEL.QUANT.CALIBRATION.METHOD", "minmax"),
    ]


def train_cfg(entry, output_dir, *overrides, max_iter=4):
    """A frozen config, its datasets registered and its output folder made."""
    cfg = make_cfg(*train_overrides(entry, output_dir, max_iter), *overrides)
    # xdist may come back to a module, whose fixtures are then made again, elsewhere.
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(entry["name"], None)
    register_declared(cfg)
    output_dir.mkdir(parents=True, exist_ok=True)
    cfg.freeze()
    return cfg
