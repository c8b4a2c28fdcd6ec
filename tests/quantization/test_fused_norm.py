"""Batch norm with a quantizer behind it as fused kernels, against the plain formulas: as in test_fused.py."""

import copy

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from quantization.test_fused import CAN_RUN, DEVICE, DTYPES, LAYOUTS, check_sum, kernel, run_interpreted, same
from quantization.test_fused import tensors as extreme_tensors
from torch import nn

from aqdet.quantization import functional, use_kernels
from aqdet.quantization.fused import norm_operators, operators
from aqdet.quantization.kernels import plain
from aqdet.quantization.lean import norm as lean_norm
from aqdet.quantization.lean.moments import Reader
from aqdet.quantization.lean.norm import Deferred, Moments, computed, computed_relu, defer, quantize_deferred

CHANNELS = 7


def tensors(dtype=torch.float32, layout="contiguous"):
    x, grad = extreme_tensors(torch.float32, layout)
    return x.clamp(-8, 8).to(dtype), grad.to(dtype)


def affine():
    """Moments as of a norm, and the quantizer's scale."""
    mean, inverse, scale, shift = (torch.linspace(a, b, CHANNELS, device=DEVICE) for a, b in ((-0.5, 0.5), (0.4, 2), (0.3, 1), (-1, 1)))  # fmt: skip  # noqa: E501
    return Moments(mean, inverse, scale, shift, None), torch.tensor(0.25, device=DEVICE)


def view(t):
    return t.view(1, -1, 1, 1)


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", ("nothing", "relu", *functional.GRADIENTS))
def test_gradients_are_those_of_the_formula(gradient, dtype, layout):
    x, grad = tensors(dtype, layout)
    (mean, inverse, scale, shift, _), step = affine()
    y = (x.float() * view(scale) + view(shift)).to(dtype)
    options = (None, 0, 0, {"nothing": norm_operators.NOTHING, "relu": norm_operators.RELU}.get(gradient, 0))
    dy, dstep = grad.float(), torch.zeros((), device=DEVICE)
    if gradient == "relu":
        dy = torch.where(y > 0, dy, 0.0)
    elif gradient != "nothing":
        options = step, 0, 3, norm_operators.MODES[gradient]
        dy, dstep = functional.scale_gradients(grad, y, step, 0, 3, gradient)
        dy = dy.to(dtype).float()
    centred = (x.float() - view(mean)) * view(inverse)
    shared = grad, x, scale, shift, mean, inverse, *options
    sums = torch.ops.aqdet.norm_sums(*shared)
    axes = (0, 2, 3)
    check_sum(sums[:CHANNELS], dy.double().sum(axes), dy.abs().sum(axes))
    products = dy.double() * centred
    check_sum(sums[CHANNELS:-1], products.sum(axes), products.abs().sum(axes))
    if gradient in functional.GRADIENTS:
        check_sum(sums[-1], dstep, (grad.float() * 3).abs().sum())
    for count in (None, torch.tensor(1000.0, device=DEVICE)):
        number = x.numel() / CHANNELS if count is None else count
        dx = torch.ops.aqdet.norm_input(*shared, sums, count)
        first, second = (sums[:-1] / number).view(2, -1)
        assert same(dx, (view(scale) * (dy - view(first) - centred * view(second))).to(dtype))
        assert dx.stride() == x.stride()


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", (False, True))
def test_the_output_is_the_affine_of_its_channel(relu, dtype, layout):
    x, _ = tensors(dtype, layout)
    moments, _ = affine()
    y = norm_operators.normalized(x, moments, relu)
    expected = (x.float() * view(moments.scale) + view(moments.shift)).to(dtype)
    assert same(y, expected.relu() if relu else expected) and y.stride() == x.stride()


@kernel
@pytest.mark.parametrize("processes", (1, 3))
def test_moments_of_one_and_of_several_processes(processes):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(n, CHANNELS, generator=generator, dtype=torch.float64) * 3 + 1 for n in (40, 11, 2)[:processes]
    ]
    whole = torch.cat(parts)
    rows = torch.stack([torch.cat([p.mean(0), p.var(0, unbiased=False), torch.tensor([float(len(p))])]) for p in parts])
    rows = rows.float().to(DEVICE)
    weight, bias = (torch.linspace(a, 2, CHANNELS, device=DEVICE) for a in (0.5, -1))
    running = [torch.full((CHANNELS,), 3.0, device=DEVICE), torch.full((CHANNELS,), 2.0, device=DEVICE)]
    tracked = torch.tensor(5, device=DEVICE)
    counts = rows[:, -1:] if processes > 1 else None
    arguments = rows[:, :CHANNELS], rows[:, CHANNELS:-1], counts, len(whole), weight, bias
    out, count = torch.ops.aqdet.norm_moments(*arguments, *running, tracked, 0.1, 1e-5)
    mean, var = whole.mean(0), whole.var(0, unbiased=False)
    inverse = (var + 1e-5).rsqrt()
    scale = weight.cpu() * inverse
    expected = torch.stack([mean, inverse, scale, bias.cpu() - mean * scale])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running[0].cpu().double(), 0.9 * 3 + 0.1 * mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].cpu().double(), 0.9 * 2 + 0.1 * whole.var(0), rtol=1e-6, atol=1e-6)
    assert tracked == 6 and (processes == 1 or count == len(whole))
    before = [t.clone() for t in (*running, tracked)]
    again, _ = torch.ops.aqdet.norm_moments(*arguments, None, None, None, 0.1, 1e-5)
    assert torch.equal(again, out) and all(map(torch.equal, before, (*running, tracked)))


def norms(cycle):
    norm = CycleBatchNormList(2, num_features=CHANNELS) if cycle else nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return norm.to(DEVICE)


@kernel
@pytest.mark.parametrize("cycle", (False, True), ids=("norm", "norm per level"))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("following", ("nothing", "relu", "quantizer"))
def test_a_norm_and_what_follows_as_in_the_lean_set(following, dtype, cycle, monkeypatch):
    """Outputs, gradients, running statistics; the output stays in the precision of the input."""
    monkeypatch.setattr(lean_norm, "_has_kernels", lambda _: True)  # also on a CPU in half precision
    x, grad = tensors(dtype)
    results = []
    original = norms(cycle)
    for kernels in ("fused", "lean"):
        norm = copy.deepcopy(original)
        a, step = x.clone().requires_grad_(), torch.tensor(0.25, device=DEVICE, requires_grad=True)
        with use_kernels(kernels):
            y = defer(norm, a)
            assert isinstance(y, Deferred)
            if following == "quantizer":
                y = quantize_deferred(y, step, 0, 3, gradient="lsq", note_codes=True)
            else:
                y = computed(y) if following == "nothing" else computed_relu(y)
            assert y.dtype == dtype
            y.backward(grad)
        gradients = [a.grad.float(), norm.weight.grad, norm.bias.grad]
        results.append(
            [y.detach().float(), *gradients, *([step.grad] if following == "quantizer" else []), *norm.buffers()]
        )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if cycle:
        assert norm._pos == 1


@kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_several_norms_exchange_together(layout):
    x, grad = tensors(layout=layout)
    moments = affine()[0]._replace(num_values=torch.tensor(3.0 * x.numel() / CHANNELS, device=DEVICE))
    for reader in (None, Reader(None), Reader(torch.tensor(0.25, device=DEVICE), 0, 3, "lsq")):
        sums = norm_operators.norm_sums(grad, x, moments, reader)
        torch.testing.assert_close(sums, plain("norm_sums")(grad, x, moments, reader), rtol=1e-4, atol=1e-3)
        dx = norm_operators.norm_input(grad, x, moments, 3 * sums, reader)
        expected = plain("norm_input")(grad, x, moments, 3 * sums, reader)
        torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)
        assert dx.stride() == x.stride()


@kernel
def test_nothing_is_left_of_a_tensor_without_values():
    x = torch.zeros(0, CHANNELS, 4, 4, device=DEVICE)
    (mean, inverse, scale, shift, _), step = affine()
    sums = torch.ops.aqdet.norm_sums(x, x, scale, shift, mean, inverse, step, 0, 3, 2)
    assert sums.shape == (2 * CHANNELS + 1,) and not sums.any()
    assert torch.ops.aqdet.norm_input(x, x, scale, shift, mean, inverse, step, 0, 3, 2, sums, None).shape == x.shape


def test_shapes_without_values():
    x = torch.empty(2, CHANNELS, 4, 4, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)
    c, step = torch.empty(CHANNELS, device="meta"), torch.empty((), device="meta")
    y = torch.ops.aqdet.normalize(x, c, c, True)
    sums = torch.ops.aqdet.norm_sums(x, x, c, c, c, c, step, 0, 3, 2)
    dx = torch.ops.aqdet.norm_input(x, x, c, c, c, c, step, 0, 3, 2, sums, None)
    assert sums.shape == (15,) and all(
        t.shape == x.shape and t.dtype == x.dtype and t.stride() == x.stride() for t in (y, dx)
    )
    out, count = torch.ops.aqdet.norm_moments(c[None], c[None], None, 32, c, c, None, None, None, 0.1, 1e-5)
    assert out.shape == (4, CHANNELS) and count.shape == ()


@pytest.mark.skipif(operators.IS_INTERPRETED, reason="the interpreter has this operator's place")
def test_on_a_cpu_the_operators_are_the_lean_formulas():
    x, grad = (t.cpu() for t in tensors())
    moments, step = (t if i else Moments(*(m.cpu() for m in t[:4]), None) for i, t in enumerate(affine()))
    mean, inverse, scale, shift, _ = moments
    shared = grad, x, scale, shift, mean, inverse, step.cpu(), 0, 3, 2
    sums = torch.ops.aqdet.norm_sums(*shared)
    dx = torch.ops.aqdet.norm_input(*shared, sums, None)
    weight = scale / inverse
    expected = plain("quantized_norm_gradients")(grad, x, weight, moments, 1e-5, None, step.cpu(), 0, 3, "lsq")
    found = dx, sums[CHANNELS:-1], sums[:CHANNELS], sums[-1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(CAN_RUN or not operators.HAS_TRITON, reason="the kernels run in this process, or Triton is missing")
def test_under_the_interpreter():
    run_interpreted(__file__)
