"""What the export would refuse is said from the config, and the export refuses it."""

import logging
import subprocess
import sys

import pytest
from helpers import CLASSIFIER, FCOS, QUANT, ROOT, calibrated, make_batch, make_cfg, make_model
from tiny_data import train_overrides, write_dataset
from two_stage import MASK, rcnn_cfg

from aqdet.data import register_declared
from aqdet.engine import Trainer
from aqdet.export.extract import extract
from aqdet.export.onnx_graph import build_onnx
from aqdet.modeling.exportable import export_obstacles

GRAY = ("MODEL.PIXEL_STD", "[57.0, 57.0, 57.0]")
TORCHVISION = ("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]")
RELU = ("MODEL.FPN.RELU", "True")
GROUP_NORM = ("MODEL.FPN.OUT_CHANNELS", "32")
OBSTACLES = [
    (TORCHVISION, "MODEL.PIXEL_STD [58.395, 57.12, 57.375] differs by channel"),
    ((*GROUP_NORM, "MODEL.FPN.NORM", "GN"), "MODEL.FPN.NORM GN does not fold"),
    ((*GROUP_NORM, "MODEL.RETINANET.NORM", "GN"), "MODEL.RETINANET.NORM GN does not fold"),
    ((*FCOS, *GROUP_NORM, "MODEL.FCOS.NORM", "GN"), "MODEL.FCOS.NORM GN does not fold"),
    (("MODEL.RESNETS.NORM", "GN"), "MODEL.RESNETS.NORM GN does not fold"),
    (("MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet"), "MODEL.QUANT.WEIGHT.QUANTIZER lqnet has no integer form"),
    (("MODEL.QUANT.INPUT.QUANTIZER", "n2uq"), "MODEL.QUANT.INPUT.QUANTIZER n2uq has no integer form"),
    (("MODEL.QUANT.RESIDUAL_QUANTIZER", "lqnet"), "MODEL.QUANT.RESIDUAL_QUANTIZER lqnet has no integer form"),
    (
        ("MODEL.QUANT.RULES", "[['res3', {'WEIGHT.NUM_BITS': 3}], ['res5', {'WEIGHT.QUANTIZER': 'lqnet'}]]"),
        "MODEL.QUANT.RULES[1] 'res5': WEIGHT.QUANTIZER lqnet has no integer form",
    ),
    (
        ("MODEL.QUANT.RULES", "[['cls_score', {'ENABLED': False}]]"),
        "MODEL.QUANT.RULES[0] 'cls_score' leaves layers in float",
    ),
]


@pytest.mark.parametrize("overrides, words", OBSTACLES)
def test_what_the_config_says_the_export_refuses(overrides, words):
    overrides = (*QUANT, *RELU, *GRAY, *overrides)
    (obstacle,) = export_obstacles(make_cfg(*overrides))
    assert obstacle.startswith(words) and "\n" not in obstacle
    model = calibrated(make_model(*overrides), make_batch()).eval()
    with pytest.raises(ValueError):
        extract(model)


EIGHT = ("MODEL.QUANT.WEIGHT.NUM_BITS", "8", "MODEL.QUANT.INPUT.NUM_BITS", "8")
SEVEN = ("MODEL.QUANT.RULES", "[['bottom_up.res.*conv2', {'WEIGHT.NUM_BITS': 7}]]")


@pytest.mark.parametrize(
    "trunk, more",
    [
        (("MODEL.RESNETS.REGNETX", "200MF"), 12),
        (("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"), 15),
    ],
)
def test_grouped_convolutions_of_eight_bits_are_said_to_be_refused(trunk, more):
    overrides = (*QUANT, *RELU, *GRAY, *EIGHT, *trunk)
    (obstacle,) = export_obstacles(make_cfg(*overrides))
    assert obstacle.startswith(f"layer backbone.bottom_up.res2.0.conv2 and {more} more have groups, and weights and")
    assert "\n" not in obstacle and SEVEN[1] in obstacle
    for fewer in (SEVEN, EIGHT[:2], EIGHT[2:]):
        kept = make_cfg(*QUANT, *GRAY, *trunk, *(EIGHT if fewer is SEVEN else ()), *fewer)
        assert export_obstacles(kept) == []


def test_grouped_convolutions_of_eight_bits_are_refused_and_seven_are_not():
    overrides = (*QUANT, *RELU, *GRAY, *EIGHT, "MODEL.RESNETS.REGNETX", "200MF")
    program = extract(calibrated(make_model(*overrides), make_batch()).eval())
    with pytest.raises(ValueError, match=r"layer backbone.bottom_up.res\d.\d.conv2: .* in a grouped convolution"):
        build_onnx(program)
    build_onnx(extract(calibrated(make_model(*overrides, *SEVEN), make_batch()).eval()))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("MODEL.KEYPOINT_ON", "True"), "MODEL.KEYPOINT_ON True: keypoints have no integer form here"),
        (("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"), "MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign: the export knows"),
        (("MODEL.ROI_BOX_HEAD.NORM", "GN"), "MODEL.ROI_BOX_HEAD.NORM GN does not fold into integers"),
        (("MODEL.PIXEL_STD", "[57.0, 58.0, 57.0]"), "MODEL.PIXEL_STD [57.0, 58.0, 57.0] differs by channel"),
        (("MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet"), "MODEL.QUANT.WEIGHT.QUANTIZER lqnet has no integer form"),
    ],
)
def test_what_keeps_a_two_stage_detector_from_its_export(overrides, words):
    (obstacle,) = export_obstacles(rcnn_cfg(*QUANT, *MASK, *GRAY, *overrides))
    assert obstacle.startswith(words) and "\n" not in obstacle
    assert export_obstacles(rcnn_cfg(*QUANT, *MASK, *GRAY)) == export_obstacles(rcnn_cfg(*MASK, *GRAY)) == []
    # The mask head counts only where there is one.
    assert export_obstacles(rcnn_cfg(*QUANT, *GRAY, "MODEL.ROI_MASK_HEAD.NORM", "GN")) == []


@pytest.mark.parametrize(
    "overrides",
    [
        GRAY,
        (*GRAY, *FCOS),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "MODEL.RESNETS.NORM", "FrozenBN"),
        (*GRAY, "MODEL.QUANT.INPUT.QUANTIZER", "lsqplus", "MODEL.FPN.RELU", "False"),
        (*GRAY, "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa"),
    ],
)
def test_what_the_config_says_nothing_of_is_exported(overrides):
    overrides = (*QUANT, *RELU, *overrides)
    assert export_obstacles(make_cfg(*overrides)) == []
    extract(calibrated(make_model(*overrides), make_batch()).eval())


def test_a_float_start_hands_its_input_and_norms_on_but_no_quantizers():
    assert [line.split()[0] for line in export_obstacles(make_cfg(*TORCHVISION))] == ["MODEL.PIXEL_STD"]
    methods = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet", "MODEL.QUANT.RULES", "[['cls_score', {'ENABLED': False}]]")
    assert export_obstacles(make_cfg(*GRAY, *methods)) == []


def test_other_architectures():
    assert export_obstacles(make_cfg(*TORCHVISION, theirs=True)) == []
    assert export_obstacles(make_cfg(*CLASSIFIER, *TORCHVISION)) == []
    (obstacle,) = export_obstacles(make_cfg(*CLASSIFIER, *QUANT))
    assert obstacle == "MODEL.META_ARCHITECTURE QuantClassifier: image classifiers have no export"


@pytest.mark.parametrize("std, said", [(TORCHVISION, True), (GRAY, False)])
def test_it_is_said_when_training_starts(tmp_path, caplog, std, said):
    entry = write_dataset(tmp_path / "data", f"exportable_{said}")
    cfg = make_cfg(*train_overrides(entry, tmp_path), *QUANT, *std)
    register_declared(cfg)
    with caplog.at_level(logging.WARNING):
        Trainer(cfg)
    assert ("What is trained here cannot be exported: MODEL.PIXEL_STD" in caplog.text) == said


def test_it_is_said_in_the_plan():
    config = ROOT / "configs" / "quickstart" / "retinanet_r18_lsq_w4a4.yaml"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config-file", str(config), "--size", "64", "64"]
    done = subprocess.run([*command, *TORCHVISION], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "cannot be exported:\n  MODEL.PIXEL_STD [58.395, 57.12, 57.375] differs by channel" in done.stdout
