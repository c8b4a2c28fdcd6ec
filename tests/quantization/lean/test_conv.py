import itertools

import pytest
import torch
import torch.nn.functional as F
from quantization.specs import ready
from torch.utils.checkpoint import checkpoint

from aqdet.quantization import AffineGrid, QuantSpec, fake_quantize
from aqdet.quantization.lean.conv import Geometry, quantized_conv2d
from aqdet.quantization.lean.weight import WeightRecipe, kept_weight, recipe_of_weight

GEOMETRIES = {
    "3x3": {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1},
    "strided": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 1), "groups": 1},
    "dilated, grouped": {"stride": (1, 1), "padding": (2, 2), "dilation": (2, 2), "groups": 2},
    "depthwise": {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 4},
}
PLAIN = GEOMETRIES["3x3"]
OPERANDS = ("x", "scale", "weight", "bias")


def operands(groups=1, dtype=torch.float32, batch=2, needed=OPERANDS, bias=True):
    """``x (batch, 4, 9, 8)``, scale, weight ``(8, 4 / groups, 3, 3)`` and bias, fresh leaves."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "x": torch.randn(batch, 4, 9, 8, generator=generator),
        "scale": torch.tensor(0.2),
        "weight": torch.randn(8, 4 // groups, 3, 3, generator=generator).to(dtype),
        "bias": torch.randn(8, generator=generator).to(dtype) if bias else None,
    }
    for name in needed:
        if values[name] is not None:
            values[name].requires_grad_()
    return values


def fused(x, scale, weight, bias, low=0, high=15, *, gradient="lsq", geometry=PLAIN, **options):
    weight = weight if isinstance(weight, WeightRecipe) else kept_weight(weight)
    return quantized_conv2d(
        x, AffineGrid(scale, low, high), weight, bias, Geometry(**geometry), gradient=gradient, **options
    )


def run(values, rule, geometry, is_fused, low=0, high=15, **options):
    """Output and gradients of the convolution, fused or from its two parts."""
    x, scale, weight, bias = values.values()
    if is_fused:
        y = fused(x, scale, weight, bias, low, high, gradient=rule, geometry=geometry, **options)
    else:
        y = F.conv2d(fake_quantize(x, scale, low, high, gradient=rule).to(weight.dtype), weight, bias, **geometry)
    y.float().square().sum().backward()
    return {"y": y, **{name: None if v is None else v.grad for name, v in values.items()}}


def check_equal(actual, expected, rule):
    for name, want in expected.items():
        got = actual[name]
        if want is None:
            assert got is None, name
        elif name == "scale" and rule == "pact":
            # The same terms, summed in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(got, want) and got.dtype == want.dtype, name


both_rules = pytest.mark.parametrize("rule", ("lsq", "pact"))


@both_rules
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("low, high", [(0, 15), (-8, 7)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_equals_fake_quantize_then_conv_bit_for_bit(rule, geometry, bias, low, high, dtype):
    geometry = GEOMETRIES[geometry]
    expected, actual = (
        run(operands(geometry["groups"], dtype, bias=bias), rule, geometry, f, low, high) for f in (False, True)
    )
    assert actual["y"].dtype == dtype
    check_equal(actual, expected, rule)


@both_rules
@pytest.mark.parametrize(
    "needed",
    [c for n in range(1, 5) for c in itertools.combinations(OPERANDS, n)],
    ids="+".join,
)
def test_any_operand_may_be_frozen(rule, needed):
    expected, actual = (run(operands(needed=needed), rule, PLAIN, f) for f in (False, True))
    assert {name for name in OPERANDS if actual[name] is not None} == set(needed)
    check_equal(actual, expected, rule)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("batch", (0, 1))
def test_memory_layouts_and_an_empty_batch(layout, batch):
    results = []
    for is_fused in (False, True):
        values = operands(batch=batch)
        values["x"] = values["x"].detach().contiguous(memory_format=layout).requires_grad_()
        results.append(run(values, "lsq", PLAIN, is_fused))
    assert results[1]["y"].shape == (batch, 8, 9, 8)
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=1e-5, atol=1e-4)


@both_rules
def test_runs_in_bfloat16_on_the_same_codes(rule):
    values = operands()
    actual = run(values, rule, PLAIN, True, dtype=torch.bfloat16)
    x, scale, weight, bias = operands().values()
    y = F.conv2d(fake_quantize(x, scale, 0, 15).bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1)
    assert torch.equal(actual["y"], y) and y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in values.values())
    assert torch.equal(values["weight"].grad, weight.grad)
    assert torch.equal(values["bias"].grad, bias.grad)
    torch.testing.assert_close(values["x"].grad, x.grad, rtol=0.02, atol=0.02)


def test_half_precision_input_is_quantized_in_float32():
    values = operands()
    x, scale, weight, bias = values.values()
    half = x.detach().half().requires_grad_()
    y = fused(half, scale, weight, bias)
    assert torch.equal(y, F.conv2d(fake_quantize(half.float(), scale, 0, 15), weight, bias, padding=1))
    y.sum().backward()
    assert half.grad.dtype == torch.float16


def with_quantized_weight(quantizer, x, scale, weight, bias):
    """The convolution with a weight that is quantized, and that backward quantizes again."""
    return fused(x, scale, recipe_of_weight(quantizer, weight), bias)


@pytest.mark.parametrize("name", ("lsq", "pact", "dorefa"))
@pytest.mark.parametrize("through", ("plain", "checkpoint", "hooks"))
@pytest.mark.parametrize("needed", (OPERANDS, ("x",), ("weight",)), ids="+".join)
def test_weights_that_are_quantized_again_have_the_same_gradients(name, through, needed):
    """Also where something else looks after what backward needs: checkpointing, saved-tensor hooks."""
    quantizer = ready(QuantSpec(name, 4, "weight"), operands()["weight"])
    results = []
    for is_fused in (False, True):
        values = operands(needed=needed)
        x, scale, weight, bias = values.values()
        quantizer.zero_grad()
        if not is_fused:
            y = F.conv2d(fake_quantize(x, scale, 0, 15), quantizer(weight), bias, padding=1)
        elif through == "checkpoint":
            y = checkpoint(with_quantized_weight, quantizer, x, scale, weight, bias, use_reentrant=False)
        elif through == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
                y = with_quantized_weight(quantizer, x, scale, weight, bias)
        else:
            y = with_quantized_weight(quantizer, x, scale, weight, bias)
        y.square().sum().backward()
        grads = {f"quantizer.{n}": p.grad.clone() for n, p in quantizer.named_parameters()}
        results.append({"y": y, **{n: v.grad for n, v in values.items()}, **grads})
    check_equal(results[1], results[0], "lsq")


def test_a_frozen_weight_quantizer_gets_no_gradient():
    values = operands()
    quantizer = ready(QuantSpec("lsq", 4, "weight"), values["weight"].detach()).requires_grad_(False)
    with_quantized_weight(quantizer, *values.values()).sum().backward()
    assert quantizer.scale.grad is None and values["weight"].grad.abs().sum() > 0


def test_changing_the_weight_before_backward_is_an_error():
    values = operands()
    quantizer = ready(QuantSpec("lsq", 4, "weight"), values["weight"].detach())
    y = with_quantized_weight(quantizer, *values.values())
    with torch.no_grad():
        values["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ("lsq", "pact", "dorefa"))
def test_only_the_operands_are_kept_for_backward(name):
    values = operands()
    values["weight"] = torch.nn.Parameter(values["weight"].detach())
    quantizer = ready(QuantSpec(name, 4, "weight"), values["weight"].detach())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with_quantized_weight(quantizer, *values.values())
    large = {t.untyped_storage().data_ptr() for t in kept if t.numel() > 1}
    assert large == {values[key].untyped_storage().data_ptr() for key in ("x", "weight")}


def test_padding_is_exactly_zero():
    scale, weight = torch.tensor(0.3), torch.full((1, 1, 3, 3), 100.0)
    weight[..., 1, 1] = 1
    for low, high in ((-8, 7), (0, 15)):
        y = fused(torch.ones(1, 1, 1, 1), scale, weight, None, low, high)
        assert y.item() == 3 * scale.item()


@both_rules
@pytest.mark.parametrize("quantized_again", (False, True))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_the_convolution_runs_in_the_dtype_it_is_given(rule, dtype, quantized_again):
    """Autocast changes nothing; the backward runs outside of it, as it should."""
    results = []
    for autocast in (False, True):
        x, scale, weight, bias = operands().values()
        quantizer = ready(QuantSpec("lsq", 4, "weight"), weight.detach())
        operand = recipe_of_weight if quantized_again else lambda quantizer, weight: quantizer(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = fused(x, scale, operand(quantizer, weight), bias, -8, 7, gradient=rule, dtype=dtype)
        y.float().square().sum().backward()
        results.append([y, *(leaf.grad for leaf in (x, scale, weight, bias, quantizer.scale))])
    plain, cast = results
    assert cast[0].dtype == (dtype or torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))
    assert all(grad.dtype == torch.float32 for grad in cast[1:])
