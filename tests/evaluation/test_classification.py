import json

import torch

from aqdet.evaluation import TopKEvaluator


def test_top1_and_top5_by_hand(tmp_path):
    evaluator = TopKEvaluator(output_dir=str(tmp_path / "inference"))
    scores = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05])
    for label in (0, 1, 4, 5):
        evaluator.process([{"label": label}], [{"scores": scores}])
    assert evaluator.evaluate() == {"classification": {"top1": 25.0, "top5": 75.0}}
    assert json.loads((tmp_path / "inference" / "metrics.json").read_text()) == {"top1": 25.0, "top5": 75.0}
    evaluator.reset()
    evaluator.process([{"label": 1}, {"label": 0}], [{"scores": scores[:2]}] * 2)
    assert evaluator.evaluate()["classification"] == {"top1": 50.0, "top5": 100.0}
