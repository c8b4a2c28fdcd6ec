import math

import pytest
import torch
from quantization import slow_reference as slow
from quantization.specs import NUM_CHANNELS, data, groups, ready
from torch import nn

from aqdet.layers import QuantConv2d
from aqdet.quantization import QuantSpec, build_quantizer, calibrate, use_kernels
from aqdet.quantization.lean.weight import integer_weight, recipe_of_weight

BITS = (1, 2, 3, 4)
CHANNELS = pytest.mark.parametrize("per_channel", (False, True))
CENTERED = pytest.mark.parametrize("centered", (False, True))


def weight_spec(bits, per_channel=False, centered=False):
    return QuantSpec("lsqodd", bits, "weight", per_channel=per_channel, centered=centered)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_scale(spec, scale):
    quantizer = ready(spec)
    with torch.no_grad():
        quantizer.scale.copy_(torch.as_tensor(scale))
    return quantizer


@pytest.mark.parametrize("bits", BITS)
@CHANNELS
@CENTERED
def test_forward_and_gradients_are_the_formula(bits, per_channel, centered):
    spec = weight_spec(bits, per_channel, centered)
    quantizer = ready(spec)
    w, grad = data(spec, 1) * 1.3 + 0.1, randn(NUM_CHANNELS, 4, 3, 3, seed=2)
    leaf = w.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    integers = quantizer.to_integer(w)
    assert torch.equal(integers.dequantize(), y)
    each = [groups(spec, tensor) for tensor in (w, grad, integers.codes, y, leaf.grad)]
    for xs, gs, codes, values, dx, scale, dscale in zip(*each, quantizer.scale, quantizer.scale.grad, strict=True):
        expected = slow.lsqodd(xs.tolist(), gs.tolist(), scale.item(), bits, centered)
        assert codes.tolist() == expected[0]
        torch.testing.assert_close(values, torch.tensor(expected[1]))
        torch.testing.assert_close(dx, torch.tensor(expected[2]))
        assert dscale.item() == pytest.approx(expected[3], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradients_are_those_of_the_surrogate(bits):
    """Straight through: the codes move with the weights inside the clip, and stand still for the scale."""
    spec = weight_spec(bits, centered=True)
    quantizer = with_scale(spec, [0.4])
    w, grad = randn(40, seed=3).double(), randn(40, seed=4).double()
    leaf = w.float().requires_grad_()
    quantizer(leaf).backward(grad.float())
    half, step = 2 ** (bits - 1), 0.4
    held = ((w - w.mean()) / step).clamp(-half, half)  # where the rounding's offset is taken
    offset = held.floor().clamp(-half, half - 1) + 0.5 - held

    def loss(values, scale):
        ratio = ((values - values.mean()) / scale).clamp(-half, half)
        return float((grad * (ratio + offset) * scale).sum())

    def moved(index, by):
        values = w.clone()
        values[index] += by
        return values

    slopes = [slow.slope(lambda by, index=index: loss(moved(index, by), step), 0.0) for index in range(len(w))]
    assert leaf.grad.tolist() == pytest.approx(slopes, abs=1e-4)
    assert quantizer.scale.grad.item() == pytest.approx(slow.slope(lambda scale: loss(w, scale), step), abs=1e-3)


def test_by_hand():
    quantizer = with_scale(weight_spec(2), [1.0])
    w = torch.tensor([-5.0, -2.0, -1.5, -0.2, 0.0, 0.9, 1.0, 2.0], requires_grad=True)
    y = quantizer(w)
    assert y.tolist() == [-1.5, -1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5]
    assert quantizer.to_integer(w).codes.tolist() == [-3, -3, -3, -1, 1, 1, 3, 3]
    assert quantizer.to_integer(w).scale.item() == 0.5 and quantizer.to_integer(w).zero_point == 0
    y.sum().backward()
    assert w.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    # Outside -1.5, -1.5 and 1.5; inside 0, -0.3, 0.5, -0.4, 0.5.
    assert quantizer.scale.grad.item() == pytest.approx(-1.5 + 0.3)


def test_one_bit_is_the_sign():
    quantizer = ready(weight_spec(1), w := randn(200) + 0.3)
    assert torch.equal(quantizer(w).sign(), torch.where(w >= 0, 1.0, -1.0))
    # The best scale is twice the mean of the magnitudes.
    assert quantizer.scale.item() == pytest.approx(2 * w.abs().mean().item(), rel=0.02)
    exactly = ready(weight_spec(1), w, "mean")
    assert exactly.scale.item() == pytest.approx(2 * w.abs().mean().item(), rel=1e-6)


def test_levels_are_unchanged():
    for bits in BITS:
        quantizer = with_scale(weight_spec(bits), [0.3])
        x = torch.arange(1 - 2**bits, 2**bits, 2) * torch.tensor(0.3) / 2
        assert torch.equal(quantizer(x), x) and len(x) == 2**bits


@pytest.mark.parametrize("name, bits, expected", [("lsq", 2, 0.149), ("lsqodd", 2, 0.119), ("lsqodd", 3, 0.0374)])
def test_the_error_on_a_gaussian_at_the_best_scale(name, bits, expected):
    w = randn(1, 200_000)
    quantizer = ready(QuantSpec(name, bits, "weight"), w)
    assert (quantizer(w) - w).square().mean().item() == pytest.approx(expected, rel=0.03)


def nearest(x, scale, bits):
    """Values on the nearest of the levels, by their distances."""
    levels = torch.arange(1 - 2**bits, 2**bits, 2) * scale / 2
    return levels[(x[:, None] - levels).abs().argmin(dim=1)]


@pytest.mark.parametrize("bits", BITS)
@CENTERED
def test_the_first_scale_is_the_best(bits, centered):
    w = randn(3, 500, seed=5) * torch.tensor([[0.1], [1.0], [4.0]]) + 0.2
    quantizer = build_quantizer(weight_spec(bits, per_channel=True, centered=centered), num_channels=3)
    calibrate(quantizer, lambda: quantizer(w))
    for x, scale in zip(w - w.mean(dim=1, keepdim=True) * centered, quantizer.scale.detach(), strict=True):
        steps = x.abs().max() * torch.linspace(0.02, 2.5, 400)
        best = min((nearest(x, step, bits) - x).square().sum() for step in steps)
        assert (nearest(x, scale, bits) - x).square().sum() <= 1.01 * best


@pytest.mark.parametrize(
    "method, scale", [("minmax", 2 * 3.0 / 3), ("percentile", 2 * 3.0 / 3), ("mean", 2 * 1.5 / math.sqrt(2))]
)
def test_other_calibration_methods_by_hand(method, scale):
    quantizer = ready(weight_spec(2), torch.tensor([[-3.0, 1.0, 0.5, -1.5]]), method)
    assert quantizer.scale.item() == pytest.approx(scale)


def test_a_channel_of_zeros_gets_the_smallest_scale_of_the_others():
    w = data(spec := weight_spec(2, per_channel=True))
    w[4] = 0
    quantizer = ready(spec, w)
    others = quantizer.scale[[0, 1, 2, 3, 5]]
    assert quantizer.scale[4] == others.min() and quantizer(w)[4].abs().max() == others.min() / 2
    assert ready(spec, torch.zeros_like(w)).scale.tolist() == [1.0] * NUM_CHANNELS


def test_centering_takes_the_mean_away_and_its_gradient():
    spec = weight_spec(2, per_channel=True, centered=True)
    w = data(spec).requires_grad_()
    quantizer = ready(spec, w)
    y = quantizer(w)
    assert torch.allclose(quantizer(w.detach() + 0.25), y)
    (y * randn(*y.shape)).sum().backward()
    torch.testing.assert_close(w.grad.flatten(1).sum(1), torch.zeros(NUM_CHANNELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ((NUM_CHANNELS, 4, 3, 3), (600, 100, 3, 3), (NUM_CHANNELS, 7)), ids=str)
@CHANNELS
@CENTERED
@pytest.mark.parametrize("bits", (1, 2, 4))
def test_the_lean_weight_is_the_plain_one(shape, per_channel, centered, bits):
    w, grad = randn(*shape), randn(*shape, seed=1)
    quantizer = build_quantizer(weight_spec(bits, per_channel, centered), num_channels=shape[0])
    calibrate(quantizer, lambda: quantizer(w))
    leaf = w.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    recipe = recipe_of_weight(quantizer, w)
    assert recipe.tensors[0].data_ptr() == w.data_ptr()
    with torch.no_grad():
        values, gradients = recipe.replay(*recipe.tensors, dtype=w.dtype)
        dw, dscale = gradients(grad)
    assert torch.equal(values, y) and torch.equal(dw, leaf.grad)
    torch.testing.assert_close(dscale.reshape(-1), quantizer.scale.grad, rtol=1e-4, atol=2e-2)
    integer = integer_weight(quantizer, w)
    assert integer.codes.dtype == torch.int8 and integer.scale.shape == (shape[0],)
    assert torch.equal(integer.codes * integer.scale.view(-1, *[1] * (w.dim() - 1)), y)
    assert integer_weight(quantizer, w, 2**bits - 2) is None


@pytest.mark.parametrize("kernels", ("plain", "lean", "fused"))
@CENTERED
def test_a_convolution_computes_alike_with_all_kernels(kernels, centered):
    torch.manual_seed(0)
    layer = QuantConv2d.from_float(
        nn.Conv2d(4, NUM_CHANNELS, 3, padding=1),
        weight_spec(2, per_channel=True, centered=centered),
        QuantSpec("lsq", 2, "input", signed=False),
    )
    x = randn(2, 4, 6, 6).relu()
    calibrate(layer, lambda: layer(x))
    grad = randn(2, NUM_CHANNELS, 6, 6, seed=5)
    expected = torch.conv2d(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias, padding=1)
    wanted = torch.autograd.grad(expected, [*layer.parameters()], grad)
    with use_kernels(kernels):
        y = layer(x)
        found = torch.autograd.grad(y, [*layer.parameters()], grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
