import hashlib
import json
import multiprocessing
import os
import time

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

import aqdet.data  # noqa: F401  (registers)
from aqdet.data import SHAPE_CLASSES, make_shapes
from aqdet.data.embedded.folder import SHAPE_SPLITS, shapes_folder
from aqdet.data.embedded.register import set_cache_dir
from aqdet.data.embedded.scenes import KEYPOINTS, MIN_VISIBLE_PERCENT, _annotation, _place_items, draw_scene
from aqdet.utils import progress

NUM_SCENES = 40


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(7, index) for index in range(NUM_SCENES)]


def test_scenes_are_the_same_everywhere():
    digest, points = hashlib.sha256(), hashlib.sha256()
    found = []
    for split in ("train", "val", "test"):
        for index in range(4):
            image, objects = draw_scene(SHAPE_SPLITS[split].seed, index)
            digest.update(image.tobytes())
            points.update(json.dumps([(o.pop("keypoints"), o.pop("num_keypoints")) for o in objects]).encode())
            digest.update(json.dumps(objects).encode())
        found.append(digest.hexdigest())
    assert points.hexdigest() == "c9103202e01c1e2fc70458eaba81f7c55fb3a3adcb007b9852bc4271a0f7c5f9"
    assert found[1] == "50a963d3b86d917f11c157086eb9383305095eb6296e81521e32e292924716ff"
    assert found[2] == "a6c0e4162bae3addc6a2b8cc00218677a40a5727c0ae230dc2580428b8a9a499"


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    image, objects = draw_scene(7, 3)
    assert np.array_equal(image, scenes[3][0]) and objects == scenes[3][1]
    assert not np.array_equal(image, scenes[4][0])
    assert not np.array_equal(image, draw_scene(8, 3)[0])


def test_boxes_lie_in_the_image_and_hold_the_shape(scenes):
    for image, objects in scenes:
        assert image.shape == (192, 192, 3) and image.dtype == np.uint8
        for item in objects:
            x, y, w, h = item["bbox"]
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 192 and y + h <= 192
            assert 0 < item["area"] <= w * h
            points = np.array(item["segmentation"][0]).reshape(-1, 2)
            assert np.array_equal(points.min(axis=0), [x + 0.5, y + 0.5])
            assert np.array_equal(points.max(axis=0), [x + w - 0.5, y + h - 0.5])


def test_all_classes_and_size_bands_are_there(scenes):
    items = [item for _, objects in scenes for item in objects]
    assert {item["category_id"] for item in items} == set(range(1, len(SHAPE_CLASSES) + 1))
    areas = np.array([item["area"] for item in items])
    small, large = (areas < 32**2).mean(), (areas > 96**2).mean()
    assert small > 0.2 and large > 0.015 and small + large < 0.8


def test_objects_stay_visible():
    overlapping = 0
    for index in range(10):
        items = _place_items(np.random.Generator(np.random.PCG64(index)), 192)
        for position, item in enumerate(items):
            hidden = np.zeros_like(item.mask)
            for above in items[position + 1 :]:
                hidden |= above.mask
            if item.kind in SHAPE_CLASSES:
                visible = (item.mask & ~hidden).sum() / item.mask.sum()
                assert visible >= MIN_VISIBLE_PERCENT / 100
                overlapping += visible < 1
    assert overlapping > 5


def test_keypoints_are_the_extremes_of_the_upright_shape_and_hidden_behind_others():
    hidden = 0
    for index in range(10):
        items = _place_items(np.random.Generator(np.random.PCG64(index)), 192)
        for position, item in enumerate(items):
            if item.kind not in SHAPE_CLASSES:
                continue
            annotation = _annotation(item, items[position + 1 :])
            points = np.array(annotation["keypoints"]).reshape(-1, 3)
            assert len(points) == annotation["num_keypoints"] == len(KEYPOINTS)
            centre, left, right, top, bottom = points[:, :2]
            x, y, width, height = annotation["bbox"]
            assert ((points[:, :2] >= (x - 1, y - 1)) & (points[:, :2] <= (x + width, y + height))).all()
            # Turned by at most 12 degrees, an extreme is still near its side, and left and right are.
            assert left[0] < centre[0] < right[0] and top[1] < centre[1] < bottom[1]
            assert left[0] - x < width * 0.15 and x + width - right[0] < width * 0.15
            assert top[1] - y < height * 0.25 and y + height - bottom[1] < height * 0.25
            for px, py, visibility in points:
                covered = any(other.mask[py, px] for other in items[position + 1 :])
                assert visibility == (1 if covered else 2)
                hidden += covered
    assert hidden > 5


def test_written_dataset_is_valid_coco(tmp_path):
    path = make_shapes(tmp_path / "a", num_images=5, seed=3, size=96)
    coco = COCO(str(path))
    assert coco.getImgIds() == [1, 2, 3, 4, 5]
    for item in coco.loadAnns(coco.getAnnIds()):
        # The mask leaves out half of the outline's pixels, so it is not larger than what is drawn.
        assert coco.annToMask(item).sum() == pytest.approx(item["area"], rel=0.15, abs=8)
    records = load_coco_json(str(path), str(path.parent / "images"), f"test_{path}")
    for index, record in enumerate(records):
        image, objects = draw_scene(3, index, 96)
        assert np.array_equal(cv2.imread(record["file_name"]), image)
        assert [a["bbox"] for a in record["annotations"]] == [o["bbox"] for o in objects]
        assert (record["height"], record["width"]) == (96, 96)
    again = make_shapes(tmp_path / "b", num_images=5, seed=3, size=96)
    assert path.read_bytes() == again.read_bytes()


def _make(folder):
    return str(make_shapes(folder, num_images=6, seed=3, size=96)), os.getpid()


def test_processes_that_start_together_write_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(_make, [tmp_path / "shapes"] * 3, chunksize=1)
    assert len({path for path, _ in results}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shapes", "shapes.lock"]
    path = tmp_path / "shapes" / "annotations.json"
    before = path.stat().st_mtime_ns
    _make(tmp_path / "shapes")
    assert path.stat().st_mtime_ns == before


def test_an_interrupted_generation_leaves_nothing_and_starts_again(tmp_path, monkeypatch):
    written = []

    def interrupted(path, image):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return True

    killed = tmp_path / ".shapes.part-killed"
    killed.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _make(tmp_path / "shapes")
    assert not (tmp_path / "shapes").exists()
    assert list(tmp_path.glob(".*part*")) == [killed]
    os.utime(killed, (0, time.time() - 7200))
    _make(tmp_path / "shapes")
    assert not killed.exists() and len(list((tmp_path / "shapes" / "images").iterdir())) == 6


def test_a_damaged_folder_is_refused(tmp_path):
    _make(tmp_path / "shapes")
    next((tmp_path / "shapes" / "images").glob("*.png")).unlink()
    with pytest.raises(ValueError, match="damaged: 5 of 6 images, annotations present; delete the folder"):
        _make(tmp_path / "shapes")


def test_folder_name_follows_the_generator(tmp_path, monkeypatch):
    from aqdet.data.embedded import scenes as shapes

    before = shapes_folder("val", tmp_path)
    assert before.parent == tmp_path and before == shapes_folder("val", tmp_path)
    assert before != shapes_folder("train", tmp_path)
    changed = tmp_path / "shapes.py"
    changed.write_text("PIXEL_NOISE = 1\n")
    monkeypatch.setattr(shapes, "__file__", str(changed))
    assert shapes_folder("val", tmp_path) != before


def test_registered_lazily(tmp_path, monkeypatch):
    small = {**SHAPE_SPLITS, "val": type(SHAPE_SPLITS["val"])(4, seed=2)}
    monkeypatch.setattr("aqdet.data.embedded.register.SHAPE_SPLITS", small)
    set_cache_dir(str(tmp_path))
    try:
        metadata = MetadataCatalog.get("aqdet_shapes_val")
        assert metadata.thing_classes == list(SHAPE_CLASSES) and metadata.evaluator_type == "coco"
        assert metadata.json_file.startswith(str(tmp_path)) and not list(tmp_path.iterdir())
        records = DatasetCatalog.get("aqdet_shapes_val")
        assert len(records) == 4 and os.path.isfile(metadata.json_file)
        assert os.path.dirname(records[0]["file_name"]) == metadata.image_root
        ids = {COCO(metadata.json_file).getCatIds()[i]: i for i in range(len(SHAPE_CLASSES))}
        assert metadata.thing_dataset_id_to_contiguous_id == ids
    finally:
        set_cache_dir("")


def test_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AQDET_CACHE", str(tmp_path / "cache"))
    set_cache_dir("")
    try:
        assert MetadataCatalog.get("aqdet_shapes_train").json_file.startswith(str(tmp_path / "cache"))
    finally:
        monkeypatch.undo()
        set_cache_dir("")


def test_outlines_rasterize_to_the_drawn_pixels():
    shares = []
    for index in range(3):
        for item in _place_items(np.random.Generator(np.random.PCG64(index)), 192):
            if item.kind not in SHAPE_CLASSES:
                continue
            runs = mask_util.merge(mask_util.frPyObjects(_annotation(item, [])["segmentation"], 192, 192))
            mask = mask_util.decode(runs).astype(bool)
            shares.append((mask & item.mask).sum() / (mask | item.mask).sum())
    # Drawing covers the pixels that the outline touches, COCO those whose centres lie inside.
    assert len(shares) > 5 and min(shares) > 0.8 and np.mean(shares) > 0.9


@pytest.mark.parametrize("pause, lines", [(0.0, 30), (30.0, 0)])
def test_progress_is_lines_where_the_output_is_no_terminal(tmp_path, capsys, monkeypatch, pause, lines):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", pause)
    make_shapes(tmp_path / "drawn", num_images=30, seed=5, size=96)
    shown = capsys.readouterr().err
    assert "\r" not in shown and shown.count("drawing drawn") >= lines and ("30/30" in shown) == bool(lines)
