"""Averaging, oscillation, BN re-estimation and freezing in one training run, evaluated, saved and resumed."""

import json
from typing import ClassVar

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN
from detectron2.utils.events import EventStorage
from helpers import AUX, QUANT, write_weights
from tiny_data import train_cfg, write_dataset

from aqdet.engine import Trainer
from aqdet.engine.hooks.freeze_bn import FreezeBNHook
from aqdet.engine.hooks.oscillation import OscillationHook
from aqdet.engine.hooks.precise_bn import PreciseBNHook
from aqdet.engine.hooks.weight_average import WeightAverageHook

OFF = (*QUANT, *AUX, "MODEL.FPN.RELU", "True", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2")
HELPERS = (
    *("SOLVER.EMA_DECAY", "0.5", "TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"),
    *("MODEL.QUANT.OSCILLATION.DAMPENING", "0.01", "MODEL.QUANT.OSCILLATION.FREEZE_THRESHOLD", "0.01"),
)
NEW = (WeightAverageHook, OscillationHook, PreciseBNHook, FreezeBNHook)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_helpers")


@pytest.fixture(scope="module")
def float_weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("float") / "model_final.pth")


class Watched(Trainer):
    """Notes what evaluation is given."""

    seen: ClassVar[list] = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return super().test(cfg, model, evaluators)


class Notes(HookBase):
    """Keeps the state after each step."""

    def __init__(self):
        self.states = []

    def after_step(self):
        self.states.append({key: value.clone() for key, value in self.trainer.model.state_dict().items()})


@pytest.fixture(scope="module")
def trained(entry, float_weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    trainer = Watched(train_cfg(entry, output, *OFF, *HELPERS, "MODEL.WEIGHTS", float_weights))
    notes = Notes()
    notes.trainer = trainer
    trainer._hooks.insert(trainer._hooks.index(trainer._average), notes)
    trainer.resume_or_load(resume=False)
    Watched.seen.clear()
    trainer.train()
    return trainer, notes, output, list(Watched.seen)


def average_of(states, key, start):
    """By the formula, from the state after calibration on."""
    value = start
    for number, state in enumerate(states, 1):
        decay = min(0.5, (1 + number) / (10 + number))
        value = decay * value + (1 - decay) * state[key]
    return value


def test_evaluation_and_the_final_files_have_the_average(trained, float_weights):
    _, notes, output, seen = trained
    key = "backbone.bottom_up.res3.0.conv1.weight"
    start = torch.load(float_weights)["model"][key]
    states = notes.states
    assert len(states) == 4 and len(seen) == 2
    for number, state in ((2, seen[0]), (4, seen[1])):
        torch.testing.assert_close(state[key], average_of(states[:number], key, start), rtol=1e-4, atol=1e-6)
        assert not any(name.startswith("auxiliary.") for name in state)
    # In between, training went on from what was trained.
    in_between = torch.load(output / "model_0000001.pth", weights_only=True)
    assert torch.equal(in_between["model"][key], states[1][key])
    final = torch.load(output / "model_final.pth", weights_only=True)
    stripped = torch.load(output / "model_final_stripped.pth", weights_only=True)
    assert all(torch.equal(final["model"][name], value) for name, value in seen[1].items())
    assert all(torch.equal(stripped["model"][name], value) for name, value in seen[1].items())
    assert torch.equal(final["trainer"]["hooks"]["WeightAverageHook"]["other"][key], states[3][key])


def test_bn_statistics_are_the_average_s_own(trained):
    _, notes, output, seen = trained
    key = "backbone.bottom_up.res3.0.conv1.norm.running_mean"
    # Neither what training left, nor the average of that: estimated again.
    for number, state in ((2, seen[0]), (4, seen[1])):
        assert not torch.equal(state[key], notes.states[number - 1][key])
        expected = average_of(notes.states[:number], key, torch.zeros_like(state[key]))
        assert not torch.allclose(state[key], expected, rtol=1e-3)
    in_between = torch.load(output / "model_0000001.pth", weights_only=True)
    assert torch.equal(in_between["model"][key], notes.states[1][key])


def test_losses_and_shares_are_in_the_metrics(trained):
    _, _, output, _ = trained
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    keys = set().union(*lines)
    layer = "backbone.bottom_up.res3.0.conv1"
    assert {"loss_dampening", f"flips/{layer}", f"oscillation/{layer}", f"frozen/{layer}", "flips/all"} <= keys
    # The boundary layers have eight bits.
    assert not any("stem" in key or "cls_score" in key for key in keys)
    assert 0 < max(line.get("flips/all", 0) for line in lines) < 1


class Killed(BaseException):
    """Ends training as a signal does."""


class Kill(HookBase):
    def before_step(self):
        if self.trainer.iter == 2:
            raise Killed


def test_a_resume_goes_on_with_average_and_history(entry, float_weights, tmp_path):
    cfg = train_cfg(entry, tmp_path, *OFF, *HELPERS, "MODEL.WEIGHTS", float_weights)
    first = Trainer(cfg)
    first.register_hooks([Kill()])
    first.resume_or_load(resume=False)
    with pytest.raises(Killed):
        first.train()
    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    states = [
        {type(hook).__name__: hook.state_dict() for hook in trainer._hooks if isinstance(hook, NEW)}
        for trainer in (first, second)
    ]

    def check(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                check(a[key], b[key])
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    assert states[0]["WeightAverageHook"]["num_steps"] == states[0]["OscillationHook"]["num_steps"] == 2
    check(*states)


def test_a_finished_run_that_goes_further_trains_what_was_trained(trained):
    trainer, notes, _, _ = trained
    longer = trainer.cfg.clone()
    longer.defrost()
    longer.SOLVER.MAX_ITER = 5
    again = Trainer(longer)
    again.resume_or_load(resume=True)
    key = "backbone.bottom_up.res3.0.conv1.weight"
    assert not torch.equal(again.model.state_dict()[key], notes.states[3][key])
    with EventStorage(again.start_iter) as again.storage:
        again.before_train()
    assert torch.equal(again.model.state_dict()[key], notes.states[3][key])


def test_all_of_it_is_off_by_default(entry, tmp_path):
    hooks = Trainer(train_cfg(entry, tmp_path, *OFF))._hooks
    assert not any(isinstance(hook, (*NEW, PreciseBN)) for hook in hooks)


def test_frozen_bn_in_a_run(entry, float_weights, tmp_path, caplog):
    Trainer(train_cfg(entry, tmp_path, *OFF, "SOLVER.FREEZE_BN_ITER", "3", max_iter=3))
    assert "SOLVER.FREEZE_BN_ITER 3 is not before SOLVER.MAX_ITER 3: BN never freezes" in caplog.text
    overrides = ("MODEL.WEIGHTS", float_weights, "SOLVER.FREEZE_BN_ITER", "1", "MODEL.AUX.ENABLED", "False")
    trainer = Trainer(train_cfg(entry, tmp_path, *OFF, *overrides, max_iter=3))
    notes = Notes()
    trainer.register_hooks([notes])
    trainer.resume_or_load(resume=False)
    trainer.train()
    key = "backbone.bottom_up.res3.0.conv1.norm.running_mean"
    first, second, third = (state[key] for state in notes.states)
    assert torch.equal(first, second) and torch.equal(first, third) and first.abs().sum() > 0
