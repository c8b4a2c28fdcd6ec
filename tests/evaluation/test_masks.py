"""AP of masks."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from tiny_data import register_image
from two_stage import MASK, rcnn_cfg

from aqdet.evaluation import COCOEvaluator, build_evaluator

SQUARE = [10.0, 10, 50, 10, 50, 50, 10, 50]


@pytest.fixture
def dataset(tmp_path):
    """Registers one image of 100x100 with a square of 40x40 and, for ``without``, a second one without outline."""

    def register(without=False):
        annotation = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
        annotations = [{**annotation, "segmentation": [SQUARE]}]
        if without:
            annotations.append({**annotation, "id": 2, "bbox": [60, 60, 20, 20]})
        return register_image(
            tmp_path, f"masks_{tmp_path.name}", annotations, [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}]
        )

    return register


def evaluate(evaluator, columns):
    """Results of the true box with a mask that ends after ``columns`` of the square's 40."""
    evaluator.reset()
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 50, 50]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    mask = np.zeros((1, 100, 100), bool)
    mask[:, 10:50, 10 : 10 + columns] = True
    instances.pred_masks = torch.from_numpy(mask)
    evaluator.process([{"image_id": 5}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("coco_eval", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize(("columns", "ap"), [(40, 100), (31, 60), (10, 0)])
def test_masks_have_an_ap_of_their_own(dataset, tmp_path, columns, ap, coco_eval):
    if coco_eval == "faster-coco-eval" and importlib.util.find_spec("faster_coco_eval") is None:
        pytest.skip("faster-coco-eval is not installed")
    evaluator = COCOEvaluator(dataset(), output_dir=str(tmp_path / "out"), coco_eval=coco_eval, masks=True)
    results = evaluate(evaluator, columns)
    # An IoU of 31 / 40 is above 6 of the 10 thresholds.
    assert results["segm"]["AP"] == pytest.approx(ap) and results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-a"] == pytest.approx(ap) and results["segm"]["APm"] == pytest.approx(ap)
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["AP"] == pytest.approx(100) and written["segm"]["AP"] == pytest.approx(ap)
    assert written["segm"]["AP-b"] is None


def test_nothing_found_is_zero_for_masks_too(dataset, tmp_path):
    evaluator = COCOEvaluator(dataset(), output_dir=str(tmp_path / "out"), masks=True)
    evaluator.reset()
    empty = Instances((100, 100))
    empty.pred_boxes, empty.scores = Boxes(torch.zeros(0, 4)), torch.zeros(0)
    empty.pred_classes, empty.pred_masks = torch.zeros(0).long(), torch.zeros(0, 100, 100).bool()
    evaluator.process([{"image_id": 5}], [{"instances": empty}])
    results = evaluator.evaluate()
    assert set(results) == {"bbox", "segm"} and all(values["AP"] == values["APm"] == 0 for values in results.values())


def test_boxes_alone_are_evaluated_where_an_object_has_no_outline(dataset, tmp_path, caplog):
    evaluator = COCOEvaluator(dataset(without=True), output_dir=str(tmp_path / "out"), masks=True)
    assert "1 annotations of masks_" in caplog.text and "have no segmentation" in caplog.text
    assert set(evaluate(evaluator, 40)) == {"bbox"}


def test_the_config_decides(dataset, tmp_path):
    name = dataset()
    for overrides, tasks in ((MASK, {"bbox", "segm"}), ((), {"bbox"})):
        evaluator = build_evaluator(rcnn_cfg(*overrides), name, str(tmp_path / "out"))
        assert set(evaluate(evaluator, 40)) == tasks
