"""The moving average of weights."""

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

from aqdet.engine.hooks.weight_average import WeightAverageHook
from aqdet.quantization import QuantSpec, build_quantizer


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(1)
        self.quantizer = build_quantizer(QuantSpec("lqnet", 2, "weight"))
        self.auxiliary = nn.Linear(1, 1)


class StandIn:
    def __init__(self, model, max_iter):
        self.model, self.max_iter, self.iter, self.start_iter = model, max_iter, 0, 0


def averaged(model, max_iter=100, decay=0.7):
    hook = WeightAverageHook(decay)
    hook.trainer = StandIn(model, max_iter)
    return hook


def disturb(model):
    """A training step on everything that is a float."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape))


def run(hook, first, last):
    """Iterations ``first`` to ``last - 1``; the values of a parameter after each step."""
    seen = []
    for hook.trainer.iter in range(first, last):
        disturb(hook.trainer.model)
        seen.append(snapshot(hook.trainer.model))
        hook.after_step()
    return seen


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_average_is_the_formula_s_and_leaves_the_auxiliary_path_out():
    torch.manual_seed(0)
    model = Detector()
    hook, start = averaged(model), snapshot(model)
    hook.before_train()
    expected = start
    for number, values in enumerate(run(hook, 0, 6), 1):
        decay = min(0.7, (1 + number) / (10 + number))
        expected = {k: decay * v + (1 - decay) * values[k] for k, v in expected.items() if v.is_floating_point()}
    trained = snapshot(model)
    with hook.applied():
        inside = snapshot(model)
    for key, value in inside.items():
        if key.startswith("auxiliary.") or not value.is_floating_point():
            assert torch.equal(value, trained[key])
        else:
            torch.testing.assert_close(value, expected[key])
    assert {"conv.weight", "norm.running_mean", "quantizer.basis"} <= set(expected)
    assert same(snapshot(model), trained)


def test_what_is_done_to_the_average_stays_in_it_and_errors_put_the_model_back():
    model = Detector()
    hook = averaged(model)
    hook.before_train()
    run(hook, 0, 2)
    trained = snapshot(model)
    with pytest.raises(ZeroDivisionError), hook.applied():
        model.norm.running_mean.fill_(7.0)
        raise ZeroDivisionError
    assert same(snapshot(model), trained)
    with hook.applied():
        assert model.norm.running_mean.item() == 7.0


def test_all_processes_evaluate_the_average_of_the_main_one(monkeypatch):
    model = Detector()
    hook = averaged(model)
    hook.before_train()
    run(hook, 0, 3)
    trained = snapshot(model)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(7))
    with hook.applied():
        assert all((value == 7).all() for value in hook._tensors().values())
        assert torch.equal(model.auxiliary.weight, trained["auxiliary.weight"])
    assert all(torch.equal(value, trained[key]) for key, value in snapshot(model).items())


def test_after_the_last_step_the_model_is_the_average_and_a_longer_run_takes_it_back():
    torch.manual_seed(0)
    model = Detector()
    hook = averaged(model, max_iter=3)
    hook.before_train()
    parameters = [id(p) for p in model.parameters()]
    trained = run(hook, 0, 3)[-1]
    final = snapshot(model)
    assert not torch.equal(final["conv.weight"], trained["conv.weight"])
    assert [id(p) for p in model.parameters()] == parameters
    with hook.applied():
        assert same(snapshot(model), final)
    # Resumed after its end: evaluated as it is. Resumed to go further: trained as it was.
    for max_iter, expected in ((3, final), (5, trained)):
        other = Detector()
        other.load_state_dict(final)
        again = averaged(other, max_iter)
        again.load_state_dict(hook.state_dict())
        again.trainer.start_iter = 3
        again.before_train()
        assert same(snapshot(other), expected)


def test_a_resumed_average_goes_on_as_if_it_had_not_stopped():
    ends = []
    for stop in (None, 2):
        torch.manual_seed(0)
        model = Detector()
        hook = averaged(model, 5)
        hook.before_train()
        if stop:
            run(hook, 0, stop)
            state, weights = hook.state_dict(), snapshot(model)
            model = Detector()
            model.load_state_dict(weights)
            hook = averaged(model, 5)
            hook.load_state_dict(state)
            hook.trainer.start_iter = stop
            torch.manual_seed(1)
            hook.before_train()
        else:
            run(hook, 0, 2)
            torch.manual_seed(1)
        run(hook, 2, 5)
        ends.append(snapshot(model))
    assert same(*ends)


@pytest.mark.parametrize("decay", (-0.1, 1.0, 1.5, float("nan")))
def test_a_wrong_decay_names_its_key(decay):
    with pytest.raises(ValueError, match="SOLVER.EMA_DECAY must be 0 for none, or above 0 and below 1, got"):
        WeightAverageHook(decay)
