import concurrent.futures
import hashlib
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

import aqdet.data  # noqa: F401  (registers)
from aqdet.data import SHAPE_CLASSES, make_shapes
from aqdet.data.builtin import set_cache_dir
from aqdet.data.shapes import SHAPE_SPLITS, draw_scene


def test_scenes_are_the_same_everywhere():
    digest = hashlib.sha256()
    for index in range(4):
        image, objects = draw_scene(SHAPE_SPLITS["train"].seed, index)
        digest.update(image.tobytes())
        digest.update(json.dumps(objects).encode())
    assert digest.hexdigest() == "441f56db7d4bb8042128d9f63d46ed1def599f52b74eb93f2ade8fc70fc9e36a"


def test_bands_classes_and_boxes():
    areas, kinds = [], set()
    for index in range(60):
        image, objects = draw_scene(7, index)
        assert image.shape == (192, 192, 3) and image.dtype == np.uint8
        for item in objects:
            x, y, w, h = item["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 192 and y + h <= 192
            assert 0 < item["area"] <= w * h
            areas.append(item["area"])
            kinds.add(item["category_id"])
    assert kinds == set(range(1, len(SHAPE_CLASSES) + 1))
    small = sum(a < 32**2 for a in areas) / len(areas)
    large = sum(a > 96**2 for a in areas) / len(areas)
    assert small > 0.2 and large > 0.015 and small + large < 0.8


def test_written_once_whole_and_valid(tmp_path):
    folder = tmp_path / "shapes"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: make_shapes(folder, num_images=5, seed=3, size=96), range(3)))
    assert len(set(paths)) == 1 and not list(tmp_path.glob(".*part*"))
    before = paths[0].stat().st_mtime_ns
    make_shapes(folder, num_images=5, seed=3, size=96)
    assert paths[0].stat().st_mtime_ns == before
    coco = COCO(str(paths[0]))
    assert len(coco.getImgIds()) == 5
    assert all(coco.annToMask(a).sum() > 0 for a in coco.loadAnns(coco.getAnnIds()))
    next((folder / "images").glob("*.png")).unlink()
    with pytest.raises(ValueError, match="damaged: 4 of 5 images"):
        make_shapes(folder, num_images=5, seed=3, size=96)


def test_registered_lazily(tmp_path):
    set_cache_dir(str(tmp_path))
    try:
        metadata = MetadataCatalog.get("aqdet_shapes_val")
        assert metadata.json_file.startswith(str(tmp_path)) and not list(tmp_path.iterdir())
        assert "aqdet_shapes_train" in DatasetCatalog.list()
        assert metadata.thing_classes == list(SHAPE_CLASSES)
    finally:
        set_cache_dir("")
