"""The backbone alone: Detectron2's in float, its structure, and what it refuses."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from helpers import QUANT, make_cfg
from torch import nn

from aqdet.layers import QuantConv2d, StreamQuantizer
from aqdet.modeling.blocks import QuantBasicBlock, QuantStem
from aqdet.quantization import calibrate, quantizers, set_quantization

R50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
GROUPS = ("MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.RESNETS.WIDTH_PER_GROUP", "16")
RELU = ("MODEL.FPN.RELU", "True")
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make_backbone(*overrides, theirs=False, name=None):
    cfg = make_cfg(*overrides, theirs=theirs)
    if name:
        cfg.MODEL.BACKBONE.NAME = name
    torch.manual_seed(0)
    return build_backbone(cfg, ShapeSpec(channels=3))


def ready(backbone):
    def run():
        with torch.no_grad():
            backbone(IMAGE)

    calibrate(backbone, run, method="minmax")
    return backbone


def features_and_gradients(backbone):
    backbone.zero_grad()
    features = backbone(IMAGE)
    sum((f * torch.linspace(0, 1, f.numel()).view_as(f)).sum() for f in features.values()).backward()
    return features, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "extra",
    [
        ("MODEL.RESNETS.DEPTH", "34", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32"),
        ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.FPN.NORM", ""),
        (*R50, "MODEL.RESNETS.STRIDE_IN_1X1", "False", *GROUPS),
    ],
    ids=["r34-gn", "r18-frozen", "r50-groups"],
)
def test_calibrated_and_switched_off_it_is_detectron2s(extra):
    theirs, ours = make_backbone(*extra, theirs=True), make_backbone(*QUANT, *extra)
    ready(ours)
    _, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    on = ours(IMAGE)
    set_quantization(ours, False)
    (a, expected), (b, grads) = features_and_gradients(theirs), features_and_gradients(ours)
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert set(grads) == set(expected) and all(torch.equal(grads[k], expected[k]) for k in expected)
    assert not any(torch.equal(on[k], a[k]) for k in a)
    shapes = [{k: vars(v) for k, v in model.output_shape().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1] and ours.size_divisibility == theirs.size_divisibility


def test_weights_of_frozen_stages_stay_frozen_when_they_are_quantized():
    model = ready(make_backbone(*QUANT, "MODEL.BACKBONE.FREEZE_AT", "2"))
    _, grads = features_and_gradients(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {n.split(".")[1] for n in frozen if n.endswith("weight")} == {"stem", "res2"}
    assert not set(frozen) & set(grads)
    assert "bottom_up.res3.0.conv1.weight" in grads


def test_resnet_alone_has_detectron2s_names():
    theirs = make_backbone(theirs=True, name="build_resnet_backbone")
    ours = make_backbone(*QUANT, name="build_quant_resnet_backbone")
    names = tuple(f"{name}." for name, _ in quantizers(ours))
    extra = set(ours.state_dict()) - set(theirs.state_dict())
    assert set(theirs.state_dict()) <= set(ours.state_dict())
    assert extra and all(key.startswith(names) for key in extra)
    features = ready(ours)(IMAGE)
    assert [f.shape[1] for f in features.values()] == [128, 256, 512]
    assert all(len(f.unique()) <= 256 and f.min() == 0 for f in features.values())


def test_no_convolution_hides_in_a_plain_list():
    model = make_backbone(*QUANT)
    registered = {id(module) for module in model.modules()}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, list | tuple):
                hidden = [v for v in value if isinstance(v, nn.Module) and id(v) not in registered]
                assert not hidden, f"{type(module).__name__}.{key}"
    assert all(isinstance(m, QuantConv2d) for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("top, channels", [("res5", 512), ("p5", 16)])
def test_p6_and_p7_follow_the_pyramids_form(relu, top, channels):
    extra = ("MODEL.FPN.RELU", str(relu), "MODEL.FPN.TOP_BLOCK_IN_FEATURE", top)
    model = make_backbone(*extra).eval()
    assert model.top_block.p6.in_channels == channels
    for conv in (model.top_block.p6, model.top_block.p7):
        assert isinstance(getattr(conv, "norm", None), nn.BatchNorm2d) == relu
        assert (conv.bias is None) == relu
    features = model(IMAGE)
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    assert [f.shape[-1] for f in features.values()] == [8, 4, 2, 1, 1]
    assert all((f.min() >= 0) == relu for f in list(features.values())[:3])
    source = features["p5"] if top == "p5" else model.bottom_up(IMAGE)["res5"]
    expected = model.top_block.p6(source)
    assert torch.equal(features["p6"], expected.relu() if relu else expected)


def test_pyramid_with_relu_is_the_written_formula():
    model = make_backbone(*RELU).eval()
    features, bottom_up = model(IMAGE), model.bottom_up(IMAGE)

    def lateral(level):
        conv = getattr(model, f"fpn_lateral{level}")
        return conv.norm(nn.functional.conv2d(bottom_up[f"res{level}"], conv.weight)).relu()

    inner = lateral(5)
    for level in (5, 4, 3):
        if level < 5:
            inner = lateral(level) + inner.repeat_interleave(2, -1).repeat_interleave(2, -2)
        conv = getattr(model, f"fpn_output{level}")
        output = conv.norm(nn.functional.conv2d(inner, conv.weight, padding=1)).relu()
        torch.testing.assert_close(features[f"p{level}"], output)


def test_stem_quantizes_after_pooling_what_it_could_before():
    stem = QuantStem(in_channels=3, out_channels=8, norm="BN").eval()
    stem.output_stream.quantize("lsq", 3)
    calibrate(stem, lambda: stem(IMAGE))
    before = stem.output_stream(stem.conv1(IMAGE).relu())
    assert torch.equal(stem(IMAGE), nn.functional.max_pool2d(before, 3, 2, 1))
    assert 2 < len(before.unique()) <= 8


def test_residual_sum_is_a_module_that_ends_before_the_relu():
    block = QuantBasicBlock(4, 4, norm="BN").eval()
    assert block.residual_add.signed == (True, None)
    assert QuantBasicBlock(4, 8, norm="BN", stride=2).residual_add.signed == (True, True)
    sums = []
    block.residual_add.register_forward_hook(lambda m, i, o: sums.append(o.clone()))
    x = torch.rand(1, 4, 5, 5) / 100  # too little to hide the sign of the branch
    y = block(x)
    assert sums[0].min() < 0 and torch.equal(y, sums[0].relu())
    assert torch.equal(sums[0], block.conv2(block.conv1(x).relu()) + x)


def test_streams_and_sums_have_the_residual_bits():
    extra = ("MODEL.QUANT.RESIDUAL_NUM_BITS", "6", "MODEL.QUANT.RESIDUAL_QUANTIZER", "lsq")
    model = make_backbone(*QUANT, *extra)
    shared = {n: q.spec for n, q in quantizers(model) if not n.endswith(("weight_quantizer", "input_quantizer"))}
    assert {(s.quantizer, s.num_bits, s.role) for s in shared.values()} == {("lsq", 6, "input")}
    streams = [n for n, m in model.named_modules() if isinstance(m, StreamQuantizer)]
    assert len(streams) == 1 + 8 + 3 + 3 + 2  # stem, blocks, sums, levels, P6 and P7
    assert {f"{n}.quantizer" for n in streams} <= set(shared)
    model = ready(model.eval())
    assert all(len(f.unique()) <= 64 for f in model(IMAGE).values())


def test_a_resnet18_can_be_narrower_than_detectron2s():
    """Its stages double the channels that ``RES2_OUT_CHANNELS`` starts with."""
    narrow = ("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.STEM_OUT_CHANNELS", "12")
    model = ready(make_backbone(*QUANT, *narrow, "MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"))
    shapes = {n: s.channels for n, s in model.bottom_up.output_shape().items()}
    assert shapes == {"res2": 16, "res3": 32, "res4": 64, "res5": 128}
    assert model.bottom_up.stem.conv1.out_channels == 12
    assert {n: f.shape[1] for n, f in model.bottom_up(IMAGE).items()} == shapes


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, False, True]"), "DEFORM_ON_PER_STAGE"),
        (("MODEL.RESNETS.RES5_DILATION", "2"), "RES5_DILATION must be 1, got 2"),
        (("MODEL.RESNETS.RES2_OUT_CHANNELS", "256"), "must be 64, or fewer for a narrower network.*18, got 256"),
        (("MODEL.RESNETS.RES2_OUT_CHANNELS", "0"), "RES2_OUT_CHANNELS must be 64.*got 0"),
        (("MODEL.RESNETS.OUT_FEATURES", "['res3','res4']"), r"RESNETS.OUT_FEATURES must have 'res5'.*'res4'\]"),
        (
            ("MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5", "MODEL.FPN.IN_FEATURES", "['res3','res4']"),
            "MODEL.FPN.IN_FEATURES must have 'res5'",
        ),
        ((*QUANT, "MODEL.QUANT.RESIDUAL_NUM_BITS", "12"), "MODEL.QUANT.RESIDUAL_NUM_BITS must be from 2 to 8, got 12"),
        (
            (*QUANT, "MODEL.QUANT.RESIDUAL_QUANTIZER", "lqs"),
            "MODEL.QUANT.RESIDUAL.*dorefa, lqnet, lsq, lsqplus, n2uq, pact, got 'lqs'",
        ),
    ],
)
def test_what_it_cannot_build_is_one_line(overrides, words):
    with pytest.raises(ValueError, match=words) as error:
        make_backbone(*overrides)
    assert "\n" not in str(error.value)
