"""The fused kernels against the plain formulas: on a GPU, or interpreted by Triton on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from aqdet.quantization import QuantSpec, calibrate, fake_quantize, functional, use_kernels
from aqdet.quantization.fused import operators
from aqdet.quantization.kernels import plain
from aqdet.quantization.lean.recipe import Recipe, note_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = operators.IS_INTERPRETED or (operators.HAS_TRITON and torch.cuda.is_available())
kernel = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU, or Triton's interpreter in a process of its own")
RANGES = [(0, 3), (-2, 1), (0, 255), (-128, 127)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels last")


def tensors(dtype=torch.float32, layout="contiguous", shape=(3, 7, 11, 13)):
    """Values with ties, bounds, zeros of both signs and NaN among them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) * 2 for _ in range(2))
    x.view(-1)[:9] = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.0, 0.0, 1.5, -1.0, 1e9])
    if layout == "channels last":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    return x.to(DEVICE, dtype), grad.to(DEVICE, dtype)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def check_sum(actual, expected, terms):
    """The sum agrees to 1e-6 of the sum of its terms' magnitudes."""
    assert ((actual.double() - expected.double()).abs() <= 1e-6 * terms.double() + 1e-12).all()


def run_interpreted(file):
    """Runs a file of tests in a process in which Triton interprets its programs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " skipped" in run.stdout and " failed" not in run.stdout


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low, high", RANGES)
def test_values_and_gradients_are_those_of_the_plain_form(low, high, dtype, layout):
    x, grad = tensors(dtype, layout)
    results = []
    for kernels in ("fused", "plain"):
        a, scale = x.clone().requires_grad_(), torch.tensor(0.5, device=DEVICE, requires_grad=True)
        with use_kernels(kernels):
            y = fake_quantize(a, scale, low, high)
            y.backward(grad)
        results.append((y.detach(), a.grad, scale.grad))
    (y, dx, dscale), (plain_y, plain_dx, plain_dscale) = results
    assert same(y, plain_y) and same(dx, plain_dx)
    terms = (grad.float() * x.float().div(0.5).clamp(low, high).abs().clamp(min=0.5)).abs().sum()
    check_sum(dscale, plain_dscale, terms)


@kernel
@pytest.mark.parametrize("gradient", functional.GRADIENTS)
def test_the_sum_is_that_in_float64(gradient):
    x, grad = tensors(shape=(2, 3, 20, 30))
    scale = torch.tensor(0.5, device=DEVICE)
    dx, dscale = operators.scale_gradients(grad, x, scale, 0, 3, gradient, torch.float32)
    ratio = x.double() / 0.5
    is_outside = (ratio <= 0) | (ratio >= 3)
    inside = ratio.round() - ratio if gradient == "lsq" else torch.zeros_like(ratio)
    terms = grad.double() * torch.where(is_outside, ratio.clamp(0, 3), inside)
    assert same(dx, grad.masked_fill(is_outside, 0))
    assert dscale.item() == pytest.approx(terms.sum().item(), rel=1e-6)


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_for_each_row(layout):
    x, grad = tensors(layout=layout, shape=(6, 5, 15, 17))
    scale = torch.linspace(0.1, 2, 6, device=DEVICE).view(6, 1, 1, 1)
    y = operators.fake_quantized(x, scale, -2, 1, torch.float32)
    dx, dscale = operators.scale_gradients(grad, x, scale, -2, 1, "lsq", torch.float32)
    assert same(y, functional.quantize(x, scale, -2, 1) * scale)
    plain_dx, plain_dscale = functional.scale_gradients(grad, x, scale, -2, 1, "lsq")
    assert same(dx, plain_dx) and dscale.shape == scale.shape
    check_sum(dscale, plain_dscale, (grad * 2).abs().sum(dim=(1, 2, 3), keepdim=True))


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_is_computed_again_from_its_recipe(layout):
    base, grad = tensors(layout=layout)
    factor, shift = (torch.linspace(start, 1, 7, device=DEVICE) for start in (0.3, -1.0))
    affine = base * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    codes = torch.randint(0, 16, base.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    codes = torch.empty_like(base, dtype=torch.uint8).copy_(codes)
    scale = torch.tensor(0.5, device=DEVICE)
    for recipe, x in (
        (Recipe(base, factor, shift), affine),
        (Recipe(codes, torch.tensor(0.3, device=DEVICE)), codes * torch.tensor(0.3, device=DEVICE)),
    ):
        y = operators.recipe_quantized(recipe, scale, 0, 3, torch.float32)
        assert same(y, functional.quantize(x, scale, 0, 3) * scale) and y.stride() == base.stride()
        dx, dscale = operators.recipe_gradients(grad, recipe, scale, 0, 3, "lsq", torch.float32)
        plain_dx, plain_dscale = functional.scale_gradients(grad, x, scale, 0, 3, "lsq")
        assert same(dx, plain_dx)
        check_sum(dscale, plain_dscale, (grad * 3).abs().sum())


@kernel
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_in_half_precision_is_rounded_when_it_is_computed_again(layout, dtype):
    base, grad = tensors(dtype, layout)
    factor, shift = (torch.linspace(start, 1, 7, device=DEVICE) for start in (0.3, -1.0))
    x = (base.float() * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(dtype)
    recipe, scale = Recipe(base, factor, shift, dtype), torch.tensor(0.05, device=DEVICE)
    values = functional.quantize(x, scale, -8, 7)
    y, codes = operators.recipe_codes(recipe, scale, -8, 7, dtype)
    assert same(y, (values * scale).to(dtype)) and same(codes, values.to(torch.int8))
    assert not torch.equal(values, functional.quantize(recipe._replace(dtype=torch.float32).parts()[0][0].compute(), scale, -8, 7))  # fmt: skip  # noqa: E501
    dx, dscale = operators.recipe_gradients(grad, recipe, scale, -8, 7, "lsq", dtype)
    plain_dx, plain_dscale = functional.scale_gradients(grad, x, scale, -8, 7, "lsq")
    assert same(dx, plain_dx.to(dtype))
    check_sum(dscale, plain_dscale, (grad.float() * 8).abs().sum())


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("low, high", [(0, 255), (-127, 127)])
def test_where_values_lay_and_their_codes(low, high, dtype, layout):
    x, grad = tensors(dtype, layout)
    scale = torch.tensor(1 / 64, device=DEVICE)
    found = operators.region_quantized(x, scale, low, high, True)
    expected = plain("region_quantized")(x, scale, low, high, True)
    assert all(map(same, found, expected)) and len(found[1].unique()) == 3
    assert operators.region_quantized(x, scale, low, high, False)[2] is None
    dx, dscale = operators.region_gradients(grad, found[1], scale, low, high, dtype)
    plain_dx, plain_dscale = functional.scale_gradients(grad, x, scale, low, high, "pact")
    assert same(dx, plain_dx.to(dtype))
    check_sum(dscale, plain_dscale, (grad.float() * high).abs().sum())


@kernel
def test_a_gradient_in_another_layout_and_not_a_number():
    x, grad = tensors()
    scale = torch.tensor(0.5, device=DEVICE)
    other = grad.contiguous(memory_format=torch.channels_last)
    dx, _ = operators.scale_gradients(other, x, scale, 0, 3, "lsq", torch.float32)
    assert same(dx, functional.scale_gradients(grad, x, scale, 0, 3, "lsq")[0])
    x[0, 0, 0, 0] = float("nan")
    dx, dscale = operators.scale_gradients(grad, x, scale, 0, 3, "lsq", torch.float32)
    assert dx[0, 0, 0, 0] == grad[0, 0, 0, 0] and dscale.isnan()
    assert operators.fake_quantized(x, scale, 0, 3, x.dtype)[0, 0, 0, 0].isnan()


@kernel
def test_empty_tensors_and_tensors_with_gaps():
    scale = torch.tensor(0.5, device=DEVICE)
    empty = torch.zeros(0, 3, 4, 4, device=DEVICE)
    assert operators.fake_quantized(empty, scale, 0, 3, torch.float32).shape == empty.shape
    assert operators.scale_gradients(empty, empty, scale, 0, 3, "lsq", torch.float32)[1] == 0
    x, grad = tensors()
    gaps = x[..., ::2]
    assert not operators.can_run(scale, gaps)
    assert torch.equal(operators.fake_quantized(gaps, scale, 0, 3, x.dtype), functional.quantize(gaps, scale, 0, 3) / 2)


@pytest.mark.parametrize("num_bits", (2, 8))
def test_a_set_of_kernels_in_whole_layers(num_bits):
    """A convolution on a machine without a GPU falls back to the lean set, to the bit."""
    from aqdet.layers import QuantConv2d

    torch.manual_seed(0)
    spec = QuantSpec("lsq", num_bits, signed=True, role="weight", per_channel=True)
    layer = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, padding=1), spec, QuantSpec("lsq", num_bits, signed=False, role="input"))  # fmt: skip  # noqa: E501
    x = torch.rand(2, 4, 9, 9)
    calibrate(layer, lambda: layer(x))
    layer.to(DEVICE)
    results = []
    for kernels in ("lean", "fused"):
        layer.zero_grad()
        leaf = x.to(DEVICE).requires_grad_()
        with use_kernels(kernels):
            y = layer(leaf)
            y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(operators.IS_INTERPRETED, reason="the interpreter has this operator's place")
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 300, 300)], ids=str)
def test_on_a_cpu_the_operators_are_the_plain_formulas(shape):
    x, grad = (t.cpu() for t in tensors(shape=shape))
    scale, factor, shift = torch.tensor(0.5), torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 1, -1])
    affine = x * factor.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
    y = torch.ops.aqdet.fake_quantize(x, factor, shift, x.dtype, scale, 0, 3, x.dtype)
    assert torch.equal(y, functional.quantize(affine, scale, 0, 3) * scale)
    found = torch.ops.aqdet.fake_quantize_backward(grad, x, factor, shift, x.dtype, scale, 0, 3, False, x.dtype)
    expected = functional.scale_gradients(grad, affine, scale, 0, 3, "pact")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_shapes_without_values():
    x = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    scale = torch.empty((), device="meta")
    y = torch.ops.aqdet.fake_quantize(x, None, None, x.dtype, scale, 0, 3, torch.float16)
    assert y.shape == x.shape and y.dtype == torch.float16 and y.stride() == x.stride()
    dx, dscale = torch.ops.aqdet.fake_quantize_backward(x, x, None, None, x.dtype, scale, 0, 3, True, x.dtype)
    assert dx.shape == x.shape and dx.dtype == torch.float32 and dscale.shape == ()


def test_a_recipe_of_a_channel_is_found():
    x = torch.randn(2, 3, 4, 4)
    noted = note_recipe(x * 2 + 1, Recipe(x, torch.full((3,), 2.0), torch.ones(3)))
    assert operators.is_plain_recipe(noted.aqdet_recipe[0])
    assert not operators.is_plain_recipe(Recipe(x[..., ::2], torch.ones(3), torch.ones(3)))


@pytest.mark.skipif(CAN_RUN or not operators.HAS_TRITON, reason="the kernels run in this process, or Triton is missing")
def test_under_the_interpreter():
    run_interpreted(__file__)
