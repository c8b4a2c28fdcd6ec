"""A real, tiny training on drawn scenes: calibration, evaluation in between, two checkpoints, resume."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import CycleBatchNormList
from helpers import AUX, QUANT, losses_of, make_batch, make_cfg, make_model

from aqdet.data import SHAPE_CLASSES, make_shapes
from aqdet.engine import Trainer, build_checkpointer, fit_to_machine
from aqdet.engine.hooks import leaving_no_trace
from aqdet.engine.solver import optimizer_groups
from aqdet.modeling import strip
from aqdet.quantization import quantizers

DATA = "test_training_shapes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    json_file = make_shapes(root / "shapes", num_images=6, seed=5, size=96)
    if DATA not in DatasetCatalog:
        register_coco_instances(
            DATA, {"thing_classes": list(SHAPE_CLASSES)}, str(json_file), str(root / "shapes/images")
        )
    float_model = make_model("MODEL.RETINANET.NUM_CLASSES", "6")
    torch.save({"model": float_model.state_dict()}, root / "fp.pth")

    def cfg_for(name, *overrides):
        values = (
            "MODEL.RETINANET.NUM_CLASSES 6 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 DATALOADER.NUM_WORKERS 0 "
            "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 INPUT.MAX_SIZE_TEST 96 "
            f"DATASETS.TRAIN ('{DATA}',) DATASETS.TEST ('{DATA}',) TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 2 "
            "MODEL.QUANT.CALIBRATION.NUM_BATCHES 2 MODEL.QUANT.CALIBRATION.METHOD minmax "
            f"OUTPUT_DIR {root / name}"
        )
        (root / name).mkdir(exist_ok=True)
        return make_cfg(*QUANT, *AUX, *values.split(), *overrides, seed_weights=str(root / "fp.pth"))

    cfg = cfg_for("whole")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    path = trainer.model.auxiliary
    seen = []
    real = Trainer.test.__func__

    def spy(cls, cfg, model, evaluators=None):
        result = real(cls, cfg, model, evaluators)
        seen.append(model.auxiliary)
        return result

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "test", classmethod(spy))
    trainer.train()
    patch.undo()
    return root, cfg_for, cfg, trainer, path, seen


def test_auxiliary_path_is_gone_in_evaluation_and_back_after(run):
    _, _, _, trainer, path, seen = run
    # Evaluated in between and at the end, without the path both times.
    assert seen == [None, None]
    assert trainer.model.auxiliary is path
    optimized = {id(p) for g in trainer._trainer.optimizer.param_groups for p in g["params"]}
    assert {id(p) for p in path.parameters()} <= optimized


def test_calibrated_once_and_everything_written(run):
    root, _, _, trainer, _, _ = run
    assert all(q.is_calibrated for _, q in quantizers(trainer.model))
    lines = [json.loads(x) for x in (root / "whole/metrics.json").read_text().splitlines()]
    logged = set().union(*lines)
    assert {"aux_loss_cls", "aux_loss_box_reg", "loss_cls", "loss_box_reg", "bbox/AP"} <= logged
    assert json.loads((root / "whole/inference/metrics.json").read_text())["AP"] >= 0
    assert list((root / "whole").glob("events.out.tfevents*"))


def test_whole_and_stripped_checkpoints_give_the_trained_outputs(run):
    root, cfg_for, cfg, trainer, _, _ = run
    whole = torch.load(root / "whole/model_final.pth", weights_only=True)
    stripped = torch.load(root / "whole/model_final_stripped.pth", weights_only=True)
    assert set(stripped) == {"model"} and set(stripped["model"]) == set(strip(whole["model"]))
    bare = Trainer.build_model(cfg_for("bare", "MODEL.AUX.ENABLED", "False"))
    build_checkpointer(cfg, bare).load(str(root / "whole/model_final_stripped.pth"))
    batch = make_batch(2, 96)
    trainer.model.eval(), bare.eval()
    for a, b in zip(trainer.model(batch), bare(batch), strict=True):
        assert torch.equal(a["instances"].scores, b["instances"].scores)
    trainer.model.train()


def test_resume_goes_on_with_optimizer_and_without_calibration(run, caplog):
    root, cfg_for, _, first, _, _ = run
    cfg = cfg_for("whole", "SOLVER.MAX_ITER", "5", "TEST.EVAL_PERIOD", "0")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    ours, theirs = (t._trainer.optimizer.state_dict()["state"] for t in (trainer, first))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(ours[k]["momentum_buffer"], theirs[k]["momentum_buffer"]) for k in theirs)
    scales = {n: q.state_dict() for n, q in quantizers(trainer.model)}
    trainer._hooks[0].before_train()
    assert all(torch.equal(v, scales[n][k]) for n, q in quantizers(trainer.model) for k, v in q.state_dict().items())


def test_random_start_of_quantized_training_is_loud(run, caplog):
    _, cfg_for, *_ = run
    Trainer(cfg_for("random", "MODEL.WEIGHTS", "")).resume_or_load(resume=False)
    assert "QUANTIZED TRAINING STARTS FROM RANDOM WEIGHTS" in caplog.text


def test_calibration_leaves_no_trace():
    model = make_model(*QUANT)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), leaving_no_trace(model):
        for _, quantizer in quantizers(model):
            quantizer.start_observing()
        losses_of(model, make_batch())
        next(m for m in model.modules() if isinstance(m, CycleBatchNormList))._pos = 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "loss_normalizer")
    assert all(m._pos == 0 for m in model.modules() if isinstance(m, CycleBatchNormList))


def test_every_parameter_is_in_one_group_with_its_own_rule():
    cfg = make_cfg(*QUANT, *AUX, "SOLVER.WEIGHT_DECAY_NORM", "0.0", "MODEL.QUANT.SCALE_LR_FACTOR", "0.5")
    model = make_model(*QUANT, *AUX)
    groups = optimizer_groups(cfg, model)
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    rule = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    lr = cfg.SOLVER.BASE_LR
    for name, expected in {
        "head.cls_score.weight": (lr, 1e-4),
        "head.cls_score.input_quantizer.scale": (lr / 2, 0.0),
        "backbone.p3_stream.quantizer.alpha": (lr / 2, 1e-4),
        "head.cls_subnet.1.weight": (lr, 0.0),
        "backbone.bottom_up.res2.0.conv1.norm.weight": (lr, 0.0),
        "auxiliary.head.cls_score.weight": (lr, 1e-4),
    }.items():
        assert rule[id(parameters[name])] == expected, name


def test_a_config_is_fitted_to_a_machine_without_cuda(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = make_cfg("MODEL.DEVICE", "cuda", "MODEL.RETINANET.NORM", "SyncBN")
    fit_to_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RETINANET.NORM) == ("cpu", "BN")
    assert "using cpu" in caplog.text and "MODEL.RETINANET.NORM: SyncBN" in caplog.text
