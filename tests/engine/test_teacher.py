"""Distillation and the extra head in training runs: what is saved, what is resumed, wrong teachers."""

import pytest
import torch
from helpers import AUX, CLASSIFIER, QUANT, make_cfg, make_model, write_weights
from tiny_data import train_cfg, write_dataset

from aqdet.engine import Trainer, check_config
from aqdet.engine.hooks.oscillation import _layers
from aqdet.engine.teacher import build_distillation

RELU = ("MODEL.FPN.RELU", "True")
DISTILL = ("MODEL.DISTILL.ENABLED", "True")
EXTRA = ("MODEL.EXTRA_LOSS.ENABLED", "True")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("float") / "float.pth")


def test_a_run_keeps_the_teacher_out_of_every_file_and_resumes(tmp_path, weights):
    entry = write_dataset(tmp_path / "data", "tiny_teacher")
    overrides = (*QUANT, *RELU, *DISTILL, *EXTRA, "MODEL.WEIGHTS", weights, "MODEL.DISTILL.WEIGHTS", weights)
    overrides = (*overrides, "SOLVER.CHECKPOINT_PERIOD", "1")

    def run(output, max_iter, resume=False):
        trainer = Trainer(train_cfg(entry, tmp_path / output, *overrides, max_iter=max_iter))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    trainer = run("whole", 2)
    teacher = trainer.model.distillation.teacher
    start = torch.load(weights)["model"]
    assert all(torch.equal(start[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training and not torch.equal(start["head.cls_score.weight"], trainer.model.head.cls_score.weight)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    bare = set(make_model(*QUANT, *RELU).state_dict())
    whole = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    extra = {f"extra_head.{k.removeprefix('head.')}" for k in bare if k.startswith("head.")}
    assert set(whole["model"]) == bare | extra
    stripped = torch.load(tmp_path / "whole" / "model_final_stripped.pth", weights_only=True)
    assert set(stripped["model"]) == bare
    assert len(whole["trainer"]["_trainer"]["optimizer"]["state"]) == len(held)

    # Stopped after the first of two iterations and resumed, with the teacher from its file again.
    run("parts", 2)
    (tmp_path / "parts" / "model_final.pth").unlink()
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000000.pth")
    run("parts", 2, resume=True)
    again = torch.load(tmp_path / "parts" / "model_final.pth", weights_only=True)
    assert set(again["model"]) == set(whole["model"])
    assert all(torch.equal(whole["model"][k], v) for k, v in again["model"].items())

    # Evaluation needs neither the teacher's file nor a calibrated extra head.
    cfg = train_cfg(entry, tmp_path / "eval", *overrides, "MODEL.DISTILL.WEIGHTS", "nowhere.pth")
    model = Trainer.build_model(cfg)
    model.load_state_dict(stripped["model"], strict=False)
    Trainer.test(cfg, model)


def test_wrong_teachers_are_one_line_that_names_the_key(tmp_path, weights):
    torch.save({"model": make_model(*RELU, *QUANT).state_dict()}, tmp_path / "quantized.pth")
    part = {k: v for k, v in torch.load(weights)["model"].items() if k.startswith("backbone.")}
    torch.save({"model": part, "aqdet": {"scope": ["backbone."]}}, tmp_path / "backbone.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no")
    cases = {
        "": "MODEL.DISTILL.WEIGHTS is empty",
        str(tmp_path / "none.pth"): "MODEL.DISTILL.WEIGHTS must be .*none.pth' does not exist",
        str(tmp_path / "damaged.pth"): "MODEL.DISTILL.WEIGHTS must be .*damaged",
        str(tmp_path / "quantized.pth"): "MODEL.DISTILL.WEIGHTS must be .*full precision: .*unexpected.*quantizer",
        str(tmp_path / "backbone.pth"): r"MODEL.DISTILL.WEIGHTS must be .*lacks \d+ of its keys, head",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            build_distillation(make_cfg(*RELU, *QUANT, *DISTILL, "MODEL.DISTILL.WEIGHTS", path))
        assert "\n" not in str(error.value)
    other = make_cfg(*RELU, *DISTILL, "MODEL.DISTILL.WEIGHTS", weights, "MODEL.RETINANET.NUM_CLASSES", "5")
    with pytest.raises(ValueError, match="MODEL.DISTILL.WEIGHTS must be .*head.cls_score.weight"):
        build_distillation(other)


def test_the_teacher_is_the_detector_in_float_with_nothing_beside_it(weights):
    cfg = make_cfg(*RELU, *QUANT, *AUX, *EXTRA, *DISTILL, "MODEL.DISTILL.WEIGHTS", weights)
    teacher = build_distillation(cfg).teacher
    assert set(teacher.state_dict()) == set(torch.load(weights)["model"])
    assert cfg.MODEL.QUANT.ENABLED and cfg.MODEL.AUX.ENABLED


@pytest.mark.parametrize("key", ["EXTRA_LOSS", "DISTILL"])
def test_a_classifier_has_neither(key):
    with pytest.raises(ValueError, match=f"MODEL.{key}.ENABLED is True, which .*'QuantClassifier'.*QuantRetinaNet"):
        check_config(make_cfg(*CLASSIFIER, f"MODEL.{key}.ENABLED", "True"))


def test_oscillations_of_the_extra_head_are_not_the_detectors():
    layers = _layers(make_model(*QUANT, *EXTRA))
    assert layers and not any(path.startswith("extra_head.") for path in layers)
