import math

import pytest
import torch
from quantization import slow_reference as slow
from quantization.specs import ready
from torch import nn

from aqdet.layers import QuantConv2d
from aqdet.quantization import QuantSpec, build_quantizer, calibrate
from aqdet.quantization.methods.lsq import LSQQuantizer


def signed(bits=4):
    return QuantSpec("lsqplus", bits, "input")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_range(bits, scale, offset):
    quantizer = ready(signed(bits), randn(50))
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        quantizer.offset.fill_(offset)
    return quantizer


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("offset", (-0.7, -0.06, 0.0, 0.4, -40.0))
def test_forward_and_gradients_are_the_papers_formulas(bits, offset):
    quantizer = with_range(bits, 0.25, offset)
    x, grad = randn(400, seed=1) * 2, randn(400, seed=2)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.backward(grad)
    codes, values, dx, dscale, doffset = slow.lsqplus(x.tolist(), grad.tolist(), 0.25, offset, bits)
    integers = quantizer.to_integer(x)
    assert integers.codes.tolist() == codes and torch.equal(integers.dequantize(), y)
    assert y.tolist() == values
    torch.testing.assert_close(leaf.grad, torch.tensor(dx))
    assert quantizer.scale.grad.item() == pytest.approx(dscale, rel=1e-4, abs=1e-5)
    assert quantizer.offset.grad.item() == pytest.approx(doffset, rel=1e-4, abs=1e-5)


def test_by_hand():
    # The offset -0.9 acts as -1, two steps: levels -1, -0.5, 0, 0.5.
    quantizer = with_range(2, 0.5, -0.9)
    x = torch.tensor([-3.0, -0.8, 0.1, 0.3, 2.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [-1, -1, 0, 0.5, 0.5]
    integers = quantizer.to_integer(x)
    assert integers.codes.tolist() == [0, 0, 2, 3, 3] and integers.zero_point == 2
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    # Below 0, above 3; in between round(v) - v at v = 0.4, 2.2, 2.6.
    assert quantizer.scale.grad.item() == pytest.approx(0 + 3 - 0.4 - 0.2 + 0.4)
    assert quantizer.offset.grad.item() == pytest.approx(2)


@pytest.mark.parametrize("offset", (-1.23, 3.0, -300.0, math.pi))
def test_zero_is_exactly_zero_wherever_the_offset_goes(offset):
    quantizer = with_range(4, 0.1, offset)
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]
    integers = quantizer.to_integer(torch.zeros(1))
    assert 0 <= integers.zero_point <= 15 and integers.codes.item() == integers.zero_point
    grid = quantizer.grid()
    assert (grid.quant_min, grid.quant_max) == (-integers.zero_point, 15 - integers.zero_point)


def test_an_offset_out_of_range_finds_back():
    quantizer, x = with_range(4, 0.2, 2.0), randn(500) * 0.5 - 0.5
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.03 * x.square().mean()
    assert quantizer.offset < -0.5


def test_an_unsigned_site_is_lsq_and_runs_fused():
    spec = QuantSpec("lsqplus", 4, "input", signed=False)
    quantizer, lsq = ready(spec), ready(QuantSpec("lsq", 4, "input", signed=False))
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]
    x = randn(2, 3, 4, 4)
    assert torch.equal(quantizer(x), lsq(x))
    assert quantizer.grid() == lsq.grid() and quantizer.gradient == lsq.gradient
    assert ready(QuantSpec("lsqplus", 4, "input")).gradient is None
    assert type(build_quantizer(QuantSpec("lsqplus", 4, "weight"))) is LSQQuantizer


@pytest.mark.parametrize("method", ("mse", "minmax", "percentile", "mean"))
def test_calibration_uses_the_codes_of_skewed_data(method):
    # Mostly positive, as after a sum of ReLU outputs: LSQ's symmetric range wastes nearly half of its codes.
    x = randn(5000).abs() * 2 - 0.3
    errors = {}
    for name in ("lsq", "lsqplus"):
        quantizer = ready(QuantSpec(name, 4, "input"), x, method)
        errors[name] = (quantizer(x) - x).square().mean().item()
        assert len(quantizer.to_integer(x).codes.unique()) == (16 if name == "lsqplus" and method != "mean" else 8)
    ratio = errors["lsqplus"] / errors["lsq"]
    # The mean of magnitudes tells nothing of the skew: it starts as LSQ.
    assert ratio == pytest.approx(1) if method == "mean" else ratio < 0.5


def test_minmax_by_hand_and_one_sided_data():
    for x, scale, offset in (
        ([-1.0, 0.5, 2.0], 3 / 15, -1.0),
        ([0.0, 3.0], 3 / 15, 0.0),
        ([-3.0, -1.0], 3 / 15, -3.0),
        ([0.0, 0.0], 1 / 7, -8 / 7),
    ):
        quantizer = ready(signed(), torch.tensor(x), "minmax")
        assert quantizer.scale.item() == pytest.approx(scale, rel=0.03)
        assert quantizer.offset.item() == pytest.approx(offset, rel=0.03)


def test_a_convolution_calls_the_module_and_trains_its_offset():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = QuantConv2d.from_float(conv, QuantSpec("lsqplus", 4, "weight"), signed())
    x = randn(2, 3, 6, 6) - 0.5
    calibrate(layer, lambda: layer(x))
    y = layer(x)
    codes = layer.input_quantizer(x).contiguous(memory_format=torch.channels_last)  # as the layer lays them out
    expected = torch.conv2d(codes, layer.weight_quantizer(layer.weight), layer.bias, padding=1)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
