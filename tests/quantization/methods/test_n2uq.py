import math

import pytest
import torch
from quantization import slow_reference as slow
from quantization.specs import ready
from torch import nn

from aqdet.layers import QuantConv2d
from aqdet.quantization import QuantSpec, build_quantizer, calibrate
from aqdet.quantization.methods.n2uq import MIN_INTERVAL

signedness = pytest.mark.parametrize("signed", (True, False))


def spec(bits=4, signed=True):
    return QuantSpec("n2uq", bits, "input", signed=signed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturbed(bits, signed):
    """A quantizer whose thresholds have left the uniform start."""
    x = randn(500) if signed else randn(500).abs()
    quantizer = ready(spec(bits, signed), x)
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        quantizer.intervals.mul_(torch.rand(quantizer.intervals.shape, generator=generator) + 0.4)
        quantizer.start.add_(0.1 * quantizer.scale)
        quantizer.scale.mul_(1.1)
    return quantizer


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@signedness
def test_forward_and_gradients_are_the_papers_formulas(bits, signed):
    quantizer = disturbed(bits, signed)
    x, grad = randn(300, seed=1) * 1.5, randn(300, seed=2)
    if not signed:
        x = x.abs()
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    low = -(2 ** (bits - 1)) if signed else 0
    scale = quantizer.scale.item()
    codes, dx, dscale, dstart, dintervals = slow.n2uq(
        x.tolist(), grad.tolist(), scale, quantizer.start.item(), quantizer.intervals.tolist(), low
    )
    integers = quantizer.to_integer(x)
    assert integers.codes.tolist() == codes and integers.zero_point == 0
    assert torch.equal(integers.dequantize(), y)
    torch.testing.assert_close(leaf.grad, torch.tensor(dx), rtol=1e-4, atol=1e-4)
    factor = 1 / math.sqrt(300 * quantizer.quant_max)  # sums over 300 elements, to the size of one
    for parameter, expected in (
        (quantizer.scale, [dscale]),
        (quantizer.start, [dstart]),
        (quantizer.intervals, dintervals),
    ):
        torch.testing.assert_close(parameter.grad * factor, torch.tensor(expected) * factor, rtol=1e-3, atol=1e-3)


def test_by_hand():
    # Intervals (0, 1], (1, 3], (3, 3.5]: the code steps up in their middles, 0.5, 2 and 3.25.
    quantizer = ready(spec(2, False), torch.rand(9))
    with torch.no_grad():
        quantizer.scale.fill_(2.0)
        quantizer.start.fill_(0.0)
        quantizer.intervals.copy_(torch.tensor([1.0, 2.0, 0.5]))
    x = torch.tensor([-1.0, 0.4, 0.6, 2.0, 2.1, 3.2, 3.3, 9.0], requires_grad=True)
    y = quantizer(x)
    assert quantizer.thresholds().tolist() == [0.5, 2, 3.25]
    assert y.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    y.sum().backward()
    assert x.grad.tolist() == [0, 2, 2, 1, 1, 4, 4, 0]
    assert quantizer.scale.grad.item() == pytest.approx(12)
    assert quantizer.start.grad.item() == pytest.approx(-14)
    # The last: -scale (0.2 + 0.3) / 0.5^2. The one before: that of both after, and -2 (1 + 1.1) / 2^2.
    assert quantizer.intervals.grad.tolist() == pytest.approx([-12, -9.05, -4])


@signedness
def test_the_gradient_is_the_slope_of_the_piecewise_linear_function(signed):
    quantizer = disturbed(3, signed)
    start, lengths = quantizer.start.item(), quantizer.intervals.tolist()

    def expectation(x):
        end, value = start, 0.0
        for length in lengths:
            value += min(max((x - end) / length, 0), 1)
            end += length
        return quantizer.scale.item() * value

    points = [p for p in torch.linspace(0.01, 2, 23).tolist()]
    x = torch.tensor(points, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([slow.slope(expectation, p) for p in points], rel=1e-3, abs=1e-4)


@signedness
def test_calibration_starts_as_lsq(signed):
    x = randn(1000) if signed else randn(1000).abs()
    quantizer, lsq = ready(spec(4, signed), x), ready(QuantSpec("lsq", 4, "input", signed=signed), x)
    assert torch.equal(quantizer.scale, lsq.scale)
    torch.testing.assert_close(quantizer(x), lsq(x))


def test_training_beats_the_uniform_thresholds():
    # A loss that wants a square root, not the identity: the thresholds have to move.
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    quantizer, target = ready(spec(2, False), x), x.sqrt()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (quantizer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    gaps = quantizer.thresholds().diff()
    assert (gaps > 0).all() and gaps.max() > 1.3 * gaps.min()


def test_lengths_have_a_floor_and_come_back_from_below_it():
    quantizer = ready(spec(2), randn(100))
    with torch.no_grad():
        quantizer.intervals.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    ends = quantizer.thresholds()
    assert ends.isfinite().all() and (ends.diff() > 0).all()
    assert ends[1] - ends[0] == pytest.approx(MIN_INTERVAL * quantizer.scale.item(), rel=1e-2)
    x = randn(100).requires_grad_()
    quantizer(x).square().sum().backward()
    for tensor in (x.grad, *(p.grad for p in quantizer.parameters())):
        assert tensor.isfinite().all()
    assert quantizer.intervals.grad[0] != 0


def test_a_runtime_must_evaluate_the_thresholds():
    quantizer = disturbed(3, True)
    x = randn(200)
    counted = (x[:, None] > quantizer.thresholds()).sum(dim=1) + quantizer.quant_min
    integers = quantizer.to_integer(x)
    assert torch.equal(integers.codes.long(), counted)
    assert not torch.equal(integers.codes, (x / integers.scale).round().clamp(-4, 3).int())
    assert quantizer.grid() is None


def test_an_unsigned_site_includes_the_relu():
    quantizer = disturbed(4, False)
    with torch.no_grad():
        quantizer.start.fill_(-1.0)
    x = randn(100)
    assert torch.equal(quantizer(x), quantizer(x.relu()))
    assert torch.equal(quantizer.to_integer(x).dequantize(), quantizer(x))


def test_it_is_for_activations():
    with pytest.raises(
        ValueError, match="weights must be one of dorefa, lqnet, lsq, lsqodd, lsqplus, pact, got 'n2uq'"
    ):
        build_quantizer(QuantSpec("n2uq", 4, "weight"))


def test_in_a_convolution():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = QuantConv2d.from_float(conv, QuantSpec("lsq", 4, "weight"), spec(4))
    x = randn(2, 3, 6, 6)
    calibrate(layer, lambda: layer(x))
    y = layer(x)
    y.square().sum().backward()
    codes = layer.input_quantizer(x).contiguous(memory_format=torch.channels_last)  # as the layer lays them out
    expected = torch.conv2d(codes, layer.weight_quantizer(layer.weight), layer.bias, padding=1)
    assert torch.equal(y, expected)
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
