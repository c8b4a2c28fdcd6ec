import importlib.util
import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from helpers import make_cfg
from tiny_data import CLASSES, write_dataset

from aqdet.data import register_declared
from aqdet.engine import Trainer
from aqdet.evaluation import COCOEvaluator, check_coco_eval


def evaluate(tmp_path, boxes, found):
    """AP of detections ``found`` on one image of 100x100 with ``boxes`` (x, y, w, h) of class a."""
    name = f"test_eval_{tmp_path.name}"
    content = {
        "images": [{"id": 5, "file_name": "x.png", "width": 100, "height": 100}],
        "categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": 5, "category_id": 3, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for i, b in enumerate(boxes)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path))
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(found).reshape(-1, 4))
    instances.scores = torch.full((len(found),), 0.9)
    instances.pred_classes = torch.zeros(len(found)).long()
    evaluator.process([{"image_id": 5}], [{"instances": instances}])
    result = evaluator.evaluate()
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    return result["bbox"], written


def test_a_perfect_detector(tmp_path):
    result, written = evaluate(tmp_path, [[10, 10, 50, 50]], [[10.0, 10, 60, 60]])
    assert result["AP"] == written["AP"] == pytest.approx(100)
    assert written["APm"] == pytest.approx(100) and written["APs"] is None
    assert written["AP-a"] == pytest.approx(100) and written["AP-b"] is None


@pytest.mark.parametrize("boxes", [[], [[10, 10, 50, 50]]])
@pytest.mark.parametrize("found", [[], [[70.0, 70, 80, 80]]])
def test_nothing_found_or_nothing_there_is_zero(tmp_path, boxes, found):
    result, written = evaluate(tmp_path, boxes, found)
    for key in ("AP", "AP50", "AP75"):
        assert result[key] == written[key] == 0
    assert {"APs", "APm", "APl", "AP-a", "AP-b"} <= set(written)


# The two objects of every image of write_dataset, both of medium size, by class.
BOXES = {0: [4.0, 5.0, 40.0, 38.0], 1: [20.0, 10.0, 50.0, 60.0]}
NUMBERS = ("AP", "AP50", "AP75", "APm", "AP-disc", "AP-cross")
NONE = {"APs": None, "APl": None, "AP-ring": None}


@pytest.fixture
def evaluate_tiny(tmp_path):
    """Function of detections {image id: [(class, score, box)]} and dataset options: the metrics file."""
    name = f"coco_of_{tmp_path.name}"

    def run(detections, drop=(), add=(), declare=True, coco_eval="pycocotools", **options):
        entry = write_dataset(tmp_path / "data", name, **options)
        path = tmp_path / "data" / f"{name}.json"
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            for field in drop:
                del annotation[field]
        content["annotations"] += add
        path.write_text(json.dumps(content))
        if declare:
            register_declared(make_cfg("DATASETS.DECLARED", str([entry]), "DATASETS.TEST", str((name,))))
        else:
            register_coco_instances(name, {}, entry["json"], entry["image_root"])
        DatasetCatalog.get(name)  # fills in the category ids, as the test loader does
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "inference"), coco_eval=coco_eval)
        evaluator.reset()
        for image_id, found in detections.items():
            instances = Instances((64, 64))
            instances.pred_boxes = Boxes(torch.tensor([box for _, _, box in found]).reshape(-1, 4))
            instances.scores = torch.tensor([score for _, score, _ in found])
            instances.pred_classes = torch.tensor([number for number, _, _ in found]).long()
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        values = evaluator.evaluate()["bbox"]
        written = json.loads((tmp_path / "inference" / "metrics.json").read_text())
        assert written == {key: v if math.isfinite(v) else None for key, v in values.items()}
        assert not [file for file in os.listdir(tmp_path / "inference") if file.endswith(".part")]
        return written

    yield run
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_half_of_the_objects(evaluate_tiny):
    # Of class 0 two in four are found: precision 1 at the 51 recalls 0, 0.01 ... 0.5 in 101, else 0. Of
    # class 1 none is found.
    half = 100 * 51 / 101
    values = evaluate_tiny({i: [(0, 0.9, BOXES[0])] for i in (1, 2)})
    expected = {key: half / 2 for key in NUMBERS} | {"AP-disc": half, "AP-cross": 0.0} | NONE
    assert values == pytest.approx(expected)


@pytest.mark.parametrize("detections", [{}, {i: [] for i in (1, 2, 3, 4)}], ids=["no outputs", "empty outputs"])
def test_zero_detections_are_zero(evaluate_tiny, detections):
    assert evaluate_tiny(detections) == {**dict.fromkeys(NUMBERS, 0.0), **NONE}


@pytest.mark.parametrize("found", [[], [(0, 0.9, BOXES[0])]], ids=["nothing found", "false positives"])
def test_data_without_boxes_is_zero(evaluate_tiny, found):
    values = evaluate_tiny({i: found for i in (1, 2)}, num_images=2, empty=(0, 1))
    zeros = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    assert values == {**zeros, **dict.fromkeys(("APm", "AP-disc", "AP-cross")), **NONE}


def test_image_without_boxes_among_others(evaluate_tiny):
    found = [(number, 0.9, box) for number, box in BOXES.items()]
    values = evaluate_tiny({1: [], 2: found, 3: found, 4: found}, empty=(0,))
    assert values["AP"] == pytest.approx(100)


def test_one_class_has_its_ap(evaluate_tiny, tmp_path):
    found = {i: [(0, 0.9, BOXES[0])] for i in (1, 2)}
    values = evaluate_tiny(found, classes=CLASSES[:1])
    assert values["AP-disc"] == values["AP"] == pytest.approx(100 * 51 / 101)


def test_fields_that_training_does_without_are_filled_in(evaluate_tiny, caplog):
    # One class of two found, so that a wrong area or crowd flag would change a number.
    found = {i: [(0, 0.9, BOXES[0])] for i in (1, 2)}
    complete = evaluate_tiny(found)
    assert evaluate_tiny(found, drop=("area", "iscrowd")) == complete
    assert "lack" not in caplog.text


def test_fields_that_a_dataset_not_declared_lacks(evaluate_tiny, caplog):
    found = {i: [(0, 0.9, BOXES[0])] for i in (1, 2)}
    values = evaluate_tiny(found, drop=("area", "iscrowd"), declare=False)
    assert values["APm"] == pytest.approx(100 * 51 / 101 / 2) and values["APs"] is None
    assert "8 annotations of coco_of_" in caplog.text
    assert "lack 'iscrowd': taken as 0" in caplog.text and "lack 'area': taken from the box" in caplog.text


def test_table_by_class(evaluate_tiny, caplog):
    caplog.set_level("INFO", "aqdet")
    evaluate_tiny({i: [(0, 0.9, BOXES[0])] for i in (1, 2)})
    rows = [line.split() for line in caplog.text.splitlines()]
    assert ["class", "id", "objects", "AP", "AP50", "AP75"] in rows
    assert ["disc", "1", "4", "50.50", "50.50", "50.50"] in rows
    assert ["cross", "2", "4", "0.00", "0.00", "0.00"] in rows
    assert ["ring", "3", "0", "-", "-", "-"] in rows


def random_evaluation(tmp_path, coco_eval, **of_annotation):
    """All metrics on random boxes, crowd regions among them, and detections near them; ids have gaps."""
    rng = np.random.default_rng(3)
    name = f"random_{tmp_path.name}_{coco_eval}"
    images = [{"id": 7 * i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(12)]
    annotations, detections = [], []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            x, y, w, h = rng.uniform([0, 0, 4, 4], [80, 80, 110, 110]).tolist()
            category, crowd = int(rng.choice([2, 5, 11])), int(rng.random() < 0.2)
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category}
            annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                near = np.array([x, y, x + w, y + h]) + rng.normal(0, 3, 4)
                number = int(rng.integers(3)) if rng.random() < 0.2 else (2, 5, 11).index(category)
                # Scores of two digits: ties are part of the comparison.
                detections.append((image["id"], near, round(float(rng.random()), 2), number))
    categories = [{"id": key, "name": f"class {key}"} for key in (2, 5, 11)]
    path = tmp_path / f"{coco_eval}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    register_coco_instances(name, {}, str(path), str(tmp_path))
    DatasetCatalog.get(name)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / coco_eval), coco_eval=coco_eval)
    evaluator.reset()
    for image in images:
        own = [d for d in detections if d[0] == image["id"]]
        instances = Instances((200, 200))
        instances.pred_boxes = Boxes(torch.tensor(np.array([d[1] for d in own]).reshape(-1, 4)))
        instances.scores = torch.tensor([d[2] for d in own])
        instances.pred_classes = torch.tensor([d[3] for d in own]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"], json.loads((tmp_path / coco_eval / "coco_instances_results.json").read_text())


def test_both_implementations_agree_to_1e_9(tmp_path):
    slow, results = random_evaluation(tmp_path, "pycocotools")
    fast, _ = random_evaluation(tmp_path, "faster-coco-eval")
    assert 5 < slow["AP"] < 95 and len(slow) == 9
    assert fast == pytest.approx(slow, abs=1e-9, nan_ok=True)
    # In the ids of the annotation file.
    assert {result["category_id"] for result in results} == {2, 5, 11}


@pytest.mark.parametrize("coco_eval", ["pycocotools", "faster-coco-eval"])
def test_detections_in_a_crowd_region_are_not_counted(evaluate_tiny, coco_eval):
    # Each object found, and with a higher score two detections within a region of the same class.
    inside = [(0, 0.95, [2.0, 46.0, 20.0, 60.0]), (0, 0.96, [22.0, 46.0, 40.0, 60.0])]
    found = {i: [(0, 0.9, BOXES[0]), *inside] for i in (1, 2)}
    region = {"category_id": 1, "bbox": [0, 44, 60, 20], "area": 1200}
    values = []
    for flags in ({"iscrowd": 1}, {"ignore": 1}, {"iscrowd": 0}):
        add = [{"id": 10 + i, "image_id": i, **region, **flags} for i in (1, 2)]
        values.append(evaluate_tiny(found, num_images=2, add=add, coco_eval=coco_eval)["AP-disc"])
    assert values[:2] == pytest.approx([100, 100])
    assert values[2] < 60


def test_unknown_or_missing_implementations_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="TEST.COCO_EVAL must be one of pycocotools, faster-coco-eval, got 'fast'"):
        check_coco_eval("fast")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="TEST.COCO_EVAL: 'faster-coco-eval' is not installed"):
        check_coco_eval("faster-coco-eval")
    check_coco_eval("pycocotools")


@pytest.fixture
def crowded(tmp_path, caplog):
    """Function of a limit, detections and an implementation: results for an image of 150 objects in rows of ten."""
    boxes = [[20.0 * (i % 10), 20.0 * (i // 10), 10.0, 10.0] for i in range(150)]
    name = f"crowded_{tmp_path.name}"
    annotations = [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    annotations += [{**annotations[0], "id": 200 + i, "iscrowd": 1} for i in range(60)]
    image = {"id": 1, "file_name": "a.png", "width": 200, "height": 300}
    content = {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path))
    DatasetCatalog.get(name)

    def run(found, coco_eval, **limit):
        caplog.clear()
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"), coco_eval=coco_eval, **limit)
        evaluator.reset()
        instances = Instances((300, 200))
        instances.pred_boxes = Boxes(torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes[:found]]))
        instances.scores = torch.linspace(1, 0.5, found)
        instances.pred_classes = torch.zeros(found).long()
        evaluator.process([{"image_id": 1}], [{"instances": instances}])
        return evaluator.evaluate()["bbox"], json.loads((tmp_path / "out" / "metrics.json").read_text())

    yield run
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)


@pytest.mark.parametrize("coco_eval", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize(
    "limit, found, correct",
    [(0, 150, 100), (100, 150, 100), (99, 150, 99), (150, 150, 150), (200, 120, 120), (7, 9, 7), (1, 9, 1)],
)
def test_only_the_best_detections_of_an_image_count(crowded, caplog, coco_eval, limit, found, correct):
    if coco_eval == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    with caplog.at_level(logging.INFO, "aqdet"):
        result, written = crowded(found, coco_eval, **({"max_dets_per_image": limit} if limit else {}))
    # All that count are right: precision is 1 at the recall levels 0, 0.01 ... that are reached, 0 at the others.
    expected = 100 * sum(level / 100 <= correct / 150 for level in range(101)) / 101
    for key in ("AP", "AP50", "AP75", "APs", "AP-a"):
        assert result[key] == written[key] == pytest.approx(expected)
    limit = limit or 100
    assert written.get("max_dets_per_image", 100) == limit and ("max_dets_per_image" in written) == (limit != 100)
    assert f"the best {limit} detections of an image" in caplog.text
    warned = "1 images of crowded_test_only_the_best_detections" in caplog.text
    assert warned == (limit < 150) == ("one of them 150: no detector finds them all" in caplog.text)


def test_the_limit_is_the_configs(crowded, tmp_path):
    name = f"crowded_{tmp_path.name}"
    cfg = make_cfg("DATASETS.TEST", f"('{name}',)", "OUTPUT_DIR", str(tmp_path))
    assert Trainer.build_evaluator(cfg, name).limit == 100
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    assert Trainer.build_evaluator(cfg, name).limit == 200
