"""Weights that flip between two codes."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import make_cfg
from torch import nn

from aqdet.engine.hooks.oscillation import OscillationHook, WeightHistory, build_oscillation_hook, dampening_loss
from aqdet.layers import QuantConv2d, QuantConvTranspose2d
from aqdet.quantization import QuantSpec, calibrate

DEFAULTS = {"dampening": 0.0, "threshold": 0.0, "threshold_start": 0.1, "momentum": 0.01}


def slow_history(sequences, momentum, threshold):
    """The paper's algorithm for one weight at a time: frequency, frozen, code at the end."""
    result = []
    for codes in sequences:
        previous, direction, frequency, average, frozen = codes[0], 0, 0.0, float(codes[0]), False
        for code in codes[1:]:
            code = previous if frozen else code
            change = (code > previous) - (code < previous)
            frequency = momentum * (change * direction == -1) + (1 - momentum) * frequency
            direction = change or direction
            if threshold and frequency > threshold and not frozen:
                frozen, code = True, round(average)
            average = momentum * code + (1 - momentum) * average
            previous = code
        result.append((frequency, frozen, previous))
    return result


@pytest.mark.parametrize("threshold", (0.0, 0.15))
def test_the_history_is_the_papers_algorithm(threshold):
    generator = torch.Generator().manual_seed(0)
    steps = (torch.rand(60, 200, generator=generator) < 0.3).int() * torch.randint(
        -1, 2, (60, 200), generator=generator
    )
    codes = steps.cumsum(dim=0).clamp(-2, 1).int()
    history = WeightHistory.start(codes[0])
    shares = [history.update(code, 0.05, threshold) for code in codes[1:]]
    expected = slow_history(codes.T.tolist(), 0.05, threshold)
    torch.testing.assert_close(history.frequency, torch.tensor([f for f, _, _ in expected]))
    assert history.frozen.tolist() == [frozen for _, frozen, _ in expected]
    assert history.codes.tolist() == [code for _, _, code in expected]
    assert history.frozen.any() == (threshold > 0) and not history.frozen.all()
    if not threshold:
        assert shares[-1].item() == pytest.approx((codes[-1] != codes[-2]).float().mean().item())


def test_by_hand():
    # Drifting up is no oscillation; going back is, each time.
    history = WeightHistory.start(torch.tensor([0, 0, 0]))
    for codes in ([1, 1, 0], [2, 0, 0], [3, 1, 0]):
        share = history.update(torch.tensor(codes), 0.5, 0.0)
        assert share.item() == pytest.approx(2 / 3)
    assert history.frequency.tolist() == [0, 0.75, 0] and history.direction.tolist() == [1, 1, 0]


def quantized_model(method="lsq", bits=2):
    conv = nn.Conv2d(2, 3, 3, bias=False)
    nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(0))
    weight = QuantSpec(method, bits, "weight", per_channel=True)
    model = nn.Sequential(QuantConv2d.from_float(conv, weight, QuantSpec("lsq", 8, "input")))
    calibrate(model, lambda: model(torch.rand(1, 2, 4, 4)))
    return model


class StandIn:
    def __init__(self, max_iter=40):
        self.max_iter, self.iter, self.storage = max_iter, 0, EventStorage(0)


def make_hook(model, max_iter=40, **values):
    hook = OscillationHook(model, **{**DEFAULTS, **values})
    hook.trainer = StandIn(max_iter)
    return hook


def push(model, iteration):
    """A step that takes every other weight across the threshold between two codes and back, and moves scales."""
    layer = model[0]
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        quantizer.scale.mul_(1.01)
        middle = quantizer.scale.view(-1, 1, 1, 1) * 0.5
        flat, target = layer.weight.flatten(), (middle * (1.2 if iteration % 2 else 0.8)).expand_as(layer.weight)
        flat[::2] = target.flatten()[::2]
        layer.weight.copy_(flat.view_as(layer.weight))


def test_oscillating_weights_are_frozen_on_their_level_wherever_the_scale_goes():
    model = quantized_model()
    hook = make_hook(model, threshold=0.02, threshold_start=0.1, momentum=0.05)
    hook.before_train()
    layer = model[0]
    frozen_codes = {}
    for hook.trainer.iter in range(40):
        push(model, hook.trainer.iter)
        hook.after_step()
        integer = layer.weight_quantizer.to_integer(layer.weight)
        frozen = hook._history["0"].frozen.flatten()
        # On the level itself: no rounding is left to do.
        on_level = torch.isclose(layer.weight, integer.dequantize(), rtol=1e-5).flatten()
        assert on_level[frozen].all()
        for index in frozen.nonzero().flatten().tolist():
            code = integer.codes.flatten()[index].item()
            assert frozen_codes.setdefault(index, code) == code
    assert frozen.tolist() == [index % 2 == 0 for index in range(54)]
    values = {key: value for key, (value, _) in hook.trainer.storage.latest().items()}
    assert values["frozen/0"] == values["frozen/all"] == 0.5


def test_a_transposed_convolution_is_frozen_on_the_levels_of_its_output_channels():
    weight = QuantSpec("lsq", 2, "weight", per_channel=True)
    torch.manual_seed(0)
    layer = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(3, 3, 2), weight, None)
    model = nn.Sequential(layer)
    calibrate(model, lambda: model(torch.rand(1, 3, 4, 4)))
    with torch.no_grad():
        layer.weight_quantizer.scale.mul_(torch.tensor([1.0, 1.5, 2.0]))
    hook = make_hook(model, dampening=1.0, threshold=0.02, threshold_start=0.02, momentum=0.05)
    hook.before_train()
    for hook.trainer.iter in range(8):
        with torch.no_grad():
            middle = layer.weight_quantizer.scale.view(1, -1, 1, 1) * 0.5
            layer.weight.copy_((middle * (1.2 if hook.trainer.iter % 2 else 0.8)).expand_as(layer.weight))
        hook.after_step()
    frozen = hook._history["0"].frozen
    assert frozen.all()
    torch.testing.assert_close(layer.weight, layer.quantized_weight())
    with EventStorage(hook.trainer.max_iter):
        assert hook._add_loss(model.train(), None, {})["loss_dampening"].item() < 1e-10


def test_the_threshold_falls_by_a_cosine():
    model = quantized_model()
    hook = make_hook(model, max_iter=100, threshold=0.02, threshold_start=0.1)
    hook.before_train()
    seen = []
    hook._history["0"].update = lambda codes, momentum, threshold: seen.append(threshold) or torch.zeros(())
    for hook.trainer.iter in (0, 49, 99):
        hook.after_step()
    assert seen == pytest.approx([0.1, 0.06, 0.02], abs=1e-4)


def test_shares_are_logged_by_layer_every_twenty_iterations():
    model = quantized_model()
    hook = make_hook(model)
    hook.before_train()
    storage = hook.trainer.storage
    for hook.trainer.iter in range(20):
        assert not storage.latest()
        push(model, hook.trainer.iter)
        hook.after_step()
    values = {key: value for key, (value, _) in storage.latest().items()}
    assert set(values) == {"oscillation/0", "oscillation/all", "flips/0", "flips/all"}
    assert values["oscillation/0"] == values["oscillation/all"] == 0.5
    assert 0.45 < values["flips/0"] <= 0.52
    # The last steps, fewer than twenty, are a window of their own: every other weight of them flips in each step.
    for hook.trainer.iter in range(20, 25):
        push(model, hook.trainer.iter)
        hook.after_step()
    hook.trainer.iter = hook.trainer.max_iter - 1
    push(model, 25)
    hook.after_step()
    assert hook.trainer.storage.latest()["flips/0"][0] == pytest.approx(0.5, abs=0.05)


def test_the_history_is_in_the_state_and_goes_on_from_it():
    ends = []
    for stop in (None, 13):
        model = quantized_model()
        hook = make_hook(model, threshold=0.02, momentum=0.05)
        hook.before_train()
        for iteration in range(30):
            hook.trainer.iter = iteration
            push(model, iteration)
            hook.after_step()
            if iteration == stop:
                state = hook.state_dict()
                hook = make_hook(model, threshold=0.02, momentum=0.05)
                hook.load_state_dict(state)
                hook.before_train()
        history, (flips, _) = hook._history["0"], hook.trainer.storage.latest()["flips/0"]
        ends.append((history.codes, history.frequency, history.average, history.frozen, model[0].weight, flips))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][:-1], ends[1][:-1], strict=True))
    assert ends[0][-1] == ends[1][-1] and ends[0][3].any()


@pytest.mark.parametrize("method", ("lsq", "pact"))
def test_dampening_pulls_to_the_level_inside_the_range_alone(method):
    model = quantized_model(method)
    layer = model[0]
    loss = dampening_loss(layer.weight, layer.weight_quantizer)
    loss.backward()
    integer = layer.weight_quantizer.to_integer(layer.weight)
    grid = layer.weight_quantizer.grid()
    scale = integer.scale.expand_as(layer.weight)
    expected, gradients = 0.0, []
    for w, s, code in zip(
        layer.weight.flatten().tolist(), scale.flatten().tolist(), integer.codes.flatten().tolist(), strict=True
    ):
        clipped = min(max(w, s * grid.quant_min), s * grid.quant_max)
        expected += (clipped - s * code) ** 2
        gradients.append(2 * (w - s * code) if clipped == w else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert layer.weight.grad.flatten().tolist() == pytest.approx(gradients, rel=1e-3, abs=1e-5)
    assert gradients.count(0.0) > 2
    assert all(parameter.grad is None for parameter in layer.weight_quantizer.parameters())


def test_the_loss_is_added_in_training_with_a_weight_that_rises():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = quantized_model()

        def forward(self, x):
            return {"loss": self.layers(x).sum()} if self.training else [self.layers(x)]

    model, x = Losses(), torch.rand(1, 2, 4, 4)
    hook = make_hook(model, max_iter=100, dampening=0.3)
    layer = model.layers[0]
    full = dampening_loss(layer.weight, layer.weight_quantizer).item()
    for iteration in (0, 25, 50, 100):
        with EventStorage(iteration):
            losses = model(x)
        weight = 0.3 * 0.5 * (1 - math.cos(math.pi * iteration / 100))
        assert losses["loss_dampening"].item() == pytest.approx(weight * full)
        with torch.no_grad():
            assert set(model(x)) == {"loss"}
    assert isinstance(model.eval()(x), list)
    hook.after_train()
    assert set(model.train()(x)) == {"loss"}


@pytest.mark.parametrize(
    "values, words",
    [
        ({"dampening": -1.0}, "OSCILLATION.DAMPENING is out of range: -1.0"),
        ({"threshold": 1.0}, "OSCILLATION.FREEZE_THRESHOLD is out of range: 1.0"),
        ({"threshold": 0.2}, "OSCILLATION.FREEZE_THRESHOLD_START is out of range: 0.1"),
        ({"momentum": 0.0}, "OSCILLATION.MOMENTUM is out of range: 0.0"),
    ],
)
def test_wrong_values_name_their_key(values, words):
    with pytest.raises(ValueError, match=words):
        make_hook(quantized_model(), **values)


@pytest.mark.parametrize("method, bits", [("lqnet", 2), ("dorefa", 2), ("lsqodd", 2), ("lsq", 8)])
def test_weights_without_a_grid_of_few_bits_are_an_error_or_a_count(method, bits, caplog):
    with pytest.raises(ValueError, match="no layer has weights on a uniform grid of at most 4 bits"):
        make_hook(quantized_model(method, bits))
    make_hook(nn.Sequential(quantized_model(), quantized_model(method, bits)))
    assert ("1 layers are not tracked, 1.0 (" in caplog.text) == (bits == 2)


def test_the_config_has_it_off():
    cfg = make_cfg()
    assert build_oscillation_hook(cfg, quantized_model()) is None
    for key in ("TRACK", "DAMPENING", "FREEZE_THRESHOLD"):
        cfg = make_cfg(f"MODEL.QUANT.OSCILLATION.{key}", "True" if key == "TRACK" else "0.05")
        assert build_oscillation_hook(cfg, quantized_model()) is not None


def test_an_older_state_of_a_transposed_convolution_is_turned():
    """Its history had the weight's own order of axes."""
    weight = QuantSpec("lsq", 2, "weight", per_channel=True)
    layer = QuantConvTranspose2d.from_float(nn.ConvTranspose2d(3, 3, 2), weight, None)
    model = nn.Sequential(layer)
    calibrate(model, lambda: model(torch.rand(1, 3, 4, 4)))
    hook = make_hook(model)
    hook.before_train()
    state = hook.state_dict()
    codes = state["history"]["0"]["codes"].clone()
    assert not torch.equal(codes, codes.transpose(0, 1))
    again = make_hook(model)
    again.load_state_dict(state)
    assert torch.equal(again._history["0"].codes, codes)
    del state["output channels first"]
    again.load_state_dict(state)
    assert torch.equal(again._history["0"].codes, codes.transpose(0, 1))
