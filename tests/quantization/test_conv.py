import itertools

import pytest
import torch
import torch.nn.functional as F

from aqdet.quantization import (
    QuantSpec,
    build_quantizer,
    conv2d_fake_quantized,
    fake_quantize,
)

GEOMETRIES = [
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1},
    {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
    {"stride": (1, 1), "padding": (2, 2), "dilation": (2, 2), "groups": 2},
]


def leaves(bias=True, groups=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 9, 8, generator=generator).relu()
    weight = torch.randn(6, 4 // groups, 3, 3, generator=generator)
    scale = torch.tensor(0.2)
    values = [x, scale, weight] + ([torch.randn(6, generator=generator)] if bias else [])
    return [v.requires_grad_() for v in values]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("rule, bias", list(itertools.product(("lsq", "pact"), (True, False))))
def test_equals_fake_quantize_then_conv_bit_for_bit(geometry, rule, bias):
    results = []
    for fused in (False, True):
        x, scale, weight, *rest = values = leaves(bias, geometry["groups"])
        b = rest[0] if rest else None
        if fused:
            y = conv2d_fake_quantized(x, scale, weight, b, 0, 15, rule=rule, **geometry)
        else:
            y = F.conv2d(fake_quantize(x, scale, 0, 15, rule=rule), weight, b, **geometry)
        y.square().sum().backward()
        results.append([y, *(v.grad for v in values)])
    for index, (a, b) in enumerate(zip(*results, strict=True)):
        if index == 2 and rule == "pact":
            # The same terms in another order of summation.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ("lsq", "pact", "dorefa"))
def test_weights_quantized_inside_have_the_same_gradients(name):
    quantizer = build_quantizer(QuantSpec(name, 4, "weight", per_channel=True), num_channels=6)
    results = []
    for inside in (False, True):
        x, scale, weight, bias = values = leaves()
        if not quantizer.is_calibrated:
            quantizer.start_observing()
            quantizer(weight)
            quantizer.finish_calibration("mse")
        quantizer.zero_grad()
        extra = {}
        if inside:
            extra = {
                "quantize_weight": quantizer,
                "weight_parameters": tuple(quantizer.parameters()),
            }
        w = weight if inside else quantizer(weight)
        y = conv2d_fake_quantized(x, scale, w, bias, 0, 15, rule="lsq", **GEOMETRIES[0], **extra)
        y.square().sum().backward()
        results.append([y, *(v.grad for v in values), *(p.grad for p in quantizer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_frozen_operands_get_no_gradient():
    x, scale, weight, bias = leaves()
    y = conv2d_fake_quantized(x.detach(), scale.detach(), weight, bias, 0, 15, rule="lsq", **GEOMETRIES[0])
    y.sum().backward()
    assert x.grad is None and scale.grad is None and weight.grad is not None


def test_runs_in_bfloat16_on_the_same_codes():
    x, scale, weight, bias = leaves()
    y = conv2d_fake_quantized(
        x, scale, weight, bias, 0, 15, rule="lsq", dtype=torch.bfloat16, **GEOMETRIES[0]
    )
    expected = F.conv2d(
        fake_quantize(x, scale, 0, 15).bfloat16(), weight.bfloat16(), bias.bfloat16(), padding=1
    )
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and torch.isfinite(scale.grad)


def test_only_the_operands_are_kept_for_backward():
    x, scale, weight, bias = leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv2d_fake_quantized(x, scale, weight, bias, 0, 15, rule="lsq", **GEOMETRIES[0])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, scale, weight)}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, scale, 0, 15, rule="pact")
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() + 4


def test_padding_is_exactly_zero():
    x = torch.ones(1, 1, 1, 1)
    weight = torch.ones(1, 1, 3, 3)
    y = conv2d_fake_quantized(x, torch.tensor(0.3), weight, None, -8, 7, rule="lsq", **GEOMETRIES[0])
    assert y.item() == pytest.approx(0.9)
