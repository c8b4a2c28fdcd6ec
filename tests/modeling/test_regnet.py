"""RegNetX as a ResNet of grouped bottleneck blocks: Detectron2's RegNet in float, and all that reads a ResNet."""

import re

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.regnet import (
    AnyNet,
    ResBottleneckBlock,
    SimpleStem,
    generate_regnet_parameters,
)
from helpers import AUX, QUANT, calibrated, gradients, make_batch, make_cfg, make_model
from torch import nn

from aqdet.analysis.plan import make_plan, total
from aqdet.layers import QuantConv2d
from aqdet.modeling import build_quant_resnet_backbone
from aqdet.modeling.backbone import feature_names
from aqdet.modeling.regnet import SIZES
from aqdet.modeling.scaffold import TAPS
from aqdet.quantization import quantizers, set_quantization

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = ("MODEL.RESNETS.REGNETX", "200MF")
ALL = ("MODEL.RESNETS.OUT_FEATURES", "['stem','res2','res3','res4','res5']")
BATCH = make_batch()


def their_regnet(size):
    """Detectron2's, with its own names."""
    torch.manual_seed(1)
    chosen = SIZES[size]
    return AnyNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depths=chosen.depths,
        widths=chosen.widths,
        group_widths=[chosen.group_width] * 4,
        strides=[2] * 4,
        bottleneck_ratios=[1.0] * 4,
        se_ratio=0.0,
        activation_class=lambda: nn.ReLU(inplace=True),
        out_features=["stem", "s1", "s2", "s3", "s4"],
    )


def renamed(state):
    """Their state dict under our names."""
    layers = {"proj": "shortcut.", "bn": "shortcut.norm.", "f.a": "conv1.", "f.a_bn": "conv1.norm.", "f.b": "conv2."}
    layers |= {"f.b_bn": "conv2.norm.", "f.c": "conv3.", "f.c_bn": "conv3.norm."}
    names = {}
    for key, value in state.items():
        stem = re.fullmatch(r"stem\.(conv|bn)\.(\w+)", key)
        if stem:
            names[f"stem.conv1.{'norm.' * (stem[1] == 'bn')}{stem[2]}"] = value
            continue
        stage, block, layer, name = re.fullmatch(r"s(\d)\.b(\d+)\.(.+)\.(\w+)", key).groups()
        names[f"res{int(stage) + 1}.{int(block) - 1}.{layers[layer]}{name}"] = value
    return names


def features_and_gradients(backbone):
    features = list(backbone(IMAGE).values())
    # Of the last one: where three layers read a tensor, the order in which their gradients are added differs.
    (features[-1] * torch.linspace(0, 1, features[-1].numel()).view_as(features[-1])).sum().backward()
    return features, {name: p.grad for name, p in backbone.named_parameters()}


# 400MF strides in its first stage without a change of channels.
@pytest.mark.parametrize("size", ["200MF", "400MF"])
def test_calibrated_and_switched_off_it_is_detectron2s(size):
    theirs = their_regnet(size)
    ours = build_quant_resnet_backbone(make_cfg(*QUANT, *ALL, "MODEL.RESNETS.REGNETX", size), ShapeSpec(channels=3))
    state = renamed(theirs.state_dict())
    own = tuple(f"{name}." for name, _ in quantizers(ours))
    assert {key for key in ours.state_dict() if not key.startswith(own)} == set(state)
    ours.load_state_dict(state, strict=False)
    set_quantization(ours, False)
    (a, expected), (b, grads) = features_and_gradients(theirs), features_and_gradients(ours)
    assert len(a) == len(b) == 5 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [shape.stride for shape in ours.output_shape().values()] == [2, 4, 8, 16, 32]
    expected = renamed(expected)
    assert all(torch.equal(grads[key], grad) for key, grad in expected.items())
    assert {key for key in grads if not key.startswith(own)} == set(expected)


def test_widths_and_depths_follow_the_papers_parameters():
    """Depth, w_0, w_a and w_m of each member; the sizes that torchvision has are compared with its weights, too."""
    parameters = {
        "200MF": (13, 24, 36.44, 2.49),
        "400MF": (22, 24, 24.48, 2.54),
        "600MF": (16, 48, 36.97, 2.24),
        "800MF": (16, 56, 35.73, 2.28),
        "1.6GF": (18, 80, 34.01, 2.25),
        "3.2GF": (25, 88, 26.31, 2.25),
    }
    assert set(parameters) == set(SIZES)
    for size, (depth, w_0, w_a, w_m) in parameters.items():
        chosen = SIZES[size]
        widths, depths = generate_regnet_parameters(w_a, w_0, w_m, depth)[:2]
        assert list(chosen.depths) == depths and sum(depths) == depth, size
        # Rounded to whole groups, from half a group up.
        group = chosen.group_width
        assert [int(width / group + 0.5) * group for width in widths] == list(chosen.widths), size


@pytest.mark.parametrize("taps", TAPS)
def test_the_path_starts_as_a_copy_and_learns(taps):
    model = make_model(*SMALL, *QUANT, *AUX, "MODEL.AUX.TAPS", taps, "MODEL.FPN.RELU", "True")
    assert model.auxiliary.initialize_from(model) == []
    if taps != "fpn":
        copy, own = model.auxiliary.trunk.bottom_up.res4[0].shortcut, model.backbone.bottom_up.res4[0].shortcut
        assert torch.equal(copy.weight, own.weight)
    calibrated(model, BATCH)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(isinstance(m, QuantConv2d) != name.startswith("auxiliary.") for name, m in convs.items())
    losses, grads = gradients(model, BATCH)
    assert all(torch.isfinite(value) for value in losses.values())
    assert set(grads) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_frozen_stages_and_the_plan():
    model = make_model(*SMALL, *QUANT, "MODEL.BACKBONE.FREEZE_AT", "2")
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad and name.endswith("conv1.weight")}
    assert fixed == {"backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res2.0.conv1.weight"}
    trunk = [row for row in make_plan(model, (224, 224)) if row.name.startswith("backbone.bottom_up.")]
    # The size's name, but for the classifier.
    assert 0.19e9 < total(trunk, "quantized").macs < 0.21e9


def test_features_and_refusals():
    assert feature_names(make_cfg(*SMALL)) == ["p3", "p4", "p5", "p6", "p7"]
    words = "MODEL.RESNETS.REGNETX must be one of 200MF, 400MF, .*, or '' for a ResNet, got '1GF'"
    with pytest.raises(ValueError, match=words) as error:
        make_model("MODEL.RESNETS.REGNETX", "1GF")
    assert "\n" not in str(error.value)
