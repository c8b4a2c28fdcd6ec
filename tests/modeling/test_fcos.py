"""FCOS on the same trunk, auxiliary path, hook and checkpoints as RetinaNet."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS as TheirFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from helpers import AUX, FCOS, QUANT, calibrated, gradients, losses_of, make_batch, make_cfg, make_model

from aqdet.analysis.plan import make_plan, total
from aqdet.checkpoint import AqdetCheckpointer
from aqdet.engine import check_config
from aqdet.layers import QuantConv2d
from aqdet.modeling import strip, without_scaffold
from aqdet.modeling.scaffold import TAPS
from aqdet.quantization import quantizers, set_quantization

BATCH = make_batch()
MAIN = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}


def their_fcos():
    """Detectron2's own, which no config builds."""
    torch.manual_seed(0)
    backbone = build_backbone(make_cfg(theirs=True))
    names = ["p3", "p4", "p5", "p6", "p7"]
    shapes = [backbone.output_shape()[name] for name in names]
    head = FCOSHead(input_shape=shapes, conv_dims=[16], num_classes=3, norm="BN")
    return TheirFCOS(
        backbone=backbone,
        head=head,
        head_in_features=names,
        num_classes=3,
        test_score_thresh=0.0,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )


@pytest.mark.parametrize("node", ["FCOS", "RETINANET"])
def test_group_norm_in_the_heads(node):
    arch = FCOS[:-4] if node == "FCOS" else []
    norm = f"MODEL.{node}.NORM"
    wide = ("MODEL.FPN.OUT_CHANNELS", "64", norm, "GN", "MODEL.AUX.NORM", "GN")
    assert node != "FCOS" or make_cfg(*arch).MODEL.FCOS.NORM == "GN"  # the default
    cfg = make_cfg(*arch, *QUANT, *AUX, *wide)
    check_config(cfg)
    model = calibrated(build_model(cfg), BATCH)
    for head in (model.head, model.auxiliary.head):
        norms = [layer for layer in head.modules() if isinstance(layer, torch.nn.GroupNorm)]
        assert [(layer.num_groups, layer.num_channels) for layer in norms] == [(32, 64)] * len(norms) and norms
    assert all(torch.isfinite(value) for value in losses_of(model, BATCH).values())
    for key in (norm, "MODEL.AUX.NORM"):
        with pytest.raises(ValueError, match=f"{key} GN has 32 groups, which MODEL.FPN.OUT_CHANNELS 16 is no multiple"):
            check_config(make_cfg(*arch, norm, "BN", key, "GN"))


def test_names_and_off_is_off():
    theirs, model = their_fcos(), make_model(*FCOS, *QUANT, *AUX, "MODEL.AUX.TAPS", "both")
    names = tuple(f"{name}." for name, _ in quantizers(model))
    ours = set(model.state_dict())
    assert set(theirs.state_dict()) == {key for key in ours if not key.startswith((*names, "auxiliary."))}
    model.load_state_dict(theirs.state_dict(), strict=False)
    set_quantization(model, False)
    for _ in range(3):  # the focal loss is a script whose arithmetic settles after some runs
        gradients(theirs, BATCH)
    expected, expected_gradients = gradients(theirs, BATCH)
    losses, grads = gradients(model, BATCH, keys=MAIN)
    assert set(expected) == MAIN and all(torch.equal(losses[key], value) for key, value in expected.items())
    assert set(grads) == set(expected_gradients)
    assert all(torch.equal(grads[key], value) for key, value in expected_gradients.items())
    model.load_state_dict(theirs.state_dict(), strict=False)
    for a, b in zip(theirs.eval()(BATCH), model.eval()(BATCH), strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("taps", TAPS)
def test_a_step_and_dropped_is_dropped(taps):
    extra = (*FCOS, *QUANT, "MODEL.FPN.RELU", "True")
    model = calibrated(make_model(*extra, *AUX, "MODEL.AUX.TAPS", taps), BATCH)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(isinstance(m, QuantConv2d) != n.startswith("auxiliary.") for n, m in convs.items())
    boundary = {n for n, m in convs.items() if isinstance(m, QuantConv2d) and m.weight_quantizer.spec.num_bits == 8}
    assert boundary == {"backbone.bottom_up.stem.conv1", "head.cls_score", "head.bbox_pred", "head.ctrness"}
    losses, grads = gradients(model, BATCH)
    assert set(losses) == MAIN | {f"aux_{key}" for key in MAIN}
    assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    assert set(grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    bare = make_model(*extra)
    assert set(bare.state_dict()) == set(strip(model.state_dict()))
    bare.load_state_dict(strip(model.state_dict()))
    model.eval(), bare.eval()
    with without_scaffold(model):
        inside = model(BATCH)
    for a, b in zip(inside, bare(BATCH), strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_both_heads_have_the_same_targets_and_normalizer(monkeypatch):
    model, kept, calls = make_model(*FCOS, *AUX), [], []
    model.head.register_forward_hook(lambda m, i, o: kept.append(o))
    monkeypatch.setattr(model.auxiliary, "forward", lambda *_: kept[-1])
    real = model.label_anchors
    monkeypatch.setattr(model, "label_anchors", lambda *a: calls.append(1) or real(*a))
    model.loss_normalizer = 3.0
    losses = losses_of(model, BATCH)
    assert len(calls) == len(kept) == 1
    for key in MAIN:
        assert losses[key] > 0 and torch.equal(losses[key], losses[f"aux_{key}"])


def test_images_without_boxes():
    model = make_model(*FCOS, *AUX)
    for _ in range(2):
        losses_of(model, BATCH)
    both = gradients(model, make_batch(empty=(0, 1)))[0]
    assert both["loss_fcos_loc"] == both["loss_fcos_ctr"] == both["aux_loss_fcos_loc"] == 0
    assert both["loss_fcos_cls"] > 0
    losses, grads = gradients(model, make_batch(empty=(1,)))
    assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    assert all(torch.isfinite(g).all() for g in grads.values())
    anchors = model.anchor_generator([torch.zeros(1, 1, s, s) for s in (8, 4, 2, 1, 1)])
    labels, _ = model.label_anchors(anchors, [x["instances"] for x in make_batch(empty=(1,))])
    assert (labels[0] < 3).any() and (labels[1] == 3).all()


def test_the_path_starts_from_a_float_fcos_and_is_planned(tmp_path):
    path = tmp_path / "float.pth"
    relu = ("MODEL.FPN.RELU", "True")
    torch.save({"model": make_model(*FCOS, *relu).state_dict()}, path)
    model = make_model(*FCOS, *QUANT, *AUX, *relu, "MODEL.AUX.TAPS", "both", seed=1)
    AqdetCheckpointer(model, aux_init="head").load(str(path))
    assert torch.equal(model.auxiliary.head.ctrness.weight, model.head.ctrness.weight)
    assert model.auxiliary.needs_alignment
    rows = make_plan(model, (64, 64))
    assert {"head.ctrness", "auxiliary.head.ctrness"} <= {row.name for row in rows}
    assert total(rows, "float").layers == 0


def test_wrong_values_are_one_line():
    with pytest.raises(ValueError, match="TAPS must be one of fpn, backbone, both, got 'all'"):
        build_model(make_cfg(*FCOS, *AUX, "MODEL.AUX.TAPS", "all"))
