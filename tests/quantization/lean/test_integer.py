import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from quantization.lean.test_conv import GEOMETRIES, fused, operands
from quantization.specs import NUM_CHANNELS, SPECS, data, ident, ready

from aqdet.layers import QuantConv2d
from aqdet.quantization import QuantSpec, calibrate
from aqdet.quantization.lean import conv
from aqdet.quantization.lean import integer as kernels
from aqdet.quantization.lean.integer import (
    IntegerWeight,
    integer_conv2d,
    largest_integer_weight,
    pack_weight,
)
from aqdet.quantization.lean.weight import integer_weight, recipe_of_weight

needs_integer = pytest.mark.skipif(not largest_integer_weight(255), reason="no integer convolution on this CPU")


@needs_integer
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("zero_point", (0, 8, 128))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("largest_input", (15, 255))
def test_integers_convolve_exactly(geometry, zero_point, layout, largest_input):
    geometry = GEOMETRIES[geometry]
    largest = largest_integer_weight(largest_input)
    codes = torch.randint(0, largest_input + 1, (2, 4, 9, 8)).contiguous(memory_format=layout)
    weight = torch.randint(-largest, min(largest + 1, 128), (8, 4 // geometry["groups"], 3, 3))
    codes[0], weight[0] = largest_input, -largest  # where two products are largest
    scale, bias = 2.0 ** torch.arange(-4, 4), torch.arange(8.0)
    packed = pack_weight(IntegerWeight(weight.to(torch.int8), scale), codes.shape, **geometry)
    y = integer_conv2d(codes.to(torch.uint8), zero_point, torch.tensor(0.5), packed, bias, **geometry)
    x, w = (codes - zero_point).double() * 0.5, weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(y, F.conv2d(x, w, bias.double(), **geometry).float())
    empty = integer_conv2d(codes[:0].to(torch.uint8), zero_point, torch.tensor(0.5), packed, bias, **geometry)
    assert empty.shape == (0, *y.shape[1:])


@pytest.mark.parametrize("spec", [s for s in SPECS if s.role == "weight"], ids=ident)
def test_the_integer_weight_is_the_fake_quantized_one(spec):
    quantizer = ready(spec)
    w = data(spec, 3)
    integer = integer_weight(quantizer, w)
    if spec.quantizer == "dorefa" and spec.num_bits == 8:  # odd codes up to 255
        assert integer is None
        return
    assert integer.codes.dtype == torch.int8 and integer.scale.shape == (NUM_CHANNELS,)
    assert torch.equal(integer.codes * integer.scale.view(-1, 1, 1, 1), quantizer(w))
    half = 2 ** (spec.num_bits - 1)
    largest = {"dorefa": 2 * half - 1, "pact": half - 1}.get(spec.quantizer, half)
    assert torch.equal(integer_weight(quantizer, w, largest).codes, integer.codes)
    assert integer_weight(quantizer, w, largest - 1) is None
    quantizer.enabled = False
    assert integer_weight(quantizer, w) is None


@pytest.mark.parametrize(
    "capabilities, exact, largest",
    [
        ({"avx512_vnni": True, "avx2": True}, True, {15: 128, 255: 128}),
        ({"avx_vnni": True, "avx2": True}, True, {15: 128, 255: 128}),
        ({"avx2": True}, True, {3: 128, 15: 128, 127: 128, 128: 127, 254: 64, 255: 64}),
        ({"avx2": True}, False, {15: 0, 255: 0}),
        ({"neon": True}, True, {15: 0, 255: 0}),
    ],
    ids=str,
)
def test_weights_are_as_large_as_the_cpu_multiplies_exactly(capabilities, exact, largest, monkeypatch):
    def convolve(x, zero_point, scale, weight, *_):
        return (x.int() * weight.codes.int()).sum((1, 2, 3)).float() + (not exact)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(kernels, "integer_conv2d", convolve)
    monkeypatch.setattr(kernels, "pack_weight", lambda weight, *_: weight)
    kernels._largest_beside_uint8.cache_clear()
    try:
        assert {x: largest_integer_weight(x) for x in largest} == largest
    finally:
        kernels._largest_beside_uint8.cache_clear()


@needs_integer
@pytest.mark.parametrize("rule", ("lsq", "pact"))
@pytest.mark.parametrize("low, high", [(0, 15), (-8, 7), (0, 255)])
def test_gradients_are_those_of_the_float_convolution(rule, low, high):
    """To the bit: backward is the same, and the output differs by rounding only."""
    quantizer = ready(QuantSpec("lsq", 4, "weight", per_channel=False), operands()["weight"])
    grad = torch.randn(2, 8, 9, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for integer in (False, True):
        values = operands()
        quantizer.zero_grad()
        x, scale, weight, bias = values.values()
        options = {"gradient": rule}
        if integer:
            options["packed"] = pack_weight(integer_weight(quantizer, weight), x.shape, **GEOMETRIES["3x3"])
            alive = weakref.ref(options["packed"].codes)
        y = fused(x, scale, recipe_of_weight(quantizer, weight), bias, low, high, **options)
        if integer:
            del options["packed"]
            gc.collect()
            assert alive() is None  # not kept for backward
        y.backward(grad)
        results.append([y, quantizer.scale.grad.clone(), *(v.grad for v in values.values())])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def layer(weight="lsq"):
    specs = QuantSpec(weight, 4, "weight", per_channel=True), QuantSpec("lsq", 4, "input", signed=False)
    layer = QuantConv2d.from_float(Conv2d(3, 4, 3, padding=1), *specs)
    x = torch.rand(2, 3, 6, 6)
    calibrate(layer, lambda: layer(x))
    return layer, x


@needs_integer
@pytest.mark.parametrize("method", ("lsq", "pact", "dorefa"))
def test_a_layer_uses_integers_in_float32_training_alone(method, monkeypatch):
    convolution, x = layer(method)
    calls = []
    monkeypatch.setattr(conv, "pack_weight", lambda *args: calls.append(args) or pack_weight(*args))
    y = convolution(x)
    assert len(calls) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        convolution(x)
    evaluated = convolution.eval()(x)
    monkeypatch.setattr(conv, "largest_integer_weight", lambda _: 0)
    assert torch.equal(convolution.train()(x), evaluated)
    convolution.double()(x.double())
    assert len(calls) == 1
    torch.testing.assert_close(y, evaluated, rtol=1e-6, atol=1e-6)
    assert torch.equal(evaluated, F.conv2d(*(q(t) for q, t in quantized(convolution, x)), convolution.bias, padding=1))


def quantized(convolution, x):
    convolution.float()
    return (convolution.input_quantizer, x), (convolution.weight_quantizer, convolution.weight)
