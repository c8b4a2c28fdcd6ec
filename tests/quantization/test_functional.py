import math

import pytest
import torch
from quantization import slow_reference as slow

from aqdet.quantization import dequantize, fake_quantize, integer_range, quantize, use_kernels
from aqdet.quantization.functional import SCALE_EPS, floor_scale, replace_ste


@pytest.fixture(autouse=True, params=("plain", "lean"))
def kernels(request):
    with use_kernels(request.param):
        yield request.param


def test_replace_ste():
    x = torch.tensor([0.4, 1.5, 2.5, -0.5], requires_grad=True)
    y = replace_ste(x, x.detach().round())
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert y.tolist() == [0, 2, 2, 0]
    assert x.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_floor_scale(dtype):
    scale = torch.tensor([-1.0, 0.0, 0.5], dtype=dtype, requires_grad=True)
    y = floor_scale(scale)
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert y.dtype == torch.float32 and y.tolist() == [SCALE_EPS, SCALE_EPS, 0.5]
    assert scale.grad.dtype == dtype and scale.grad.tolist() == [1, 2, 3]


def test_integer_range():
    assert integer_range(4, True) == (-8, 7)
    assert integer_range(4, True, narrow_range=True) == (-7, 7)
    assert integer_range(2, True) == (-2, 1)
    assert integer_range(8, False) == (0, 255)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        integer_range(0, True)


def test_quantize_and_dequantize():
    x = torch.tensor([0.3, 1.2, 9.0, -1.0, 0.25, 0.75])
    codes = quantize(x, torch.tensor(0.5), 0, 15)
    assert codes.tolist() == [1, 2, 15, 0, 0, 2]
    assert dequantize(codes, torch.tensor(0.5)).tolist() == [0.5, 1, 7.5, 0, 0, 1]
    assert x.tolist()[0] == pytest.approx(0.3), "the input is not changed in place"


@pytest.mark.parametrize("gradient, dscale", [("lsq", 0 + 0 - 0.25 + 3 + 3), ("pact", 3 + 3)])
def test_gradients_on_the_bounds(gradient, dscale):
    # scale 1, range [0, 3]: a value on a bound counts as outside.
    x = torch.tensor([-1.0, 0.0, 1.25, 3.0, 4.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, 0, 3, gradient=gradient).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0]
    assert scale.grad.item() == dscale


def test_scale_gradient_is_the_slope_with_the_rounding_error_held():
    """Straight-through means: the rounding error is a constant. Then plain differences must agree."""
    xs, low, high, at = [-3.1, -0.6, 0.1, 0.33, 0.8, 2.9], -4, 3, 0.37
    scale = torch.tensor(at, requires_grad=True)
    fake_quantize(torch.tensor(xs), scale, low, high, gradient="lsq").sum().backward()

    def clipped(x, s):
        return min(max(x / s, low), high)

    errors = [round(clipped(x, at)) - clipped(x, at) for x in xs]
    expected = slow.slope(lambda s: sum(s * (clipped(x, s) + e) for x, e in zip(xs, errors, strict=True)), at)
    assert scale.grad.item() == pytest.approx(expected, abs=1e-5)

    scale.grad = None
    fake_quantize(torch.tensor(xs), scale, low, high, gradient="pact").sum().backward()
    expected = slow.slope(lambda s: sum(min(max(x, low * s), high * s) for x in xs), at)
    assert scale.grad.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("gradient", ("lsq", "pact"))
@pytest.mark.parametrize("shape", ((0, 3), (1,), ()))
def test_empty_and_one_element_tensors(gradient, shape):
    x = torch.full(shape, 0.8, requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, scale, 0, 15, gradient=gradient)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert y.flatten().tolist() == [1.0] * math.prod(shape)
    assert scale.grad.item() == pytest.approx((2 - 1.6) * x.numel() if gradient == "lsq" else 0)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="'lsq' or 'pact', got 'ste'"):
        fake_quantize(torch.ones(1), torch.ones(()), 0, 3, gradient="ste")


def test_compiles_without_graph_breaks():
    def step(x, scale):
        return fake_quantize(x, scale, -8, 7, gradient="lsq") + fake_quantize(x, scale, -8, 7, gradient="pact")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        x = torch.linspace(-2, 2, 40).requires_grad_()
        scale = torch.tensor(0.2, requires_grad=True)
        y = function(x, scale)
        y.square().sum().backward()
        results.append((y, x.grad, scale.grad))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)
