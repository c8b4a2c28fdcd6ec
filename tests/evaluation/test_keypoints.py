"""AP of keypoints."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator as Theirs
from detectron2.structures import Boxes, Instances
from tiny_data import register_image
from two_stage import KEYPOINTS, rcnn_cfg

from aqdet.evaluation import COCOEvaluator, build_evaluator

SIGMAS = [0.05, 0.1]
SIGMA_PAIRS = ("TEST.KEYPOINT_OKS_SIGMAS", str(SIGMAS))
POINTS = [[20.0, 20, 2], [40.0, 30, 2]]


@pytest.fixture
def dataset(tmp_path):
    """Registers one image of 100x100 with an object of 40x40 and two keypoints; ``points`` are a second object's."""

    def register(points=None):
        annotation = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
        annotations = [{**annotation, "keypoints": [v for point in POINTS for v in point], "num_keypoints": 2}]
        if points is not None:
            annotations.append({**annotation, "id": 2, "bbox": [60, 60, 20, 20], "keypoints": points})
        return register_image(tmp_path, f"keypoints_{tmp_path.name}", annotations, [{"id": 3, "name": "a"}])

    return register


def evaluate(evaluator, distance):
    """Results of the true box with keypoints so many pixels to the right of the true ones."""
    evaluator.reset()
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 50, 50]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    # Detectron2's coordinates are continuous, COCO's are indices of pixels.
    points = torch.tensor([POINTS]) + torch.tensor([distance + 0.5, 0.5, 0.0])
    instances.pred_keypoints = points
    evaluator.process([{"image_id": 5}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("distance", [0.0, 3.0, 6.0, 60.0])
def test_keypoints_have_detectron2s_ap_and_the_formulas(dataset, tmp_path, distance):
    name = dataset()
    results = evaluate(COCOEvaluator(name, output_dir=str(tmp_path / "out"), keypoint_sigmas=SIGMAS), distance)
    theirs = Theirs(name, ("bbox", "keypoints"), use_fast_impl=False, kpt_oks_sigmas=SIGMAS)
    for key, value in evaluate(theirs, distance)["keypoints"].items():
        assert results["keypoints"][key] == pytest.approx(value, nan_ok=True), key
    # The mean over keypoints of exp(-d^2 / (2 area (2 sigma)^2)).
    similarity = np.mean([math.exp(-(distance**2) / (2 * 1600 * (2 * sigma) ** 2)) for sigma in SIGMAS])
    passed = sum(similarity >= threshold - 1e-9 for threshold in np.arange(0.5, 1.0, 0.05))
    assert results["keypoints"]["AP"] == results["keypoints"]["AP-a"] == pytest.approx(10 * passed)
    assert results["bbox"]["AP"] == pytest.approx(100) and "APs" not in results["keypoints"]
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert written["keypoints"]["AP"] == pytest.approx(10 * passed)


def test_nothing_found_is_zero_for_keypoints_too(dataset, tmp_path):
    evaluator = COCOEvaluator(dataset(), output_dir=str(tmp_path / "out"), keypoint_sigmas=SIGMAS)
    evaluator.reset()
    empty = Instances((100, 100))
    empty.pred_boxes, empty.scores, empty.pred_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0), torch.zeros(0).long()
    empty.pred_keypoints = torch.zeros(0, 2, 3)
    evaluator.process([{"image_id": 5}], [{"instances": empty}])
    results = evaluator.evaluate()
    assert set(results) == {"bbox", "keypoints"} and all(values["AP"] == 0 for values in results.values())


@pytest.mark.parametrize("points", [[], [60.0, 60, 2]])
def test_boxes_alone_are_evaluated_where_an_object_has_other_keypoints(dataset, tmp_path, caplog, points):
    name = dataset(points)
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path / "out"), keypoint_sigmas=SIGMAS)
    assert f"1 annotations of {name} have not 2 keypoints: keypoints are not evaluated" in caplog.text
    assert set(evaluate(evaluator, 0.0)) == {"bbox"}


def test_the_config_decides(dataset, tmp_path):
    name = dataset()
    for overrides, tasks in (((*KEYPOINTS, *SIGMA_PAIRS), {"bbox", "keypoints"}), ((), {"bbox"})):
        evaluator = build_evaluator(rcnn_cfg(*overrides), name, str(tmp_path / "out"))
        assert set(evaluate(evaluator, 0.0)) == tasks
    many = ("MODEL.KEYPOINT_ON", "True")  # Detectron2's 17, COCO's
    assert len(build_evaluator(rcnn_cfg(*many), name, str(tmp_path / "out"))._kpt_oks_sigmas) == 17
    for overrides in (KEYPOINTS, (*KEYPOINTS, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"), (*many, *SIGMA_PAIRS)):
        with pytest.raises(
            ValueError, match="TEST.KEYPOINT_OKS_SIGMAS must have a positive value for each of"
        ) as error:
            build_evaluator(rcnn_cfg(*overrides), name, str(tmp_path / "out"))
        assert "\n" not in str(error.value)
