"""Training runs of a few iterations on a few small images, on the CPU."""

import itertools
import json
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_model
from helpers import AUX, QUANT, make_batch, make_cfg, make_model, write_weights
from tiny_data import train_cfg, write_dataset

from aqdet.checkpoint import CLASSES_KEY
from aqdet.data import register_declared
from aqdet.engine import Trainer, build_checkpointer
from aqdet.engine.forward_state import leaving_no_trace
from aqdet.engine.hooks import calibration as hooks
from aqdet.engine.hooks.precise_bn import PreciseBNHook
from aqdet.engine.launch import make_deterministic
from aqdet.modeling import without_scaffold
from aqdet.quantization import quantizers

BOTH = (*QUANT, *AUX, "MODEL.FPN.RELU", "True")
PERIODS = ("TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2")


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_trainer")


@pytest.fixture(scope="module")
def float_weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("float") / "model_final.pth")


class Watched(Trainer):
    """Notes what evaluation is given."""

    seen: ClassVar[list] = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        parameters = {name for name, _ in model.named_parameters()}
        cls.seen.append((model.auxiliary, parameters, model.training))
        return super().test(cfg, model, evaluators)


class Notes(HookBase):
    """Keeps parameters, and the auxiliary path's values after each iteration."""

    def __init__(self):
        self.auxiliary_values = []

    def before_train(self):
        self.parameters = dict(self.trainer.model.named_parameters())
        self.modules = dict(self.trainer.model.named_modules())

    def after_step(self):
        self.auxiliary_values.append(self.trainer.model.auxiliary.adaptors[0].conv.weight.detach().clone())


@pytest.fixture(scope="module")
def trained(entry, float_weights, tmp_path_factory):
    """Four iterations of the 4-bit detector with its auxiliary path, evaluated after two and at the end."""
    output = tmp_path_factory.mktemp("run")
    cfg = train_cfg(entry, output, *BOTH, *PERIODS, "MODEL.WEIGHTS", float_weights)
    trainer = Watched(cfg)
    notes = Notes()
    trainer.register_hooks([notes])
    trainer.resume_or_load(resume=False)
    Watched.seen.clear()
    trainer.train()
    return trainer, notes, output


def test_evaluation_sees_the_detector_alone(trained):
    _, notes, _ = trained
    assert len(Watched.seen) == 2  # after two iterations, and at the end
    for auxiliary, parameters, _ in Watched.seen:
        assert auxiliary is None
        assert parameters == {name for name in notes.parameters if not name.startswith("auxiliary.")}


def test_evaluation_is_without_tf32(monkeypatch):
    monkeypatch.setattr(DefaultTrainer, "test", lambda *_: torch.backends.cudnn.allow_tf32)
    assert torch.backends.cudnn.allow_tf32 and Trainer.test(make_cfg(), make_model()) is False


def test_the_auxiliary_path_is_put_back_and_goes_on_training(trained):
    trainer, notes, _ = trained
    parameters = dict(trainer.model.named_parameters())
    assert list(parameters) == list(notes.parameters)
    assert all(parameters[name] is notes.parameters[name] for name in parameters)
    modules = dict(trainer.model.named_modules())
    assert modules.keys() == notes.modules.keys()
    assert all(modules[name] is notes.modules[name] for name in modules)
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in parameters.values()}
    # The evaluation came between the second and the third.
    values = notes.auxiliary_values
    assert len(values) == 4 and all(not torch.equal(a, b) for a, b in itertools.pairwise(values))


def test_both_final_checkpoints_and_the_metrics_are_written(trained):
    _, _, output = trained
    whole = torch.load(output / "model_final.pth", weights_only=True)
    stripped = torch.load(output / "model_final_stripped.pth", weights_only=True)
    dropped = set(whole["model"]) - set(stripped["model"])
    assert dropped and all(key.startswith("auxiliary.") for key in dropped)
    assert all(torch.equal(whole["model"][key], value) for key, value in stripped["model"].items())
    assert whole["iteration"] == 3 and "optimizer" in whole["trainer"]["_trainer"]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert set(stripped) == {"model", CLASSES_KEY}
    classes = MetadataCatalog.get(trained[0].cfg.DATASETS.TRAIN[0]).thing_classes
    assert whole[CLASSES_KEY] == stripped[CLASSES_KEY] == list(classes)
    assert json.loads((output / "inference" / "metrics.json").read_text())["AP"] >= 0
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {"aux_loss_cls", "aux_loss_box_reg", "bbox/AP50"} <= set().union(*lines)
    assert len(list(output.glob("events.out.tfevents.*"))) == 1


def test_the_stripped_detector_equals_the_trained_one_bit_for_bit(trained):
    trainer, _, output = trained
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.MODEL.AUX.ENABLED = False
    shipped = build_model(cfg)
    build_checkpointer(cfg, shipped).load(str(output / "model_final_stripped.pth"))
    assert [name for name, _ in shipped.named_modules()] == [
        name for name, _ in trainer.model.named_modules() if not name.startswith("auxiliary")
    ]
    batch = make_batch()
    outputs = []
    for model in (shipped, trainer.model):
        model.eval()
        model.test_score_thresh = 0.0
        with torch.no_grad(), without_scaffold(model):
            outputs.append([x["instances"] for x in model(batch)])
    trainer.model.train()
    for a, b in zip(*outputs, strict=True):
        assert len(a) > 0
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


class Killed(BaseException):
    """Ends training as a signal does."""


class Kill(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Killed


def test_resume_continues_with_optimizer_and_calibration(entry, float_weights, tmp_path, monkeypatch):
    cfg = train_cfg(entry, tmp_path, *BOTH, *PERIODS, "MODEL.WEIGHTS", float_weights)
    first = Trainer(cfg)
    first.register_hooks([Kill(2)])
    first.resume_or_load(resume=False)
    with pytest.raises(Killed):
        first.train()
    assert not (tmp_path / "model_final_stripped.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"

    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    states = [trainer.model.state_dict() for trainer in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    for a, b in zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        assert a["lr"] == b["lr"] and a["weight_decay"] == b["weight_decay"]
        for p, q in zip(a["params"], b["params"], strict=True):
            one, other = (t.optimizer.state[r] for t, r in ((first, p), (second, q)))
            keys = ("step", "exp_avg", "exp_avg_sq") if a["relative"] else ("momentum_buffer",)
            assert all(torch.equal(one[key], other[key]) for key in keys)

    def recalibrates(*args, **kwargs):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(hooks, "calibrate", recalibrates)
    second.train()
    assert second.iter == 4
    assert (tmp_path / "model_final_stripped.pth").exists()


def test_a_failure_in_the_last_iteration_is_no_final_checkpoint(entry, float_weights, tmp_path):
    weights = ("MODEL.WEIGHTS", float_weights)
    trainer = Trainer(train_cfg(entry, tmp_path, *BOTH, *weights, max_iter=1))
    trainer.register_hooks([Kill(0)])
    trainer.resume_or_load(resume=False)
    with pytest.raises(Killed):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


class StandIn:
    """What a hook needs of a trainer."""

    def __init__(self, model):
        self.model = model


def run_calibration(model, batches):
    hook = hooks.CalibrationHook(lambda: iter(batches), 2, "minmax")
    hook.trainer = StandIn(model)
    hook.before_train()


def state_of(model):
    """All that calibration must not change: tensors that are no quantizer's, and python state."""
    names = tuple(f"{name}." for name, _ in quantizers(model))
    tensors = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(names)}
    positions = [m._pos for m in model.modules() if isinstance(m, CycleBatchNormList)]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return tensors, (positions, vars(model).get("loss_normalizer"), model.training, states)


@pytest.mark.parametrize("normalizer", [None, 55.0])
def test_calibration_leaves_no_trace(normalizer):
    model = make_model(*BOTH)
    if normalizer is not None:
        model.loss_normalizer = normalizer
    tensors, others = state_of(model)

    def batches():
        for _ in range(3):
            random.random(), np.random.rand(), torch.rand(1)
            yield make_batch()

    run_calibration(model, batches())
    after, others_after = state_of(model)
    assert others_after == others
    assert all(torch.equal(after[key], value) for key, value in tensors.items())
    assert all(q.is_calibrated for _, q in quantizers(model))
    assert all(p.grad is None for p in model.parameters())


def test_an_interrupted_calibration_leaves_no_trace_either():
    # A whole pass ends at the first level again, an interrupted one anywhere.
    model = make_model(*BOTH)
    norms = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    with pytest.raises(Killed), leaving_no_trace(model):
        for norm in norms:
            norm(torch.rand(1, 16, 2, 2))
        assert all(norm._pos == 1 for norm in norms)
        raise Killed
    assert norms and all(norm._pos == 0 for norm in norms)


def test_calibration_takes_the_configured_number_of_batches():
    taken = []

    def batches():
        for index in range(5):
            taken.append(index)
            yield make_batch()

    run_calibration(make_model(*QUANT), batches())
    assert taken == [0, 1]


def test_calibrated_detectors_read_no_batch():
    def batches():
        raise AssertionError("read a batch")
        yield

    model = make_model(*QUANT)
    run_calibration(model, [make_batch()])
    for calibrated_model in (model, make_model()):
        run_calibration(calibrated_model, batches())


def test_adaptors_are_aligned_without_quantizers_too():
    model = make_model(*AUX)
    model.auxiliary.initialize_from(model)
    before = model.auxiliary.adaptors[0].conv.norm.weight.detach().clone()
    run_calibration(model, [make_batch()])
    assert not model.auxiliary.needs_alignment
    assert not torch.equal(model.auxiliary.adaptors[0].conv.norm.weight, before)


@pytest.mark.parametrize("weights", ["random", "float"])
def test_random_start_of_quantized_training_warns(entry, float_weights, tmp_path, caplog, weights):
    path = float_weights if weights == "float" else ""
    cfg = train_cfg(entry, tmp_path, *BOTH, "MODEL.WEIGHTS", path)
    Trainer(cfg).resume_or_load(resume=False)
    assert ("STARTS FROM RANDOM WEIGHTS" in caplog.text) == (weights == "random")


def test_evaluating_without_calibration_is_a_user_error(entry, tmp_path):
    cfg = train_cfg(entry, tmp_path, *QUANT)
    with pytest.raises(ValueError, match="not calibrated, backbone.*MODEL.QUANT.ENABLED False"):
        Trainer.test(cfg, build_model(cfg))


def test_evaluation_of_a_file_is_without_the_auxiliary_path_too(entry, tmp_path, monkeypatch):
    seen = []

    def note(cls, cfg, model, evaluators):
        seen.append(model.auxiliary)

    monkeypatch.setattr(DefaultTrainer, "test", classmethod(note))
    model = make_model(*AUX)
    path = model.auxiliary
    Trainer.test(train_cfg(entry, tmp_path, *AUX), model)
    assert seen == [None] and model.auxiliary is path


def test_several_test_sets_do_not_overwrite_each_other(entry, tmp_path):
    other = {**entry, "name": "tiny_trainer_2"}
    cfg = train_cfg(entry, tmp_path).clone()
    cfg.defrost()
    cfg.DATASETS.DECLARED = [entry, other]
    cfg.DATASETS.TEST = ("tiny_trainer", "tiny_trainer_2")
    register_declared(cfg)
    folders = {Trainer.build_evaluator(cfg, name)._output_dir for name in cfg.DATASETS.TEST}
    assert folders == {str(tmp_path / "inference" / name) for name in cfg.DATASETS.TEST}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty"),
        (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH must be a positive multiple"),
        (("MODEL.QUANT.CALIBRATION.METHOD", "best"), "METHOD must be one of mse, .*, got 'best'"),
        (("MODEL.QUANT.CALIBRATION.NUM_BATCHES", "0"), "CALIBRATION.NUM_BATCHES must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_trained_is_said_before_training(entry, tmp_path, overrides, words):
    with pytest.raises(ValueError, match=words):
        Trainer(train_cfg(entry, tmp_path, *QUANT, *overrides))


def test_data_without_boxes_or_images_is_a_user_error(tmp_path):
    cfg = train_cfg(write_dataset(tmp_path / "data", "tiny_no_boxes", num_images=2, empty=(0, 1)), tmp_path)
    with pytest.raises(ValueError, match="DATASETS.TRAIN .*'tiny_no_boxes'"):
        Trainer.build_train_loader(cfg)
    DatasetCatalog.register("tiny_no_images", list)
    try:
        with pytest.raises(ValueError, match="DATASETS.TEST .*'tiny_no_images'"):
            Trainer.build_test_loader(cfg, "tiny_no_images")
    finally:
        DatasetCatalog.remove("tiny_no_images")


@pytest.fixture
def torch_settings():
    """Puts torch's global settings back."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def losses_of_run(cfg):
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.train()
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def test_the_same_seed_gives_the_same_losses(entry, tmp_path, torch_settings):
    def run(name, *overrides):
        cfg = train_cfg(entry, tmp_path / name, *BOTH, *overrides, max_iter=2)
        make_deterministic(cfg)
        return losses_of_run(cfg)

    first = run("a")
    assert not torch.are_deterministic_algorithms_enabled()
    assert run("b", "DATALOADER.NUM_WORKERS", "1") == first
    assert run("c", "SOLVER.DETERMINISTIC", "True") == first  # on a CPU it is no other arithmetic
    assert torch.are_deterministic_algorithms_enabled()
    assert run("d", "SEED", "5") != first


def test_a_new_run_in_the_folder_of_an_earlier_one_keeps_its_metrics_apart(entry, tmp_path):
    cfg = train_cfg(entry, tmp_path, max_iter=2)
    (tmp_path / "metrics.json").write_text('{"iteration": 77}\n')
    losses_of_run(cfg)
    assert (tmp_path / "metrics.json.old").read_text() == '{"iteration": 77}\n'
    assert [json.loads(line)["iteration"] for line in (tmp_path / "metrics.json").read_text().splitlines()] == [1, 2]


def test_a_failing_evaluation_loses_nothing(entry, tmp_path):
    class Failing(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            raise OSError("no space left")

    trainer = Failing(train_cfg(entry, tmp_path, "TEST.EVAL_PERIOD", "2"))
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert trainer.model.training
    second = Trainer(trainer.cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2


def test_a_resume_says_what_it_does_not_follow(entry, tmp_path, caplog):
    first = Trainer(train_cfg(entry, tmp_path, max_iter=1))
    first.train()
    second = Trainer(train_cfg(entry, tmp_path, "SEED", "9", max_iter=1))
    second.resume_or_load(resume=True)
    assert "SEED 9 is not used: the run goes on with 1" in caplog.text and second.data_loader.seed == 1
    state = first.state_dict()
    del state["seed"]
    second.load_state_dict(state)
    assert "The checkpoint is of an older version" in caplog.text


def test_bn_is_estimated_from_the_same_images_each_time(entry, tmp_path):
    precise = ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2")
    trainer = Trainer(train_cfg(entry, tmp_path, *precise))
    hook = next(hook for hook in trainer._hooks if isinstance(hook, PreciseBNHook))
    trainer.iter = trainer.max_iter - 1
    start = trainer.model.backbone.bottom_up.stem.conv1.norm.running_mean.clone()
    hook.after_step()
    before = trainer.model.backbone.bottom_up.stem.conv1.norm.running_mean.clone()
    assert not torch.equal(start, before)
    hook.after_step()
    assert torch.equal(trainer.model.backbone.bottom_up.stem.conv1.norm.running_mean, before)
