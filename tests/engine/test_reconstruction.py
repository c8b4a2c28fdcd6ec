"""Weights rounded by the layers' outputs, against a plain slow reference and all roundings there are."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from lively import images, pair

from aqdet.engine.post_training import predict
from aqdet.engine.reconstruction import POSITIONS, _Moments, reconstruct_weights, round_weights
from aqdet.layers import QuantConv2d
from aqdet.quantization import AffineGrid


def layer(inputs=7, outputs=3, rows=40, seed=0):
    """Weights, correlated inputs ``(rows, K)`` and a grid of 3 bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, x, AffineGrid(weight.abs().amax(1) / 3.4, -4, 3)


def error(x, weight, rounded):
    return (x @ (weight - rounded).T).square().sum().item()


def nearest(weight, grid):
    scale = grid.scale[:, None]
    return (weight / scale).round().clamp(grid.quant_min, grid.quant_max) * scale


def slow_rounding(weight, moments, grid, damping):
    """One input after the other; of the others those not chosen yet move to where the output's error is least."""
    inputs = len(moments)
    moments = moments.double() + damping * moments.double().diagonal().mean() * torch.eye(inputs).double()
    left, chosen = weight.double().clone(), torch.zeros_like(weight.double())
    order = sorted(range(inputs), key=lambda i: -moments[i, i].item())
    for step, place in enumerate(order):
        for out in range(len(weight)):
            scale = grid.scale[out].double()
            chosen[out, place] = (left[out, place] / scale).round().clamp(grid.quant_min, grid.quant_max) * scale
            rest = order[step + 1 :]
            if rest:
                # The least of (d H d) with d's part at ``place`` given: d_rest = -H_rest^-1 H_rest,place d_place.
                given = chosen[out, place] - left[out, place]
                best = -torch.linalg.solve(moments[rest][:, rest], moments[rest, place] * given)
                left[out, rest] += best
    return chosen


@pytest.mark.parametrize("inputs", [1, 7, 150])
def test_the_plain_reference_chooses_the_same(inputs):
    weight, x, grid = layer(inputs, rows=2 * inputs + 3)
    moments = x.T @ x
    expected = slow_rounding(weight, moments, grid, 0.01)
    torch.testing.assert_close(round_weights(weight, moments, grid, 0.01).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_outputs_are_nearer_than_by_the_nearest_codes():
    better = []
    for seed in range(20):
        weight, x, grid = layer(seed=seed)
        rounded = round_weights(weight, x.T @ x, grid)
        codes = (rounded / grid.scale[:, None]).round()
        torch.testing.assert_close(rounded, codes * grid.scale[:, None])
        assert codes.min() >= -4 and codes.max() <= 3
        better.append(error(x, weight, rounded) < error(x, weight, nearest(weight, grid)))
    assert sum(better) >= 18


def test_no_rounding_there_is_beats_it_by_much():
    ratios = []
    for seed in range(10):
        weight, x, grid = layer(4, 1, seed=seed)
        choices = itertools.product(range(-4, 4), repeat=4)
        least = min(error(x, weight, torch.tensor([codes]) * grid.scale) for codes in choices)
        ratios.append(error(x, weight, round_weights(weight, x.T @ x, grid)) / least)
    assert min(ratios) > 1 - 1e-5 and sorted(ratios)[5] < 1.5


def test_weights_on_the_grid_and_inputs_that_are_always_zero():
    weight, x, grid = layer()
    on_grid = nearest(weight, grid)
    torch.testing.assert_close(round_weights(on_grid, x.T @ x, grid), on_grid)
    torch.testing.assert_close(round_weights(weight, torch.zeros(7, 7), grid), nearest(weight, grid))


def test_moments_are_of_the_quantized_patches():
    conv = pair()[1].backbone.bottom_up.res3[0].conv1  # 3x3, stride 2
    x = torch.randn(2, conv.in_channels, 6, 6).relu()
    moments = _Moments(conv)
    moments.add(x)
    quantized, expected = conv.input_quantizer(x), 0
    padded = F.pad(quantized, (1, 1, 1, 1))
    for image, i, j in itertools.product(range(2), range(3), range(3)):
        patch = padded[image, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1)
        expected = expected + torch.outer(patch, patch)
    assert 9 < POSITIONS
    torch.testing.assert_close(moments.total, expected, rtol=1e-4, atol=1e-4)


def test_a_detectors_layers_are_nearer_to_full_precision():
    full, model = pair()
    batch, stage = images(2), model.backbone.bottom_up.res3
    conv, weight = stage[1].conv1, full.backbone.bottom_up.res3[1].conv1.weight
    seen = []
    handle = conv.register_forward_pre_hook(lambda module, args: seen.append(module.input_quantizer(args[0])))
    with torch.no_grad():
        predict(model, batch)
    handle.remove()

    def distance():
        return (F.conv2d(seen[0], conv.quantized_weight() - weight, padding=conv.padding)).square().sum().item()

    before = distance()
    done = reconstruct_weights(stage, lambda: predict(model, batch))
    assert set(done) == {key for key, module in stage.named_modules() if isinstance(module, QuantConv2d)}
    assert distance() < 0.8 * before
    torch.testing.assert_close(conv.quantized_weight(), conv.weight, rtol=1e-5, atol=0)
    assert not conv._forward_pre_hooks


def test_a_method_whose_grid_moves_with_the_weights_is_left_out():
    _, model = pair("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa")
    stage = model.backbone.bottom_up.res3
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    assert reconstruct_weights(stage, lambda: predict(model, images(1))) == []
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())
