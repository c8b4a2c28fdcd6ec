import pytest
import torch
from detectron2.layers import Conv2d
from helpers import QUANT, calibrated, gradients, make_batch, make_model

from aqdet.layers import QuantConv2d, StreamQuantizer, shared_weights
from aqdet.quantization import QuantSpec, calibrate

WEIGHT = QuantSpec("lsq", 4, "weight", per_channel=True)
INPUT = QuantSpec("lsq", 4, "input", signed=False)


def ready_conv(**kwargs):
    conv = Conv2d(3, 4, 3, padding=1, norm=torch.nn.BatchNorm2d(4), activation=torch.relu, **kwargs)
    layer = QuantConv2d.from_float(conv, WEIGHT, INPUT, "x")
    x = torch.rand(2, 3, 6, 6)
    calibrate(layer, lambda: layer(x))
    return conv, layer, x


def test_from_float_shares_parameters_and_draws_nothing():
    conv = Conv2d(3, 4, 3, norm=torch.nn.BatchNorm2d(4), activation=torch.relu, bias=False)
    before = torch.get_rng_state()
    layer = QuantConv2d.from_float(conv, WEIGHT, INPUT)
    assert torch.equal(before, torch.get_rng_state())
    assert layer.weight is conv.weight and layer.bias is None
    assert layer.norm is conv.norm and layer.activation is conv.activation
    with pytest.raises(ValueError, match="y: padding_mode 'reflect'"):
        other = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        QuantConv2d.from_float(other, WEIGHT, INPUT, "y")


def test_layer_is_quantize_conv_norm_activation():
    conv, layer, x = ready_conv()
    y = layer(x)
    w, a = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    expected = torch.relu(layer.norm(torch.conv2d(a, w, conv.bias, 1, 1)))
    assert torch.equal(y, expected)


def test_autocast_runs_the_convolution_in_bfloat16():
    _, layer, x = ready_conv()
    layer.norm = layer.activation = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_weights_shared_over_levels_have_the_same_gradients():
    batch = make_batch()
    model = calibrated(make_model(*QUANT), batch)
    for _ in range(3):
        gradients(model, batch)
    once = gradients(model, batch)
    type(model.head).forward, own = type(model.head).__mro__[1].forward, type(model.head).forward
    try:
        each = gradients(model, batch)
    finally:
        type(model.head).forward = own
    assert all(torch.equal(once[0][k], each[0][k]) for k in once[0])
    for name, grad in once[1].items():
        torch.testing.assert_close(grad, each[1][name], rtol=1e-4, atol=1e-5)
    with shared_weights(model.head):
        pass
    assert model.head.cls_score._shared_weight is None


@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_the_quantizer_of_a_relu_is_the_relu(name):
    stream = StreamQuantizer(relu=True)
    x = torch.randn(1000)
    assert torch.equal(stream(x), x.relu())
    stream.quantize(name, 8, "s")
    calibrate(stream, lambda: stream(x))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (parameter,) = stream.parameters()
    grad = torch.randn(1000)
    ours = stream(a)
    ours.backward(grad)
    first, parameter.grad = parameter.grad.clone(), None
    theirs = stream.quantizer(b.relu())
    theirs.backward(grad)
    assert torch.equal(ours, theirs) and torch.equal(a.grad, b.grad)
    torch.testing.assert_close(first, parameter.grad, rtol=1e-4, atol=1e-5)
