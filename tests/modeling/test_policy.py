import logging

import pytest
import torch
from detectron2.modeling import build_model
from helpers import QUANT, make_cfg

from aqdet.layers import QuantConv2d
from aqdet.modeling import QuantPolicy


def with_rules(*rules, extra=()):
    cfg = make_cfg(*QUANT, *extra)
    cfg.MODEL.QUANT.RULES = [list(rule) for rule in rules]
    return cfg


def bits(model, path):
    layer = model.get_submodule(path)
    inputs = layer.input_quantizer
    return layer.weight_quantizer.spec.num_bits, inputs.spec.num_bits if inputs else "image"


def test_defaults_by_role_and_first_match_wins():
    model = build_model(
        with_rules(
            (r"res5\.1\.conv2$", {"WEIGHT.NUM_BITS": 3}),
            (r"res5\.", {"WEIGHT.NUM_BITS": 2, "INPUT.NUM_BITS": 2, "WEIGHT.PER_CHANNEL": False}),
        )
    )
    assert bits(model, "backbone.bottom_up.stem.conv1") == (8, "image")
    assert bits(model, "head.cls_score") == bits(model, "head.bbox_pred") == (8, 8)
    assert bits(model, "backbone.bottom_up.res4.0.conv1") == (4, 4)
    assert bits(model, "backbone.bottom_up.res5.1.conv2") == (3, 4)
    assert bits(model, "backbone.bottom_up.res5.1.conv1") == (2, 2)
    assert model.backbone.bottom_up.res5[1].conv1.weight_quantizer.scale.shape == (1,)
    assert model.backbone.bottom_up.res5[1].conv2.weight_quantizer.scale.shape == (512,)


def test_a_layer_left_in_float_is_announced(caplog):
    with caplog.at_level(logging.WARNING):
        model = build_model(with_rules((r"cls_score", {"ENABLED": False})))
    assert not isinstance(model.head.cls_score, QuantConv2d)
    assert "head.cls_score stays in float" in caplog.text


@pytest.mark.parametrize(
    "rule, words",
    [
        (
            ("nowhere", {"WEIGHT.NUM_BITS": 2}),
            r"RULES\[0\] 'nowhere' decides for no layer; layers are backbone",
        ),
        (("(", {"WEIGHT.NUM_BITS": 2}), r"RULES\[0\]: '\(' is no regular expression"),
        (("res5", {"BITS": 2}), "unknown key 'BITS', valid keys are ENABLED, WEIGHT.QUANTIZER"),
        (("res5", {"WEIGHT.NUM_BITS": 9}), "layer backbone.bottom_up.res5.*2 to 8, got 9"),
        (("res5", {"INPUT.QUANTIZER": "lqs"}), "res5.*one of dorefa, lsq, pact, got 'lqs'"),
        (("res5",), r"must be \[regex, \{key: value\}\]"),
    ],
)
def test_wrong_rules_are_one_line(rule, words):
    with pytest.raises(ValueError, match=words) as error:
        build_model(with_rules(rule))
    assert "\n" not in str(error.value)


def test_an_undeclared_convolution_is_an_error():
    policy = QuantPolicy.from_config(make_cfg(*QUANT))
    with pytest.raises(ValueError, match="layer x.0 .Conv2d. has no declared quantization site"):
        policy.apply(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), "x.")
