"""Which evaluator a dataset gets, and what those beside COCO's measure."""

import importlib.util
import json
import math
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.data.datasets.lvis import register_lvis_instances
from detectron2.evaluation import CityscapesInstanceEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from helpers import CLASSIFIER, QUANT, make_cfg

from aqdet.engine import Trainer
from aqdet.evaluation import COCOEvaluator, LVISEvaluator, TopKEvaluator, build_evaluator, check_evaluator
from aqdet.evaluation.build import REFUSED, SUPPORTED, RecordedEvaluator

needs_faster = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)


@pytest.fixture
def name(tmp_path):
    """A name for a dataset, forgotten after the test."""
    name = f"build_{tmp_path.name}"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


def instances(found, size=(100, 100)):
    """Detections from ``[(class, score, (x0, y0, x1, y1)), ...]``."""
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.tensor([score for _, score, _ in found])
    result.pred_classes = torch.tensor([index for index, _, _ in found], dtype=torch.long)
    return result


def run(evaluator, detections):
    """Results of detections by image id."""
    evaluator.reset()
    for image_id, found in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances(found)}])
    return evaluator.evaluate()


# --- LVIS ---

# Class 1 is rare, 2 common, 3 frequent. Of image 1 it is known that it has no object of class 2, and nothing of 3;
# the objects of class 1 in image 2 are not all annotated.
LVIS = {
    "images": [
        {"id": 1, "width": 100, "height": 100, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
        {"id": 2, "width": 100, "height": 100, "neg_category_ids": [3], "not_exhaustive_category_ids": [1]},
        {"id": 3, "width": 100, "height": 100, "neg_category_ids": [1], "not_exhaustive_category_ids": []},
    ],
    "categories": [
        {"id": 1, "name": "r", "synset": "r", "frequency": "r"},
        {"id": 2, "name": "c", "synset": "c", "frequency": "c"},
        {"id": 3, "name": "f", "synset": "f", "frequency": "f"},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "segmentation": []},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "segmentation": []},
        {"id": 3, "image_id": 2, "category_id": 2, "bbox": [40, 40, 50, 50], "area": 2500, "segmentation": []},
        {"id": 4, "image_id": 3, "category_id": 2, "bbox": [10, 10, 50, 50], "area": 2500, "segmentation": []},
        {"id": 5, "image_id": 3, "category_id": 3, "bbox": [40, 40, 50, 50], "area": 2500, "segmentation": []},
    ],
}
BOX, OTHER, AWAY = (10, 10, 60, 60), (40, 40, 90, 90), (0, 80, 20, 100)


@pytest.fixture
def lvis(tmp_path, name):
    """Function of changes to the annotation file: an evaluator of it."""

    def register(**changes):
        (tmp_path / "lvis.json").write_text(json.dumps({**LVIS, **changes}))
        classes = [category["name"] for category in LVIS["categories"]]
        mapping = {1: 0, 2: 1, 3: 2}
        register_lvis_instances(
            name,
            {"thing_classes": classes, "thing_dataset_id_to_contiguous_id": mapping},
            str(tmp_path / "lvis.json"),
            str(tmp_path),
        )
        return build_evaluator(make_cfg(), name, str(tmp_path / "out"))

    return register


PERFECT = {1: [(0, 0.9, BOX)], 2: [(0, 0.9, BOX), (1, 0.9, OTHER)], 3: [(1, 0.9, BOX), (2, 0.9, OTHER)]}


@needs_faster
def test_lvis_ignores_what_is_not_annotated(lvis, tmp_path):
    evaluator = lvis()
    assert type(evaluator) is LVISEvaluator and evaluator.limit == 100
    perfect = run(evaluator, PERFECT)["bbox"]
    assert [perfect[key] for key in ("AP", "AP50", "APr", "APc", "APf")] == pytest.approx([100] * 5)
    # Of class 3 nothing is known in image 1, and class 1 is not annotated to completeness in image 2: no error there.
    unknown = {**PERFECT, 1: [*PERFECT[1], (2, 0.95, AWAY)], 2: [*PERFECT[2], (0, 0.95, AWAY)]}
    assert run(evaluator, unknown)["bbox"]["AP"] == pytest.approx(100)
    # Class 2 is known to be absent from image 1: the best detection is wrong, and precision is 1/2, then 2/3.
    wrong = run(evaluator, {**PERFECT, 1: [*PERFECT[1], (1, 0.95, AWAY)]})["bbox"]
    assert wrong["APr"] == wrong["APf"] == pytest.approx(100) and wrong["APc"] == pytest.approx(100 * 2 / 3)
    assert wrong["AP"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["APc"] == wrong["APc"] and written["AP-c"] == wrong["APc"]
    assert "max_dets_per_image" not in written and written["APs"] is None


@needs_faster
@pytest.mark.parametrize("found", [{1: [], 2: [], 3: []}, {1: [(0, 0.9, AWAY)], 2: [], 3: []}])
def test_lvis_without_hits_is_zero(lvis, found):
    rare = [annotation for annotation in LVIS["annotations"] if annotation["category_id"] != 3]
    result = run(lvis(annotations=rare), found)["bbox"]
    assert [result[key] for key in ("AP", "AP50", "APr", "APc")] == [0] * 4 and math.isnan(result["APf"])


@needs_faster
def test_a_file_that_is_not_lvis_is_named(lvis, tmp_path):
    images = [{"id": 1, "width": 100, "height": 100, "neg_category_ids": []}]
    with pytest.raises(ValueError, match=r"lvis.json: 'not_exhaustive_category_ids' is missing from images"):
        lvis(images=images)


def test_what_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    MetadataCatalog.get(name).evaluator_type = "lvis"
    with pytest.raises(ValueError, match=f"DATASETS.TEST '{name}' has evaluator_type 'lvis': .* pip install faster-"):
        check_evaluator(make_cfg(), name)
    mask_rcnn = make_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "True")
    MetadataCatalog.pop(name)
    MetadataCatalog.get(name).evaluator_type = "cityscapes_instance"
    with pytest.raises(ValueError, match="pip install cityscapesscripts"):
        check_evaluator(mask_rcnn, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: True)
    MetadataCatalog.get(name).thing_classes = ["car"]
    evaluator = build_evaluator(mask_rcnn, name, "out")
    assert isinstance(evaluator, RecordedEvaluator)
    assert isinstance(evaluator._evaluator, CityscapesInstanceEvaluator)


# --- Pascal VOC ---


@pytest.fixture
def voc(tmp_path, name):
    """An evaluator of a VOC folder of two images with an object of each of two classes in each."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for stem in ("a", "b"):
        cv2.imwrite(str(tmp_path / "JPEGImages" / f"{stem}.jpg"), np.zeros((100, 100, 3), np.uint8))
        objects = "".join(
            f"<object><name>{cls}</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
            f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for cls, (x0, y0, x1, y1) in (("cat", BOX), ("dog", OTHER))
        )
        size = "<size><width>100</width><height>100</height><depth>3</depth></size>"
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("a\nb\n")
    register_pascal_voc(name, str(tmp_path), "test", 2012, ["cat", "dog"])
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    return build_evaluator(make_cfg(), name, str(tmp_path / "out"))


def test_voc_is_the_devkits_ap(voc, tmp_path):
    assert isinstance(voc, RecordedEvaluator) and isinstance(voc._evaluator, PascalVOCDetectionEvaluator)
    both = [(0, 0.9, BOX), (1, 0.8, OTHER)]
    assert run(voc, {"a": both, "b": both})["bbox"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    # Of the dogs one is found, after a wrong one: area under precision made monotone is 1/2 * 1/2.
    result = run(voc, {"a": both, "b": [(0, 0.9, BOX), (1, 0.95, AWAY)]})["bbox"]
    assert result == pytest.approx({key: (100 + 25) / 2 for key in ("AP", "AP50", "AP75")})
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result


# --- all ---


@pytest.mark.parametrize("kind", [*REFUSED, "my_own"])
def test_what_has_no_evaluator_is_refused_by_name_before_training(kind, name, tmp_path):
    MetadataCatalog.get(name).evaluator_type = kind
    cfg = make_cfg("DATASETS.TEST", f"('{name}',)", "OUTPUT_DIR", str(tmp_path))
    for refuse in (lambda: Trainer.build_evaluator(cfg, name), lambda: Trainer(cfg)):
        with pytest.raises(ValueError) as error:
            refuse()
        message = str(error.value)
        assert (
            message.startswith(f"DATASETS.TEST '{name}' has evaluator_type '{kind}'")
            and ", ".join(SUPPORTED) in message
        )


def test_masks_of_a_detector_of_boxes(name):
    MetadataCatalog.get(name).evaluator_type = "cityscapes_instance"
    for cfg in (make_cfg(*QUANT), make_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "False")):
        with pytest.raises(ValueError, match="which is for masks, and MODEL.META_ARCHITECTURE '.*' finds none"):
            check_evaluator(cfg, name)


@pytest.mark.parametrize("kind", ["coco", "coco_panoptic_seg", None])
def test_coco_and_what_is_like_it(kind, name, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    if kind is None:
        box = {"bbox": [10, 10, 50, 50], "bbox_mode": 1, "category_id": 0}
        record = {"image_id": 1, "file_name": "a.png", "height": 100, "width": 100, "annotations": [box]}
        DatasetCatalog.register(name, lambda: [record])
        MetadataCatalog.get(name).thing_classes = ["a"]
    else:
        register_coco_instances(name, {}, str(tmp_path / "a.json"), str(tmp_path))
        DatasetCatalog.get(name)
        vars(MetadataCatalog.get(name))["evaluator_type"] = kind
    evaluator = build_evaluator(make_cfg("TEST.DETECTIONS_PER_IMAGE", "7"), name, str(tmp_path / "out"))
    assert type(evaluator) is COCOEvaluator and evaluator.limit == 7
    assert run(evaluator, {1: [(0, 0.9, BOX)]})["bbox"]["AP"] == pytest.approx(100)


def test_image_folders(name):
    MetadataCatalog.get(name).evaluator_type = "image_classification"
    assert type(build_evaluator(make_cfg(*CLASSIFIER), name, "out")) is TopKEvaluator
