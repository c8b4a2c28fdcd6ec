"""b bits are b bits in half precision: no two codes have the same value, and no layer rounds its operands."""

import contextlib

import pytest
import torch
from quantization.specs import ident
from torch import nn

from aqdet.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear, shared_weights
from aqdet.quantization import QuantSpec, build_quantizer, calibrate, use_kernels
from aqdet.quantization.functional import integer_range, value_dtype

SPECS = [
    QuantSpec(method, bits, "input", signed=signed)
    for method, signed in (("lsq", False), ("pact", False), ("dorefa", True), ("lsqplus", True), ("n2uq", False))
    for bits in (4, 8)
]
HALVES = torch.bfloat16, torch.float16


def values(spec):
    """The value of every code, as float32."""
    low, high = integer_range(spec.num_bits, spec.signed)
    return torch.arange(low, high + 1) * 0.37


def ready(spec, x):
    quantizer = build_quantizer(spec)
    calibrate(quantizer, lambda: quantizer(x), method="minmax")
    return quantizer


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_precision_tells_neighbours_apart(dtype):
    for low, high in ((0, 255), (-128, 127), (0, 127), (-8, 7), (0, 1023)):
        chosen = value_dtype(dtype, low, high)
        codes = torch.arange(low, high + 1)
        for scale in torch.logspace(-2, 0, 61):
            assert len((codes * scale).to(chosen).unique()) == len(codes)
        collide = any(len((codes * s).to(dtype).unique()) < len(codes) for s in torch.logspace(-2, 0, 61))
        assert (chosen == torch.float32) == collide


@pytest.mark.parametrize("kernels", ("plain", "lean", "fused"))
@pytest.mark.parametrize("spec", SPECS, ids=ident)
def test_values_are_codes_times_the_scale(spec, kernels):
    x = values(spec).bfloat16().requires_grad_()
    quantizer = ready(spec, x.detach())
    with use_kernels(kernels):
        y = quantizer(x)
    exact = quantizer.to_integer(x.detach()).dequantize()
    assert y.dtype == quantizer.value_dtype(torch.bfloat16) and torch.equal(y.float(), exact.to(y.dtype).float())
    assert len(y.unique()) == len(exact.unique())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


LAYERS = {
    "conv": (QuantConv2d, nn.Conv2d(3, 4, 3, padding=1)),
    "linear": (QuantLinear, nn.Linear(6, 4)),
    "deconv": (QuantConvTranspose2d, nn.ConvTranspose2d(3, 4, 2, stride=2)),
}


@pytest.mark.parametrize("shared", (False, True), ids=("", "shared"))
@pytest.mark.parametrize("kernels", ("plain", "lean"))
@pytest.mark.parametrize("method, signed", [("lsq", False), ("lsqplus", True)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_8_bits_keeps_float32_in_bfloat16(name, method, signed, kernels, shared):
    kind, source = LAYERS[name]
    layer = kind.from_float(source, QuantSpec("lsq", 8, "weight"), QuantSpec(method, 8, "input", signed=signed))
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) - 0.3 * signed
    calibrate(layer, lambda: layer(x), method="minmax")
    found = []
    for kernels_in_use, is_half in (("plain", False), (kernels, True)):
        x_half = x.bfloat16().requires_grad_()
        layer.zero_grad()
        sharing = shared_weights(layer) if shared else contextlib.nullcontext()
        with use_kernels(kernels_in_use), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half), sharing:
            y = layer(x_half if is_half else x_half.float())
        y.square().sum().backward()
        assert y.dtype == torch.float32
        found.append([y.detach(), x_half.grad, *(p.grad.clone() for p in layer.parameters())])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_of_4_bits_runs_in_the_precision_around_it():
    layer = QuantConv2d.from_float(LAYERS["conv"][1], QuantSpec("lsq", 4, "weight"), QuantSpec("lsq", 4, "input"))
    x = torch.randn(2, 3, 6, 6)
    calibrate(layer, lambda: layer(x))
    for dtype in HALVES:
        with torch.autocast("cpu", dtype=dtype):
            assert layer(x).dtype == dtype
