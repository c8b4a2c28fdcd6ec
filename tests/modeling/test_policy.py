import logging

import pytest
import torch
from detectron2.modeling import build_model
from helpers import QUANT, make_cfg

from aqdet.layers import QuantConv2d
from aqdet.modeling import QuantPolicy, quantizable_layers


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


def test_without_a_zero_level_where_bits_are_few_and_lsq_elsewhere():
    rules = (
        ("res3", {"WEIGHT.NUM_BITS": 1}),
        (r"res4\.0", {"WEIGHT.NUM_BITS": 5}),
        (r"res4\.1", {"WEIGHT.CENTERED": False}),
    )
    extra = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd", "MODEL.QUANT.WEIGHT.CENTERED", "True")
    model = build_model(with_rules(*rules, extra=extra))
    specs = {name: layer.weight_quantizer.spec for name, layer in quantizable_layers(model)}
    found = {name: (spec.quantizer, spec.num_bits, spec.centered) for name, spec in specs.items()}
    assert found["backbone.bottom_up.stem.conv1"] == found["head.cls_score"] == ("lsq", 8, False)
    assert found["backbone.bottom_up.res3.0.conv1"] == ("lsqodd", 1, True)
    assert found["backbone.bottom_up.res4.0.conv1"] == ("lsq", 5, False)
    assert found["backbone.bottom_up.res4.1.conv1"] == ("lsqodd", 4, False)
    assert found["backbone.bottom_up.res5.0.conv1"] == ("lsqodd", 4, True)


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
        (("res5", {"INPUT.QUANTIZER": "lqs"}), "res5.*one of dorefa, lqnet, lsq, lsqplus, n2uq, pact, got 'lqs'"),
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


@pytest.mark.parametrize(
    "patterns, shadows",
    [
        (("res", "res5"), "RULES[0] 'res'"),
        (("res4", "res", "res5"), "RULES[1] 'res'"),
        (("conv1", "conv2", "shortcut", "res5"), "RULES[0] 'conv1', RULES[1] 'conv2', RULES[2] 'shortcut'"),
    ],
)
def test_a_rule_that_never_wins_names_those_that_shadow_it(patterns, shadows):
    with pytest.raises(ValueError) as error:
        build_model(with_rules(*((pattern, {"WEIGHT.NUM_BITS": 3}) for pattern in patterns)))
    message = str(error.value)
    assert f"RULES[{len(patterns) - 1}] 'res5' decides for no layer: of the 5 that it matches, backbone." in message
    assert f"it is shadowed by {shadows};" in message and "\n" not in message


def test_a_rule_for_the_input_of_the_stem_alone_is_an_error():
    with pytest.raises(ValueError, match=r"RULES\[0\] 'stem' sets INPUT keys for .*stem.conv1 alone, which reads the"):
        build_model(with_rules(("stem", {"INPUT.NUM_BITS": 4})))
    # Where it decides for others too, it means those.
    build_model(with_rules(("bottom_up", {"INPUT.NUM_BITS": 3})))


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"ENABLED": "False"}, r"RULES\[0\]: ENABLED must be of type bool, got 'False'"),
        ({"WEIGHT.PER_CHANNEL": "no"}, "WEIGHT.PER_CHANNEL must be of type bool, got 'no'"),
        ({"WEIGHT.QUANTIZER": ["lsq"]}, r"WEIGHT.QUANTIZER must be of type str, got \['lsq'\]"),
        ({"INPUT.NUM_BITS": True}, "INPUT.NUM_BITS must be of type int, got True"),
        ({1: 2, "BITS": 2}, "unknown key 1, valid keys are ENABLED"),
    ],
)
def test_a_value_of_another_type_is_refused_rather_than_taken_as_true(overrides, words):
    with pytest.raises(ValueError, match=words):
        build_model(with_rules(("cls_score", overrides)))


@pytest.mark.parametrize(
    "key, value, words",
    [
        (
            "WEIGHT.QUANTIZER",
            "lqs",
            "weights must be one of dorefa, lqnet, lsq, lsqodd, lsqplus, pact, got 'lqs'",
        ),
        (
            "INPUT.QUANTIZER",
            "lqs",
            "inputs must be one of dorefa, lqnet, lsq, lsqplus, n2uq, pact, got 'lqs'",
        ),
        ("WEIGHT.NUM_BITS", "1", "integer from 2 to 8, got 1"),
        ("WEIGHT.CENTERED", "True", "WEIGHT.CENTERED must be False with WEIGHT.QUANTIZER lsq: it is for lsqodd"),
        ("INPUT.NUM_BITS", "32", "integer from 2 to 8, got 32"),
    ],
)
def test_wrong_defaults_are_one_line(key, value, words):
    with pytest.raises(ValueError, match="MODEL.QUANT for layer backbone.*" + words) as error:
        build_model(make_cfg(*QUANT, f"MODEL.QUANT.{key}", value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["BOUNDARY_NUM_BITS", "RESIDUAL_NUM_BITS"])
def test_bits_of_the_boundary_and_the_streams_are_refused_by_their_key(key):
    with pytest.raises(ValueError, match=f"^MODEL.QUANT.{key} must be from 2 to 8, got 9$"):
        build_model(make_cfg(*QUANT, f"MODEL.QUANT.{key}", "9"))


def test_a_backbone_that_is_not_ours_cannot_be_left_in_float_unnoticed():
    cfg = make_cfg(*QUANT)
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    with pytest.raises(ValueError, match="layer backbone.* has no declared.*MODEL.BACKBONE.NAME"):
        build_model(cfg)
    cfg.MODEL.QUANT.ENABLED = False
    build_model(cfg)


def test_the_auxiliary_path_is_out_of_reach_of_rules():
    with pytest.raises(ValueError, match="'auxiliary' decides for no layer"):
        build_model(with_rules(("auxiliary", {"ENABLED": False}), extra=("MODEL.AUX.ENABLED", "True")))


def test_signedness_is_declared_by_the_structure():
    def signed_inputs(*extra):
        model = build_model(make_cfg(*QUANT, *extra))
        inputs = {p: m.input_quantizer for p, m in quantizable_layers(model) if m.input_quantizer is not None}
        return {path for path, quantizer in inputs.items() if quantizer.spec.signed}

    head = {"head.cls_subnet.0", "head.bbox_subnet.0"}
    assert signed_inputs() == head | {f"backbone.fpn_output{i}" for i in (3, 4, 5)}
    top = ("MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5")
    assert "backbone.top_block.p6" in signed_inputs(*top)
    assert signed_inputs("MODEL.FPN.RELU", "True", *top) == set()
