"""Configs that do not suit the machine, and names that nothing is registered under."""

import pytest
import torch
from detectron2.modeling import build_backbone
from helpers import make_cfg

from aqdet.engine import check_config, fit_to_machine
from aqdet.engine.config_check import NORMS
from aqdet.modeling.backbone import feature_names


def test_what_the_machine_lacks_is_replaced_and_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = [f"MODEL.{name}.NORM" for name in ("RESNETS", "FPN", "RETINANET", "AUX", "ROI_BOX_HEAD")]
    amp = ("SOLVER.AMP.ENABLED", "True")
    cfg = make_cfg("MODEL.DEVICE", "cuda", *amp, *(part for key in keys for part in (key, "SyncBN")))
    fit_to_machine(cfg)
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE is cuda" in caplog.text
    assert not cfg.SOLVER.AMP.ENABLED and "SOLVER.AMP.ENABLED: mixed precision is for CUDA" in caplog.text
    for key in keys:
        assert cfg.MODEL[key.split(".")[1]].NORM == "BN" and f"{key}: SyncBN" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = make_cfg("MODEL.DEVICE", "cuda", "MODEL.FPN.NORM", "SyncBN", *amp)
    fit_to_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.FPN.NORM, cfg.SOLVER.AMP.ENABLED) == ("cuda", "SyncBN", True)


@pytest.mark.parametrize(
    "key, value, valid",
    [
        ("MODEL.META_ARCHITECTURE", "Retina", "QuantRetinaNet"),
        ("MODEL.BACKBONE.NAME", "resnet", "build_quant_retinanet_resnet_fpn_backbone"),
        ("MODEL.FPN.NORM", "bn", "SyncBN"),
        ("MODEL.AUX.NORM", "Batch", "SyncBN"),
        ("MODEL.DEVICE", "gpu", "cuda"),
        ("MODEL.DEVICE", "mps", "cuda"),
        ("MODEL.DEVICE", "cuda:x", "cuda"),
        ("INPUT.FORMAT", "GRAY", "BGR"),
        ("INPUT.FORMAT", "RGBA", "BGR"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "WarmupCosineLR"),
    ],
)
def test_wrong_names_list_the_valid_ones(key, value, valid):
    with pytest.raises(ValueError) as error:
        check_config(make_cfg(key, value))
    message = str(error.value)
    assert message.startswith(f"{key} must be") and valid in message and message.endswith(f"got {value!r}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("MODEL.RESNETS.OUT_FEATURES", "['res3','res9']", "must be of stem, res2, res3, res4, res5"),
        ("MODEL.RESNETS.OUT_FEATURES", "[]", "must be of stem, res2"),
        ("MODEL.FPN.IN_FEATURES", "['res2','res3','res4']", "stages of MODEL.RESNETS.OUT_FEATURES ['res3', 'res4'"),
        ("MODEL.FPN.IN_FEATURES", "['res3','res5']", "consecutive"),
        ("MODEL.FPN.IN_FEATURES", "[]", "consecutive"),
        ("MODEL.RETINANET.IN_FEATURES", "['p2','p3']", "must be of p3, p4, p5, p6, p7, which build_quant_retinanet_"),
        ("MODEL.RETINANET.IN_FEATURES", "[]", "must be of p3"),
        ("MODEL.RETINANET.NUM_CONVS", "0", "at least 1"),
        ("MODEL.RETINANET.PRIOR_PROB", "0.0", "between 0 and 1"),
        ("MODEL.FCOS.PRIOR_PROB", "1.0", "between 0 and 1"),
        ("MODEL.FCOS.NUM_CONVS", "0", "at least 1"),
        ("MODEL.FCOS.CENTER_SAMPLING_RADIUS", "0.0", "above 0"),
        ("MODEL.CLASSIFIER.NUM_CLASSES", "-1", "must not be negative"),
        ("MODEL.RETINANET.NUM_CLASSES", "-1", "must not be negative"),
        ("MODEL.QUANT.SCALE_LR", "-1.0", "must not be negative"),
        ("MODEL.QUANT.INPUT.SCALE_LR_FACTOR", "-1.0", "must not be negative"),
        ("MODEL.BACKBONE.FREEZE_AT", "-1", "from 0, nothing, to 5"),
        ("MODEL.BACKBONE.FREEZE_AT", "6", "from 0, nothing, to 5"),
        ("TEST.DETECTIONS_PER_IMAGE", "0", "at least 1, got 0"),
        ("TEST.DETECTIONS_PER_IMAGE", "-1", "at least 1, got -1"),
        ("TEST.AUG.ENABLED", "True", "test-time augmentation is not done"),
        ("MODEL.QUANT.PACT_ALPHA_DECAY", "-1.0", "must not be negative"),
        ("SOLVER.IMS_PER_BATCH", "0", "at least 1, got 0"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "at least 1, got 0"),
        ("SOLVER.BASE_LR", "-0.1", "of at least 0, got -0.1"),
        ("SOLVER.BASE_LR", "1e999", "of at least 0, got inf"),
        ("DATALOADER.NUM_WORKERS", "-1", "at least 0, got -1"),
        ("INPUT.MIN_SIZE_TRAIN", "(64, -1)", "at least 0, got -1"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "have a size, got ()"),
        ("INPUT.MAX_SIZE_TRAIN", "0", "at least 1, got 0"),
        ("INPUT.MIN_SIZE_TEST", "-1", "at least 0, got -1"),
        ("INPUT.MAX_SIZE_TEST", "0", "at least 1, got 0"),
        ("SEED", str(2**32), "below 2 ** 32"),
    ],
)
def test_values_that_no_model_can_be_built_or_trained_with_are_refused_by_their_key(key, value, named):
    with pytest.raises(ValueError) as error:
        check_config(make_cfg(key, value))
    message = str(error.value)
    assert message.startswith(f"{key} must") and named in message and "\n" not in message


@pytest.mark.parametrize(
    "architecture, backbone, named",
    [
        ("QuantClassifier", "build_quant_retinanet_resnet_fpn_backbone", "use build_quant_classifier_backbone"),
        ("QuantFCOS", "build_quant_classifier_backbone", "must be of res3, res4, res5, which build_quant_classifier_"),
    ],
)
def test_a_backbone_of_the_other_kind_of_model_is_refused(architecture, backbone, named):
    with pytest.raises(ValueError, match=named):
        check_config(make_cfg("MODEL.META_ARCHITECTURE", architecture, "MODEL.BACKBONE.NAME", backbone))


@pytest.mark.parametrize("levels", [["res2", "res3", "res4", "res5"], ["res4", "res5"]])
def test_the_features_named_are_those_that_the_backbone_gives(levels):
    keys = ("MODEL.RESNETS.OUT_FEATURES", str(levels), "MODEL.FPN.IN_FEATURES", str(levels))
    for name in ("build_quant_retinanet_resnet_fpn_backbone", "build_quant_classifier_backbone"):
        cfg = make_cfg(*keys, "MODEL.BACKBONE.NAME", name)
        assert feature_names(cfg) == list(build_backbone(cfg).output_shape())
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    assert feature_names(cfg) is None


@pytest.mark.parametrize("key", ["QUANT", "AUX", "EXTRA_LOSS", "DISTILL"])
@pytest.mark.parametrize("architecture", ["RetinaNet", "GeneralizedRCNN"])
def test_an_architecture_that_would_ignore_our_keys_is_refused(key, architecture):
    cfg = make_cfg("MODEL.META_ARCHITECTURE", architecture, f"MODEL.{key}.ENABLED", "True")
    with pytest.raises(ValueError, match=f"MODEL.{key}.ENABLED.*{architecture}.*use one of .*QuantRetinaNet") as error:
        check_config(cfg)
    assert "\n" not in str(error.value)
    cfg.MODEL[key].ENABLED = False
    check_config(cfg)


@pytest.mark.parametrize("norm", ["", *NORMS])
def test_every_listed_norm_is_one(norm):
    check_config(make_cfg("MODEL.FPN.NORM", norm, "MODEL.FPN.OUT_CHANNELS", "32"))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[]", "must have a list of numbers above 0 for each level"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[0]]", "must have a list of numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[]]", "must have a list of numbers above 0"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.0, 1.0]]", "must have a list of numbers above 0"),
        ("MODEL.RETINANET.IOU_THRESHOLDS", "[0.5, 0.4]", "must rise, with one more IOU_LABELS"),
        ("MODEL.RPN.IOU_LABELS", "[0, 1]", "must rise, with one more IOU_LABELS"),
        ("MODEL.PIXEL_MEAN", "[1.0]", "must have a number for each of 3 channels"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "must be above 0"),
        ("MODEL.FPN.OUT_CHANNELS", "0", "must be at least 1"),
        ("INPUT.RANDOM_FLIP", "foo", "must be none or horizontal or vertical"),
    ],
)
def test_values_that_would_fail_in_the_middle_name_their_key(key, value, words):
    with pytest.raises(ValueError, match=words) as error:
        check_config(make_cfg(key, value))
    assert str(error.value).startswith(key.rpartition(".")[0]) and "\n" not in str(error.value)


def test_one_list_of_anchors_for_all_levels_is_detectron2s_too():
    check_config(make_cfg("MODEL.ANCHOR_GENERATOR.SIZES", "[16.0, 32.0]"))
