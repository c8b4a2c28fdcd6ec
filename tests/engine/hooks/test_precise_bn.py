"""BN statistics estimated again, and frozen."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.layers import CycleBatchNormList
from detectron2.utils import comm
from helpers import AUX, QUANT, calibrated, losses_of, make_batch, make_model
from torch import nn

from aqdet.engine.hooks.freeze_bn import FreezeBNHook
from aqdet.engine.hooks.precise_bn import PreciseBNHook, _Moments, estimate_bn

ALL = (*QUANT, *AUX, "MODEL.FPN.RELU", "True")


def batches():
    return [make_batch(2, 64), make_batch(3, 128)]


def norms_of(model, auxiliary=False):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith("auxiliary.") == auxiliary
    }


class StandIn:
    """What a hook needs of a trainer."""

    def __init__(self, model, iteration=0, max_iter=10):
        self.model, self.iter, self.max_iter = model, iteration, max_iter


@pytest.fixture(scope="module")
def model():
    return calibrated(make_model(*ALL), make_batch())


def test_statistics_are_those_of_all_batches_and_nothing_else_changes(model):
    model.loss_normalizer = 55.0
    norms, inputs = norms_of(model), {}
    assert any(isinstance(m, CycleBatchNormList) for m in model.modules())
    handles = [
        norm.register_forward_pre_hook(lambda m, x, name=name: inputs.setdefault(name, []).append(x[0].detach()))
        for name, norm in norms.items()
    ]
    statistics = {f"{name}.{key}" for name in norms for key in ("running_mean", "running_var")}
    buffers = {name: id(norm.running_mean) for name, norm in norms.items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def build_loader():
        random.random(), np.random.rand(), torch.rand(1)
        return iter(batches())

    path = model.auxiliary
    estimate_bn(model, build_loader, 2)
    for handle in handles:
        handle.remove()
    for name, norm in norms.items():
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs[name]], dim=1).double()
        torch.testing.assert_close(norm.running_mean.double(), values.mean(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), values.var(dim=1, correction=0), rtol=1e-4, atol=1e-6)
        assert len(inputs[name]) == 2 and id(norm.running_mean) == buffers[name]
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == statistics
    assert model.auxiliary is path and model.training and model.loss_normalizer == 55.0
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_statistics_are_those_of_all_ranks(monkeypatch):
    x, theirs = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 7, 7) * 3 + 1
    norm = nn.BatchNorm2d(3)
    mine, other = _Moments(norm), _Moments(norm)
    mine(norm, (x,)), other(norm, (theirs,))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(other._sums))
    mean, var = mine.statistics()
    values = torch.cat([t.transpose(0, 1).flatten(1) for t in (x, theirs)], dim=1).double()
    torch.testing.assert_close(mean, values.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, values.var(dim=1, correction=0), rtol=1e-5, atol=1e-6)


def test_batches_without_regions_leave_no_trace_and_norms_without_any_stay(caplog):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm.eval()(x) if len(x) == 0 else self.norm.train()(x)

    head, regions = Head().train(), torch.randn(6, 3, 5, 5)
    before = head.unused.running_var.clone()
    estimate_bn(head, lambda: iter([regions[:4], regions[:0], regions[4:]]), 3)
    torch.testing.assert_close(head.norm.running_mean, regions.mean(dim=(0, 2, 3)))
    assert torch.equal(head.unused.running_var, before) and "No batch reached a batch norm" in caplog.text


def test_an_error_on_the_way_changes_nothing(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def build_loader():
        yield make_batch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        estimate_bn(model, build_loader, 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.auxiliary is not None and not any(norm._forward_pre_hooks for norm in norms_of(model).values())


@pytest.mark.parametrize(
    "period, iteration, due", [(3, 2, True), (3, 3, False), (0, 2, False), (0, 9, True), (3, 9, True)]
)
def test_it_runs_before_each_evaluation_and_at_the_end(monkeypatch, period, iteration, due):
    calls = []
    monkeypatch.setattr("aqdet.engine.hooks.precise_bn.estimate_bn", lambda *args: calls.append(args))
    hook = PreciseBNHook(period, list, 7)
    hook.trainer = StandIn(nn.BatchNorm2d(3), iteration)
    hook.after_step()
    assert [args[2] for args in calls] == [7] * due
    # Frozen statistics are what the weights were trained with.
    hook.trainer.model.eval()
    hook.after_step()
    assert len(calls) == due


def test_frozen_statistics_stay_and_the_rest_trains(model):
    hook = FreezeBNHook(5)
    hook.trainer = StandIn(model, 4)

    def step():
        before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
        model.zero_grad()
        sum(losses_of(model, make_batch(2, 64)).values()).backward()
        after = model.state_dict()
        return {key.startswith("auxiliary.") for key, value in before.items() if not torch.equal(value, after[key])}

    hook.before_step()
    assert step() == {True, False}
    hook.trainer.iter = 5
    for _ in range(2):
        hook.before_step()
        assert model.training and step() == {True}
        # As evaluation leaves it.
        model.train()
        hook.trainer.iter += 1
    assert all(m.weight.grad.abs().sum() > 0 for m in norms_of(model).values() if m.affine)
    assert step() == {True, False}


def test_all_processes_freeze_the_statistics_of_the_main_one(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hook = FreezeBNHook(5)
    hook.trainer = StandIn(model, 4)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7))
    hook.before_step()
    assert not model[0].running_mean.any()
    for hook.trainer.iter in (5, 6):
        hook.before_step()
    assert (model[0].running_mean == 7).all() and (model[0].running_var == 7).all() and (model[0].weight == 1).all()


def test_a_detector_without_bn_has_nothing_to_freeze(caplog):
    hook = FreezeBNHook(0)
    hook.trainer = StandIn(nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)), 0)
    hook.before_step()
    assert "SOLVER.FREEZE_BN_ITER: the detector has no BN to freeze" in caplog.text


def test_wrong_values_name_their_key():
    with pytest.raises(ValueError, match="SOLVER.FREEZE_BN_ITER must be -1 for never, .* got -2"):
        FreezeBNHook(-2)
    with pytest.raises(ValueError, match="TEST.PRECISE_BN.NUM_ITER must be at least 1, got 0"):
        PreciseBNHook(0, list, 0)
