"""Element-wise kernels: in parts, as bytes, and what they keep for backward."""

import pytest
import torch

from aqdet.quantization import fake_quantize, functional
from aqdet.quantization.lean.elementwise import quantize_to_bytes, scale_gradients
from aqdet.quantization.lean.recipe import Recipe


@pytest.mark.parametrize("gradient", ("lsq", "pact"))
@pytest.mark.parametrize("shape", ((), (600, 1), (1, 600), (600,), (1, 1)))
def test_a_large_tensor_is_worked_in_parts_with_the_same_gradients(gradient, shape):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 600, 600, generator=generator)
    scale = torch.rand(shape, generator=generator) + 0.1
    dx, dscale = scale_gradients(grad, x, scale, -8, 7, gradient, torch.float32)
    other_dx, other_dscale = functional.scale_gradients(grad, x, scale, -8, 7, gradient)
    assert torch.equal(dx, other_dx)
    assert dscale.shape == shape
    torch.testing.assert_close(dscale, other_dscale, rtol=1e-4, atol=2e-2)


def test_what_is_kept_for_backward():
    x = torch.randn(3, 50, requires_grad=True)
    scale = torch.tensor(0.2, requires_grad=True)
    for gradient, saved in (("lsq", {x.data_ptr(), scale.data_ptr()}), ("pact", None)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=kept: to.append(t) or t, lambda t: t):
            fake_quantize(x if gradient == "lsq" else x * 1, scale, 0, 15, gradient=gradient)
        if saved is not None:
            assert {t.data_ptr() for t in kept} == saved
        else:
            assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + scale.element_size()


def test_a_parameter_is_kept_itself():
    w, scale = torch.nn.Parameter(torch.randn(3, 50)), torch.tensor(0.2, requires_grad=True)
    for gradient in functional.GRADIENTS:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=kept: to.append(t) or t, lambda t: t):
            fake_quantize(w, scale, -8, 7, gradient=gradient)
        assert {t.data_ptr() for t in kept} == {w.data_ptr(), scale.data_ptr()}


@pytest.mark.parametrize("low, high", [(0, 3), (0, 127), (0, 255), (-8, 7), (-7, 7), (-128, 127)])
@pytest.mark.parametrize("size", (60, 600_000))
def test_codes_as_bytes(low, high, size):
    x, scale = torch.randn(2, size // 2) * 0.4 * high, torch.tensor(0.5)
    x[0, :2] = torch.tensor([-1e9, 1e9])
    expected = (x / scale).round().clamp(low, high) - low
    assert torch.equal(quantize_to_bytes(Recipe(x), scale, low, high).float(), expected)
    assert torch.equal(quantize_to_bytes(Recipe(x.t()), scale, low, high).float(), expected.t())


@pytest.mark.parametrize("shape", [(3, 4, 150, 170), (700, 14, 6, 7)], ids=str)
@pytest.mark.parametrize("gradient", ("lsq", "pact"))
@pytest.mark.parametrize("layout", ("contiguous", "channels last", "with gaps", "mixed"))
def test_large_tensors_in_parts_follow_the_formula(shape, gradient, layout):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout != "contiguous":
        grad = grad.contiguous(memory_format=torch.channels_last)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "with gaps":
        x, grad = x[..., 1:], grad[..., 1:]
    for scale in (torch.tensor(0.25), 2.0 ** torch.randint(-4, 1, (shape[0], 1, 1, 1), generator=generator)):
        leaf, bound = x.detach().requires_grad_(), scale.clone().requires_grad_()
        y = fake_quantize(leaf, bound, -8, 7, gradient=gradient)
        y.backward(grad)
        ratio = x / scale
        codes = ratio.round().clamp(-8, 7)
        inside = (ratio > -8) & (ratio < 7)
        assert torch.equal(y, codes * scale) and torch.equal(leaf.grad, grad * inside)
        slope = torch.where(inside, codes - ratio if gradient == "lsq" else 0.0, codes)
        torch.testing.assert_close(bound.grad, (grad * slope).sum_to_size(scale.shape), rtol=1e-4, atol=2e-2)
