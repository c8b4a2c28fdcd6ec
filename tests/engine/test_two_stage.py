"""Mask and Keypoint R-CNN train, resume to the bit and are evaluated without their auxiliary path."""

import json
import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import QUANT
from tiny_data import train_overrides, write_dataset
from two_stage import KEYPOINTS, MASK, rcnn_cfg

from aqdet.data import register_declared
from aqdet.engine import Trainer
from aqdet.engine.no_detections import describe_nothing_found

SIGMAS = ("TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]")
AUX = ("MODEL.AUX.ENABLED", "True")
SOLVER = ("SOLVER.BASE_LR", "0.001", "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.05")


@pytest.fixture
def entry(tmp_path):
    entry = write_dataset(tmp_path / "data", f"two_stage_{tmp_path.name}", empty=(1,))
    with open(entry["json"]) as file:
        content = json.load(file)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x + w / 2, y + h]]
        annotation["keypoints"] = [x + w // 4, y + h // 2, 2, x + 3 * w // 4, y + h // 2, 1]
        annotation["num_keypoints"] = 2
    with open(entry["json"], "w") as file:
        json.dump(content, file)
    return entry


def trainer(entry, folder, *overrides, max_iter=4):
    cfg = rcnn_cfg(*QUANT, *AUX, *train_overrides(entry, folder, max_iter), *SOLVER, *overrides)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(entry["name"], None)
    register_declared(cfg)
    MetadataCatalog.get(entry["name"]).set(keypoint_names=["left", "right"], keypoint_flip_map=[("left", "right")])
    cfg.freeze()
    return Trainer(cfg)


@pytest.mark.parametrize("task, kind", [("segm", MASK), ("keypoints", (*KEYPOINTS, *SIGMAS))])
def test_a_training_evaluates_boxes_and_more_and_a_resumed_one_is_the_same(entry, tmp_path, task, kind):
    whole = trainer(entry, tmp_path / "whole", *kind)
    whole.resume_or_load(resume=False)
    whole.train()
    results = whole._last_eval_results
    assert set(results) == {"bbox", task} and "AP" in results[task]
    metrics = json.loads((tmp_path / "whole/inference/metrics.json").read_text())
    assert "AP" in metrics and "AP" in metrics[task]
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.json").read_text().splitlines()]
    loss = {"segm": "loss_mask", "keypoints": "loss_keypoint"}[task]
    assert {loss, f"aux_{loss}", "aux_loss_rpn_cls"} <= set(lines[0])

    os.makedirs(tmp_path / "again")
    for name in ("model_0000001.pth", "last_checkpoint"):
        content = (tmp_path / "whole" / name).read_bytes()
        (tmp_path / "again" / name).write_bytes(b"model_0000001.pth" if name == "last_checkpoint" else content)
    again = trainer(entry, tmp_path / "again", *kind)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    again.train()
    states = [torch.load(tmp_path / f / "model_final.pth", weights_only=True)["model"] for f in ("whole", "again")]
    assert states[0].keys() == states[1].keys() and any(key.startswith("auxiliary.") for key in states[0])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    stripped = torch.load(tmp_path / "whole/model_final_stripped.pth", weights_only=True)["model"]
    assert stripped.keys() == {key for key in states[0] if not key.startswith("auxiliary.")}


def test_a_detector_that_finds_nothing_gets_the_likely_causes(entry, tmp_path):
    cfg = rcnn_cfg(*MASK, *train_overrides(entry, tmp_path))
    line = describe_nothing_found(cfg, {"bbox": {"AP": 0.0}, "segm": {"AP": 0.0}})
    assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST" in line and "MODEL.ROI_HEADS.NUM_CLASSES" in line
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in line and "\n" not in line
    assert describe_nothing_found(cfg, {"bbox": {"AP": 3.0}}) == ""
