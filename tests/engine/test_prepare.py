"""Loops and trainers that are not ours: what aqdet.prepare gives them, and what a model says without it."""

import re

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as detectron2s_optimizer
from helpers import AUX, FCOS, QUANT, losses_of, make_batch, make_cfg, make_model, warnings_in
from tiny_data import train_cfg, write_dataset

import aqdet
from aqdet.engine import Trainer, build_checkpointer, build_optimizer
from aqdet.engine.hooks.precise_bn import PreciseBNHook
from aqdet.engine.solver import RelativeStep
from aqdet.modeling.config_requests import Requests
from aqdet.modeling.scaffold import strip
from aqdet.quantization import calibrate, quantizers

RELU = ("MODEL.FPN.RELU", "True")
EMA = ("SOLVER.EMA_DECAY", "0.5")
TRACK = ("MODEL.QUANT.OSCILLATION.TRACK", "True")
FAST = ("MODEL.QUANT.CALIBRATION.METHOD", "minmax", "MODEL.QUANT.CALIBRATION.NUM_BATCHES", "1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "float.pth"
    torch.save({"model": make_model(*RELU).state_dict()}, path)
    return str(path)


@pytest.fixture
def entry(tmp_path):
    return write_dataset(tmp_path / "data", "tiny_prepare")


def loop(cfg, prepared, batches, stop=None):
    for iteration in range(prepared.start_iter, stop or prepared.max_iter):
        with prepared.step(iteration):
            losses = sum(prepared.model(batches[iteration % len(batches)]).values())
            prepared.optimizer.zero_grad()
            losses.backward()
            prepared.optimizer.step()


def test_a_plain_loop(tmp_path, weights, caplog):
    distill = ("MODEL.DISTILL.ENABLED", "True", "MODEL.DISTILL.WEIGHTS", weights)
    cfg = make_cfg(*QUANT, *AUX, *RELU, *EMA, *TRACK, *FAST, *distill, "OUTPUT_DIR", str(tmp_path))
    cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = weights, 4, 0.001
    batches = [make_batch()]
    torch.manual_seed(0)
    model = build_model(cfg)
    prepared = aqdet.prepare(cfg, model, batches)
    assert all(quantizer.is_calibrated for _, quantizer in quantizers(model))
    assert torch.equal(model.auxiliary.head.cls_score.weight, model.head.cls_score.weight)
    assert not any(adaptor.needs_alignment for adaptor in model.auxiliary.adaptors)
    assert model.distillation is not None and isinstance(prepared.optimizer, RelativeStep)
    held = {id(p) for group in prepared.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loop(cfg, prepared, batches, 2)
    assert "does not do what its config asks for" not in caplog.text
    assert not torch.equal(model.head.cls_score.weight, before["head.cls_score.weight"])

    trained = model.head.cls_score.weight.clone()
    with prepared.evaluating() as detector, torch.no_grad():
        assert detector.auxiliary is None and not detector.training and len(detector(batches[0])) == 2
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.equal(detector.head.cls_score.weight, trained)  # the moving average
    assert model.auxiliary is not None and model.training and torch.equal(model.head.cls_score.weight, trained)

    prepared.save("model_0000001")
    loop_state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    again = aqdet.prepare(cfg, build_model(cfg), batches, resume=True)
    assert again.start_iter == 2
    assert all(torch.equal(value, loop_state[key]) for key, value in again.model.state_dict().items())
    for run in (prepared, again):
        run.start_iter, run.model.loss_normalizer = 2, 100.0
        loop(cfg, run, batches)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.model.state_dict().items())

    prepared.save_stripped()
    stripped = torch.load(tmp_path / "model_final_stripped.pth", weights_only=True)["model"]
    assert set(stripped) == {key for key in model.state_dict() if not key.startswith("auxiliary.")}


def test_a_plain_loop_of_a_compiled_model(tmp_path, weights):
    cfg = make_cfg(*QUANT, *AUX, *RELU, *FAST, "OUTPUT_DIR", str(tmp_path))
    cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_ITER = weights, 1
    batches = [make_batch()]
    model = build_model(cfg)
    with torch.compiler.set_stance("force_eager"):  # compiling it takes a minute
        prepared = aqdet.prepare(cfg, torch.compile(model), batches)
        loop(cfg, prepared, batches)
        with prepared.evaluating() as detector, torch.no_grad():
            assert model.auxiliary is None and len(detector(batches[0])) == 2
    assert model.auxiliary is not None
    prepared.save_stripped()
    saved = torch.load(tmp_path / "model_final_stripped.pth", weights_only=True)["model"]
    assert saved.keys() == strip(model.state_dict()).keys()


def test_a_plain_loop_from_the_model_as_it_is(weights):
    cfg = make_cfg(*QUANT, *FAST, seed_weights="nowhere.pth")
    model = build_model(cfg)
    start = model.head.cls_score.weight.clone()
    assert aqdet.prepare(cfg, model, [make_batch()], weights="").start_iter == 0
    assert torch.equal(model.head.cls_score.weight, start)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        aqdet.prepare(cfg, model, [make_batch()])


@pytest.mark.parametrize("arch", [(), FCOS])
def test_what_nobody_acts_on_is_said_once(arch, weights, caplog):
    asked = (*QUANT, *AUX, *RELU, *EMA, *TRACK, *arch, "SOLVER.FREEZE_BN_ITER", "3", "SOLVER.OPTIMIZER", "AdamW")
    asked = (*asked, "MODEL.DISTILL.ENABLED", "True", "TEST.COCO_EVAL", "faster-coco-eval")
    asked = (*asked, "CHECKPOINT.ALLOW_KEYS", "['a']", "SOLVER.DETERMINISTIC", "True")
    model = make_model(*asked)
    batch = make_batch()

    def run():
        with torch.no_grad():
            losses_of(model, batch)

    calibrate(model, run, method="minmax")
    assert not warnings_in(caplog), "calibration is no training step"
    losses_of(model, batch)
    losses_of(model, batch)
    (said,) = [record.getMessage() for record in caplog.records if "asks for" in record.getMessage()]
    keys = set(re.findall(r"((?:MODEL|SOLVER|TEST|CHECKPOINT)\.[A-Z_.]+) \(", said))
    assert keys == {
        *("MODEL.QUANT.SCALE_LR", "SOLVER.OPTIMIZER", "SOLVER.EMA_DECAY", "SOLVER.FREEZE_BN_ITER", "MODEL.DISTILL"),
        *("MODEL.QUANT.OSCILLATION", "MODEL.AUX.INIT", "CHECKPOINT.ALLOW_KEYS", "TEST.COCO_EVAL"),
        "SOLVER.DETERMINISTIC",
    }
    assert "aqdet.prepare(cfg, model, batches)" in said and "\n" not in said


def test_what_is_acted_on_is_not_said(caplog):
    cfg = make_cfg(*QUANT, *AUX, "SOLVER.OPTIMIZER", "AdamW")
    model = build_model(cfg)
    assert set(model.requests.open) == {"MODEL.QUANT.SCALE_LR", "SOLVER.OPTIMIZER", "MODEL.AUX.INIT"}
    build_optimizer(cfg, model)
    assert set(model.requests.open) == {"MODEL.AUX.INIT"}
    build_checkpointer(cfg, model)
    assert not model.requests.open
    model.requests.remind()
    assert not warnings_in(caplog)


def test_a_plain_config_asks_for_nothing():
    assert not Requests.from_config(make_cfg()).open


class Theirs(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return Trainer.build_evaluator(cfg, dataset_name)


def test_detectron2s_default_trainer(tmp_path, entry, weights, caplog):
    overrides = (*QUANT, *AUX, *RELU, *EMA, "MODEL.WEIGHTS", weights, "SOLVER.BASE_LR", "0.001")
    cfg = train_cfg(entry, tmp_path / "out", *overrides, max_iter=2)
    trainer = Theirs(cfg)
    aqdet.prepare_trainer(trainer)
    assert isinstance(trainer.optimizer, RelativeStep) and trainer.scheduler.optimizer is trainer.optimizer
    trainer.resume_or_load(resume=False)
    assert trainer.model.auxiliary.needs_alignment
    trainer.train()
    assert "asks for" not in caplog.text
    assert all(quantizer.is_calibrated for _, quantizer in quantizers(trainer.model))
    stripped = torch.load(tmp_path / "out" / "model_final_stripped.pth", weights_only=True)["model"]
    final = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert set(stripped) == {key for key in final["model"] if not key.startswith("auxiliary.")}
    assert "WeightAverageHook" in final["trainer"]["hooks"] and "bbox" in trainer._last_eval_results


def test_detectron2s_default_trainer_estimates_bn_as_ours_does(tmp_path, entry, weights):
    """Without the auxiliary path, which Detectron2's hook would run."""
    overrides = (*QUANT, *AUX, *RELU, "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2")
    cfg = train_cfg(entry, tmp_path / "out", *overrides, "MODEL.WEIGHTS", weights, max_iter=1)
    trainer = Theirs(cfg)
    aqdet.prepare_trainer(trainer)
    (hook,) = (hook for hook in trainer._hooks if "PreciseBN" in type(hook).__name__)
    assert isinstance(hook, PreciseBNHook)
    trainer.resume_or_load(resume=False)
    runs = []

    class Recorder(HookBase):
        def before_step(self):  # after calibration, in which adaptors are aligned
            trainer.model.auxiliary.register_forward_pre_hook(lambda *_: runs.append(trainer.iter))

    trainer.register_hooks([Recorder()])
    trainer.train()
    assert runs == [0], "the step's alone"


def test_a_resume_is_of_the_same_model_in_any_loop(tmp_path, entry, weights):
    overrides = (*QUANT, *RELU, "MODEL.WEIGHTS", weights, "CHECKPOINT.ALLOW_KEYS", "['head.cls_score']")
    cfg = train_cfg(entry, tmp_path / "out", *overrides, max_iter=1)
    trainer = Theirs(cfg)
    aqdet.prepare_trainer(trainer)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg = train_cfg(entry, tmp_path / "out", *overrides, "MODEL.RETINANET.NUM_CLASSES", "2", max_iter=2)
    with pytest.raises(ValueError, match="head.cls_score"):
        aqdet.prepare(cfg, build_model(cfg), build_detection_train_loader(cfg), resume=True)
    other = Theirs(cfg)
    aqdet.prepare_trainer(other)
    with pytest.raises(ValueError, match="head.cls_score"):
        other.resume_or_load(resume=True)


def test_a_trainer_with_an_optimizer_of_its_own_keeps_it_and_is_told(tmp_path, entry, weights, caplog):
    class Own(Theirs):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return detectron2s_optimizer(cfg, model)

    cfg = train_cfg(entry, tmp_path / "out", *QUANT, *RELU, "MODEL.WEIGHTS", weights, max_iter=1)
    trainer = Own(cfg)
    aqdet.prepare_trainer(trainer)
    assert not isinstance(trainer.optimizer, RelativeStep)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "asks for: MODEL.QUANT.SCALE_LR (" in caplog.text


def test_a_subclass_of_ours_with_detectron2s_loader(tmp_path, entry, weights, caplog):
    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    cfg = train_cfg(entry, tmp_path / "out", *QUANT, *RELU, "MODEL.WEIGHTS", weights, max_iter=2)
    trainer = Own(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "build_train_loader gives a" in caplog.text and "asks for" not in caplog.text
    final = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert final["trainer"]["seed"] == 1 and final["trainer"]["iteration"] == 1


@pytest.mark.parametrize("grouped", [True, False])
def test_detectron2s_loader_goes_on_after_the_calibration(tmp_path, entry, weights, grouped):
    fast = (*FAST, "DATALOADER.ASPECT_RATIO_GROUPING", str(grouped))
    cfg = train_cfg(entry, tmp_path / "out", *QUANT, *RELU, *fast, "MODEL.WEIGHTS", weights, max_iter=3)
    loader = build_detection_train_loader(cfg)
    handed_out = []

    def counted():
        for image in grouped_from:
            handed_out.append(image)
            assert len(handed_out) < 20, "the loop waits for a batch that never comes"
            yield image

    if grouped:
        grouped_from, loader.dataset = loader.dataset, Counted(counted)
    prepared = aqdet.prepare(cfg, build_model(cfg), loader)
    sizes = [len(batch) for _, batch in zip(range(prepared.start_iter, prepared.max_iter), loader, strict=False)]
    assert sizes == [cfg.SOLVER.IMS_PER_BATCH] * 3


class Counted(torch.utils.data.IterableDataset):
    """Images from the iterators that a function makes."""

    def __init__(self, make):
        self._make = make

    def __iter__(self):
        return self._make()


@pytest.mark.parametrize("enabled", [QUANT, AUX])
def test_detectron2s_architecture_over_our_backbone_is_refused_everywhere(enabled):
    cfg = make_cfg(*enabled, "MODEL.META_ARCHITECTURE", "RetinaNet")
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE 'RetinaNet' is Detectron2's .*QuantRetinaNet") as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="META_ARCHITECTURE 'RetinaNet'"):
        aqdet.prepare(cfg, torch.nn.Linear(1, 1), [])


def test_detectron2s_backbone_under_our_architecture_names_ours():
    cfg = make_cfg(*QUANT, "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone")
    with pytest.raises(ValueError, match="use build_quant_retinanet_resnet_fpn_backbone"):
        aqdet.prepare(cfg, torch.nn.Linear(1, 1), [])


def test_what_cannot_be_exported_is_said_before_training(caplog):
    norm = ("MODEL.FCOS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32")
    cfg = make_cfg(*QUANT, *FCOS, *FAST, *norm, "MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]")
    aqdet.prepare(cfg, build_model(cfg), [make_batch()])
    assert "cannot be exported: MODEL.PIXEL_STD [57.375, 57.12, 58.395] differs by channel" in caplog.text
    assert "cannot be exported: MODEL.FCOS.NORM GN does not fold into integers" in caplog.text
