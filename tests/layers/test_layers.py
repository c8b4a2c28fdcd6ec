import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from helpers import QUANT, calibrated, gradients, make_batch, make_model

from aqdet.layers import QuantAdd, QuantConv2d, StreamQuantizer, shared_weights
from aqdet.quantization import QuantSpec, calibrate

WEIGHT = QuantSpec("lsq", 4, "weight", per_channel=True)
INPUT = QuantSpec("lsq", 4, "input", signed=False)


def ready_conv(**kwargs):
    conv = Conv2d(3, 4, 3, padding=1, norm=torch.nn.BatchNorm2d(4), activation=torch.relu, **kwargs)
    layer = QuantConv2d.from_float(conv, WEIGHT, INPUT)
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
    with pytest.raises(ValueError, match="padding_mode 'reflect'"):
        other = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
        QuantConv2d.from_float(other, WEIGHT, INPUT)


def test_layer_is_quantize_conv_norm_activation():
    conv, layer, x = ready_conv()
    y = layer(x)
    w, a = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    expected = torch.relu(layer.norm(torch.conv2d(a, w, conv.bias, 1, 1)))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    layer.eval()
    expected = torch.relu(layer.norm(torch.conv2d(a, w, conv.bias, 1, 1)))
    assert torch.equal(layer(x), expected)


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
    type(model.head).forward, own = RetinaNetHead.forward, type(model.head).forward
    try:
        each = gradients(model, batch)
    finally:
        type(model.head).forward = own
    assert all(torch.equal(once[0][k], each[0][k]) for k in once[0])
    for name, grad in once[1].items():
        torch.testing.assert_close(grad, each[1][name], rtol=1e-4, atol=1e-5)
    with shared_weights(model.head):
        pass
    assert model.head.cls_score.shared_weight is None


@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_the_quantizer_of_a_relu_is_the_relu(name):
    stream = StreamQuantizer(relu=True)
    x = torch.randn(1000)
    assert torch.equal(stream(x), x.relu())
    stream.quantize(name, 8)
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


def test_weights_are_not_kept_when_quantizing_one_of_them_fails():
    layers = [QuantConv2d.from_float(Conv2d(2, 2, 1), WEIGHT, None) for i in range(2)]
    head = torch.nn.Sequential(*layers)
    calibrate(layers[0], lambda: layers[0](torch.rand(1, 2, 3, 3)))
    with pytest.raises(RuntimeError, match="'LSQQuantizer' is not calibrated"), shared_weights(head):
        pass
    assert [layer.shared_weight for layer in layers] == [None, None]


def test_padding_by_name_is_refused_before_it_fails_in_backward():
    with pytest.raises(ValueError, match="padding 'same'"):
        QuantConv2d.from_float(torch.nn.Conv2d(1, 1, 3, padding="same"), WEIGHT, INPUT)


@pytest.mark.parametrize("method", ["lsq", "pact", "dorefa"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("geometry", [{"stride": 2}, {"dilation": 2, "groups": 2}])
def test_padding_is_zero_after_quantization(method, signed, geometry):
    conv = torch.nn.Conv2d(2, 4, 3, padding=(2, 1), **geometry)
    specs = QuantSpec(method, 4, "weight", per_channel=True), QuantSpec(method, 4, "input", signed=signed)
    layer = QuantConv2d.from_float(conv, *specs)
    x = torch.rand(2, 2, 7, 6, generator=torch.Generator().manual_seed(1)) + 3  # no value near zero
    calibrate(layer, lambda: layer(x))
    padded = torch.nn.functional.pad(layer.input_quantizer(x), (1, 1, 2, 2))
    expected = torch.nn.functional.conv2d(padded, layer.weight_quantizer(conv.weight), conv.bias, **geometry)
    torch.testing.assert_close(layer(x), expected)
    assert len(layer.input_quantizer(x).unique()) <= 16


def test_mode_of_the_float_layer_is_kept():
    conv = Conv2d(2, 2, 1, norm=torch.nn.BatchNorm2d(2)).eval()
    layer = QuantConv2d.from_float(conv, WEIGHT, INPUT)
    assert not layer.training and not layer.norm.training and not layer.weight_quantizer.training


def test_the_stem_has_no_input_quantizer_and_its_weight_is_quantized():
    layer = QuantConv2d.from_float(torch.nn.Conv2d(3, 2, 3), QuantSpec("lsq", 2, "weight"), None)
    x = torch.randint(0, 256, (1, 3, 5, 5)).float()
    calibrate(layer, lambda: layer(x))
    assert layer.input_quantizer is None and len(layer.weight_quantizer(layer.weight).unique()) <= 4
    expected = torch.conv2d(x, layer.weight_quantizer(layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0 and layer.weight_quantizer.scale.grad is not None


def test_add_quantizes_the_operands_that_are_not_on_a_grid_yet():
    add, x, y = QuantAdd(signed=(True, None)), torch.randn(500), torch.rand(500)
    assert torch.equal(add(x, y), x + y)
    add.quantize("lsq", 3)
    calibrate(add, lambda: add(x, y))
    assert add.y_quantizer is None and add.x_quantizer.spec.signed
    on_grid = add(x, torch.zeros(500))
    assert 4 < len(on_grid.unique()) <= 8 and torch.equal(add(x, y), on_grid + y)
    both = QuantAdd(signed=(True, False))
    both.quantize("pact", 2)
    assert both.x_quantizer.spec.signed and not both.y_quantizer.spec.signed


def test_a_stream_after_a_relu_is_unsigned_whatever_is_said():
    stream = StreamQuantizer(relu=True, signed=True)
    stream.quantize("lsq", 8)
    assert not stream.quantizer.spec.signed
    assert StreamQuantizer(relu=False, signed=True).signed
    with pytest.raises(RuntimeError, match="'LSQQuantizer' is not calibrated"):
        stream(torch.rand(3))
    stream.quantizer.enabled = False
    assert stream(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
