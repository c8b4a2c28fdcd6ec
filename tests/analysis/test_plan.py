import json
import subprocess
import sys

import plan as tool
import pytest
from helpers import AUX, QUANT, ROOT, make_model
from two_stage import MASK, rcnn

from aqdet.analysis.plan import make_plan, total


def test_numbers_by_hand():
    rows = {r.name: r for r in make_plan(make_model(*QUANT, *AUX), (64, 64))}
    stem = rows["backbone.bottom_up.stem.conv1"]
    assert (stem.weight, stem.input, stem.norm) == ("lsq 8/ch", "image u8", "BatchNorm2d")
    assert stem.parameters == 64 * 3 * 49 + 128
    assert stem.macs == 32 * 32 * 64 * 3 * 49
    assert stem.bit_ops == stem.macs * 64
    # weights at 8 bits; gamma, beta, mean and variance, and 64 scales at 32
    assert stem.weight_bits == 64 * 3 * 49 * 8 + (4 * 64 + 64) * 32
    score = rows["head.cls_score"]
    cells = 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1
    assert score.macs == cells * 16 * 9 * (3 * 3) and score.bit_ops == score.macs * 64
    assert rows["head.cls_subnet.0"].norm == "BatchNorm2d x5 levels"
    assert rows["backbone.fpn_add3"].input == "pact s8 + on grid"
    assert rows["auxiliary.head.cls_score"].weight == "float 32"


def test_weights_without_a_zero_level_are_named():
    method = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd", "MODEL.QUANT.WEIGHT.NUM_BITS", "2")
    model = make_model(*QUANT, *method, "MODEL.QUANT.WEIGHT.CENTERED", "True")
    rows = {r.name: r for r in make_plan(model, (64, 64))}
    inner = rows["backbone.bottom_up.res3.0.conv2"]
    assert inner.weight == "lsqodd 2/ch centered" and inner.input == "lsq u4"
    # weights at 2 bits; gamma, beta, mean and variance, a scale a channel and the input's at 32
    assert inner.weight_bits == 128 * 128 * 9 * 2 + (4 * 128 + 128 + 1) * 32
    assert rows["backbone.bottom_up.stem.conv1"].weight == "lsq 8/ch"


def test_totals_and_float_plan():
    rows, bare = (make_plan(make_model(*o), (64, 64)) for o in ((*QUANT, *AUX), ()))
    model = make_model(*QUANT, *AUX)
    for name, _ in model.named_parameters():
        assert "auxiliary" in name or total(rows, "quantized").layers > 0
    assert total(rows, "float").layers == 0
    assert total(bare, "float").parameters == sum(p.numel() for p in make_model().parameters())
    assert total(rows, "quantized").parameters == total(bare, "float").parameters
    assert total(rows, "quantized").macs == total(bare, "float").macs
    assert total(bare, "float").bit_ops == 1024 * total(bare, "float").macs
    aux = sum(p.numel() for p in model.auxiliary.parameters())
    assert total(rows, "auxiliary").parameters == aux


def test_the_auxiliary_path_of_both_taps_is_listed_and_summed():
    model = make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", "both")
    rows = {r.name: r for r in make_plan(model, (64, 64)) if r.part == "auxiliary"}
    # stem, eight blocks, three projections; five levels; own pyramid of three laterals, three outputs, P6 and P7; head
    assert sum(r.kind == "conv" for r in rows.values()) == 9 + 3 + 5 + 8 + 4
    adaptor = rows["auxiliary.trunk.bottom_up.res3.0.adaptor.conv"]
    assert (adaptor.weight, adaptor.input, adaptor.norm) == ("float 32", "float 32", "BatchNorm2d")
    assert adaptor.macs == 8 * 8 * 128 * 128
    assert rows["auxiliary.trunk.bottom_up.res3.0.shortcut"].macs == 8 * 8 * 64 * 128
    assert rows["auxiliary.adaptors.0.conv"].macs == 8 * 8 * 16 * 16
    total_parameters = sum(p.numel() for p in model.auxiliary.parameters())
    assert total(list(rows.values()), "auxiliary").parameters == total_parameters


def test_heads_of_a_two_stage_detector_count_for_each_region():
    model = rcnn(*QUANT, *AUX, *MASK, "TEST.DETECTIONS_PER_IMAGE", "10")
    rows = {r.name: r for r in make_plan(model, (64, 64))}
    # 50 proposals and 10 detections in evaluation; 32 regions, a quarter of them objects, in training
    assert rows["roi_heads.box_head.fc1"].macs == 50 * 16 * 7 * 7 * 32
    assert rows["roi_heads.box_predictor.bbox_pred"].macs == 50 * 32 * 3 * 4
    assert rows["roi_heads.mask_head.mask_fcn1"].macs == 10 * 14 * 14 * 16 * 8 * 9
    assert rows["roi_heads.mask_head.deconv"].macs == 10 * 14 * 14 * 8 * 8 * 4
    assert rows["roi_heads.mask_head.deconv"].kind == "deconv"
    cells = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1
    assert rows["proposal_generator.rpn_head.conv"].macs == cells * 16 * 16 * 9
    assert rows["auxiliary.head.roi_heads.box_head.fc1"].macs == 32 * 16 * 7 * 7 * 32
    assert rows["auxiliary.head.roi_heads.mask_head.predictor"].macs == 8 * 28 * 28 * 8 * 3
    assert rows["auxiliary.head.proposal_generator.rpn_head.conv"].macs == cells * 16 * 16 * 9
    assert total(list(rows.values()), "float").layers == 0
    assert total(list(rows.values()), "auxiliary").parameters == sum(p.numel() for p in model.auxiliary.parameters())


def test_command_line(tmp_path):
    config = ROOT / "configs" / "quickstart" / "retinanet_r18_lsq_w4a4_aux.yaml"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config-file", str(config)]
    command += ["--size", "64", "64"]
    out = tmp_path / "plan.json"
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the detector as shipped" in done.stdout
    assert json.loads(out.read_text())["totals"]["quantized"]["layers"] == 34
    wrong = subprocess.run([*command, "MODEL.QUANT.WEIGHT.QUANTIZER", "lqs"], capture_output=True, text=True)
    last = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1 and last.startswith("error: MODEL.QUANT for layer backbone.")
    assert "one of dorefa, lqnet, lsq, lsqodd, lsqplus, pact, got 'lqs'" in last


@pytest.mark.parametrize("architecture", ("GeneralizedRCNN", "RetinaNet"))
def test_an_architecture_that_has_no_plan_is_one_line(architecture, monkeypatch):
    config = ROOT / "configs" / "quickstart" / "retinanet_r18_fp_bn.yaml"
    arguments = ["--config-file", str(config), "MODEL.META_ARCHITECTURE", architecture]
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    assert stop.value.code == (
        f"error: MODEL.META_ARCHITECTURE {architecture!r} is Detectron2's: there is a plan of QuantClassifier, "
        "QuantFCOS, QuantGeneralizedRCNN, QuantRetinaNet"
    )
