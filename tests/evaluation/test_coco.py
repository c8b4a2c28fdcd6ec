import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from aqdet.evaluation import COCOEvaluator


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
