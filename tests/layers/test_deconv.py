import pytest
import torch
import torch.nn.functional as F
from helpers import QUANT, make_cfg
from torch import nn

from aqdet.analysis.plan import make_plan
from aqdet.layers import QuantConvTranspose2d, declare_site
from aqdet.modeling import QuantPolicy
from aqdet.quantization import QuantSpec, calibrate

INPUT = QuantSpec("lsq", 4, "input", signed=False)


def ready(per_channel=True, method="lsq", **geometry):
    torch.manual_seed(0)  # weights of which PACT's range clips some: its parameter has a gradient
    deconv = nn.ConvTranspose2d(3, 5, **geometry)
    layer = QuantConvTranspose2d.from_float(deconv, QuantSpec(method, 4, "weight", per_channel=per_channel), INPUT)
    x = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    calibrate(layer, lambda: layer(x))
    return deconv, layer, x


@pytest.mark.parametrize("per_channel", (True, False))
@pytest.mark.parametrize("method", ("lsq", "pact", "dorefa", "lsqodd"))
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
        {"kernel_size": 3, "dilation": 2},
    ],
    ids=str,
)
def test_layer_is_quantize_then_transposed_convolution(per_channel, method, geometry):
    deconv, layer, x = ready(per_channel, method, **geometry)
    weight, a = layer.quantized_weight(), layer.input_quantizer(x)
    # Each output channel, the second axis of the weight, is on a grid of its own.
    rows = weight.detach().transpose(0, 1) if per_channel else weight.detach()[None]
    assert all(len(row.unique()) <= 16 for row in rows)
    assert weight.shape == deconv.weight.shape and layer.weight is deconv.weight and layer.bias is deconv.bias
    rest = {key: value for key, value in geometry.items() if key not in ("kernel_size", "bias")}
    expected = F.conv_transpose2d(a, weight, deconv.bias, **rest)
    y = layer(x)
    assert torch.equal(y, expected) and y.shape == deconv(x).shape
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_2x2_of_stride_2_is_a_1x1_convolution_and_depth_to_space():
    _, layer, x = ready(kernel_size=2, stride=2)
    weight = layer.quantized_weight().permute(1, 2, 3, 0).reshape(-1, 3, 1, 1)
    y = F.pixel_shuffle(F.conv2d(layer.input_quantizer(x), weight), 2) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), y)


def test_what_it_cannot_is_refused():
    deconv = nn.ConvTranspose2d(4, 4, 2, groups=2)
    with pytest.raises(ValueError, match="with 2 groups cannot be quantized"):
        QuantConvTranspose2d.from_float(deconv, QuantSpec("lsq", 4, "weight"), INPUT)
    _, layer, x = ready(kernel_size=2, stride=2)
    with pytest.raises(ValueError, match="output_size must be None"):
        layer(x, [12, 14])


def test_the_policy_converts_it_and_no_layer_with_a_weight_is_skipped():
    policy = QuantPolicy.from_config(make_cfg(*QUANT))
    head = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ReLU())
    with pytest.raises(ValueError, match=r"layer mask.0 \(ConvTranspose2d\) has no declared quantization site"):
        policy.apply(head, "mask.")
    declare_site(head[0], signed=False)
    policy.apply(head, "mask.")
    assert type(head[0]) is QuantConvTranspose2d and head[0].weight_quantizer.spec.num_bits == 4
    for other in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.Embedding(2, 2), nn.Bilinear(2, 2, 2)):
        words = (
            rf"layer x.0 \({type(other).__name__}\) has a weight and no quantized form, which Conv2d, ConvTranspose2d"
        )
        with pytest.raises(ValueError, match=words):
            policy.apply(nn.Sequential(other), "x.")
        with pytest.raises(ValueError, match=rf"layer 0 \({type(other).__name__}\) has no declared"):
            policy.check_rules(nn.Sequential(other))
    policy.apply(nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.PReLU(3)), "x.")


def test_a_rule_leaves_a_layer_without_a_quantized_form_in_float(caplog):
    cfg = make_cfg(*QUANT)
    cfg.MODEL.QUANT.RULES = [["embedding", {"ENABLED": False}]]
    model = nn.ModuleDict({"embedding": nn.Embedding(2, 2)})
    policy = QuantPolicy.from_config(cfg)
    policy.apply(model, "")
    policy.check_rules(model)
    assert "embedding stays in float by MODEL.QUANT.RULES" in caplog.text


class Net(nn.Module):
    """As little as a plan needs."""

    def __init__(self, layer):
        super().__init__()
        from aqdet.modeling.scaffold import Scaffold

        self.backbone, self.head, self.scaffold = _Backbone(), nn.Sequential(layer), Scaffold()
        self.head_in_features = ["p3"]


class _Backbone(nn.Module):
    def forward(self, x):
        return {"p3": x}


class _OnFirst(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, levels):
        return self.layer(levels[0])


def test_its_multiplications_are_counted():
    model = Net(_OnFirst(nn.ConvTranspose2d(3, 5, 2, stride=2)))
    (row,) = make_plan(model, (4, 6))
    # Each of the inputs is multiplied into a 2x2 patch of each output channel.
    assert (row.kind, row.macs) == ("deconv", 3 * 4 * 6 * 5 * 2 * 2)
    with pytest.raises(ValueError, match=r"layer head.0.layer \(Bilinear\) has a weight, and there is no plan"):
        make_plan(Net(_OnFirst(nn.Bilinear(2, 2, 2))), (4, 6))
