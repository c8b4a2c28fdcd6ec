"""Two-stage detectors: Detectron2's own with quantization off, quantized in every layer with it on."""

import pytest
import torch
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, build_model
from helpers import QUANT, calibrated, losses_of, outputs_of
from torch import nn
from two_stage import KEYPOINTS, MASK, OURS, rcnn, rcnn_cfg, shaped_batch

from aqdet.config import load_config
from aqdet.layers import LAYER_KINDS, weighted_layers
from aqdet.modeling import without_scaffold
from aqdet.quantization import quantizers, set_quantization

BATCH = shaped_batch(size=128)
AUX = ("MODEL.AUX.ENABLED", "True", "MODEL.AUX.NORM", "BN")
CONVS = (*MASK, "MODEL.ROI_BOX_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.NUM_FC", "1")
NORMED = (*CONVS, "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN")
KINDS = {"faster": (), "mask": MASK, "keypoint": KEYPOINTS, "normed": NORMED, "all": (*NORMED, *KEYPOINTS)}
FROZEN = (
    *("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""),
    *("MODEL.RPN.CONV_DIMS", "[16, 8]", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"),
)


def assert_equal(theirs, ours):
    (losses, grads, found), (our_losses, our_grads, our_found) = outputs_of(theirs, BATCH), outputs_of(ours, BATCH)
    assert losses and all(torch.equal(our_losses[key], value) for key, value in losses.items())
    assert all(grad is not None for grad in grads.values()) and len(grads) > 30
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())
    compared = set()
    for wanted, got in zip(found, our_found, strict=True):
        assert len(wanted) > 3 and torch.equal(got.pred_boxes.tensor, wanted.pred_boxes.tensor)
        for field in set(wanted.get_fields()) - {"pred_boxes"}:
            assert torch.equal(got.get(field), wanted.get(field)), field
            compared.add(field)
    return compared


PLAIN = [(kind, ()) for kind in KINDS]
SWITCHED_OFF = [(kind, extra) for kind in ("faster", "all") for extra in (QUANT, (*QUANT, *AUX))]


@pytest.mark.parametrize("kind, extra", [*PLAIN, *SWITCHED_OFF])
def test_off_is_detectron2s(kind, extra):
    theirs = rcnn(*KINDS[kind], theirs=True)
    ours = rcnn(*KINDS[kind], *extra)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and bool(missing) == bool(extra)
    assert all("_quantizer." in key or ".quantizer." in key or key.startswith("auxiliary.") for key in missing)
    if extra:
        torch.manual_seed(3)
        calibrated(ours.train(), BATCH)
        torch.manual_seed(3)
        losses_of(theirs.train(), BATCH)  # moves the statistics of BN by the same batch and regions
        set_quantization(ours, False)
    fields = assert_equal(theirs, ours)
    assert ("pred_masks" in fields) == (kind in ("mask", "normed", "all"))
    assert ("pred_keypoints" in fields) == (kind in ("keypoint", "all"))


@pytest.mark.parametrize("extra", [(), QUANT], ids=["plain", "quant"])
def test_frozen_layers_and_class_agnostic_heads_are_detectron2s_too(extra):
    theirs = rcnn(*MASK, *FROZEN, theirs=True)
    ours = rcnn(*MASK, *FROZEN, *extra)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    if extra:
        calibrated(ours.train(), BATCH)
        set_quantization(ours, False)
    assert_equal(theirs, ours)
    frozen = {name for name, parameter in theirs.named_parameters() if not parameter.requires_grad}
    ours_frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen and {name for name in ours_frozen if "quantizer" not in name} == frozen
    assert all(name.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2")) for name in ours_frozen)


def test_a_zoo_config_and_two_names_are_a_quantized_detector_with_detectron2s_values_when_off():
    path, small = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    small += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0"]  # a class may have a score of 0 with random weights
    small += [
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "100",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        "100",
        "TEST.DETECTIONS_PER_IMAGE",
    ]
    small += ["20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"]
    torch.manual_seed(0)
    theirs = build_model(load_config(path, small))
    ours = build_model(load_config(path, [*small, *OURS, *QUANT]))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and missing
    assert all("quantizer" in key for key in missing)
    set_quantization(ours, False)
    assert_equal(theirs, ours)


def test_every_layer_with_a_weight_is_quantized():
    model = rcnn(*KINDS["all"], *QUANT)
    layers = dict(weighted_layers(model))
    assert len(layers) > 40 and all(isinstance(layer, tuple(LAYER_KINDS.values())) for layer in layers.values())
    kinds = {"roi_heads.mask_head.deconv", "roi_heads.box_head.fc1", "roi_heads.keypoint_head.score_lowres"}
    assert kinds < set(layers)
    roles = {name: layer.quant_site.role for name, layer in layers.items() if layer.quant_site.role != "inner"}
    predictions = "proposal_generator.rpn_head.objectness_logits proposal_generator.rpn_head.anchor_deltas "
    predictions += "roi_heads.box_predictor.cls_score roi_heads.box_predictor.bbox_pred roi_heads.mask_head.predictor "
    predictions += "roi_heads.keypoint_head.score_lowres"
    assert roles == {"backbone.bottom_up.stem.conv1": "stem", **dict.fromkeys(predictions.split(), "prediction")}
    float_input = [name for name, layer in layers.items() if layer.input_quantizer is None]
    assert float_input == ["backbone.bottom_up.stem.conv1"]


@pytest.mark.parametrize("relu", [False, True])
def test_what_reads_the_pyramid_is_signed_without_its_relu_and_nothing_negative_is_clipped(relu, caplog):
    model = rcnn(*KINDS["all"], *QUANT, "MODEL.FPN.RELU", str(relu)).train()
    readers = ("rpn_head.conv", "box_head.conv1", "mask_head.mask_fcn1", "keypoint_head.conv_fcn1")
    layers = {name: layer for name, layer in weighted_layers(model) if not name.startswith("backbone.")}
    for name, layer in layers.items():
        assert layer.input_quantizer.spec.signed == (not relu and name.endswith(readers)), name
    calibrated(model, BATCH)
    assert "declared unsigned" not in caplog.text


def test_a_head_of_somebody_elses_without_sites_is_refused_by_the_name_of_its_layer():
    @ROI_BOX_HEAD_REGISTRY.register()
    class Somebodys(nn.Sequential):
        def __init__(self, cfg, input_shape):
            super().__init__(nn.Flatten(), nn.Linear(input_shape.channels * 49, 8))
            self.output_shape = type(input_shape)(channels=8)

    overrides = ("MODEL.ROI_BOX_HEAD.NAME", "Somebodys")
    assert rcnn(*overrides) is not None
    with pytest.raises(ValueError, match=r"layer roi_heads.box_head.1 \(Linear\) has no declared .* site") as error:
        rcnn(*overrides, *QUANT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"), "MODEL.ROI_HEADS.NAME must be one of StandardROIHeads, Quant"),
        (("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"), "MODEL.ROI_HEADS.NAME .* got 'Res5ROIHeads'"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "MODEL.PROPOSAL_GENERATOR.NAME must be one of RPN"),
        (("MODEL.EXTRA_LOSS.ENABLED", "True"), "MODEL.EXTRA_LOSS.ENABLED must be False: .*no extra head"),
        (("MODEL.DISTILL.ENABLED", "True"), "MODEL.DISTILL.LOGIT_WEIGHT must be 0"),
        ((*AUX, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "True"), "TRAIN_ON_PRED_BOXES must be False"),
        (("MODEL.FPN.IN_FEATURES", "['res2','res3','res4']"), "MODEL.FPN.IN_FEATURES must end in 'res5'"),
        ((*QUANT, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"), "use build_quant_resnet_fpn_backbone"),
    ],
)
def test_what_is_no_faster_or_mask_rcnn_is_refused_in_one_line(overrides, words):
    from aqdet.engine.config_check import check_config

    with pytest.raises(ValueError, match=words) as error:
        check_config(rcnn_cfg(*overrides))
    assert "\n" not in str(error.value)
    if "FPN.IN_FEATURES" not in words:
        with pytest.raises(ValueError, match=words):
            rcnn(*overrides)


# Without ground truth among the proposals, hardly any of a fresh RPN's is an object.
NO_FOREGROUND = ("MODEL.RPN.NMS_THRESH", "0.5", "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False")
NO_FOREGROUND += ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.99]")


@pytest.mark.parametrize("empty", [(), (0, 1)], ids=["no_match", "no_objects"])
def test_calibration_without_foreground_shows_boxes_to_the_mask_and_keypoint_heads(empty):
    model = rcnn(*KINDS["all"], *QUANT, *NO_FOREGROUND).train()
    batch = shaped_batch(empty=empty)
    regions = []
    model.roi_heads.mask_head.mask_fcn1.register_forward_pre_hook(lambda _, x: regions.append(len(x[0])))
    calibrated(model, batch)
    assert all(quantizer.is_calibrated for _, quantizer in quantizers(model))
    assert regions[0] == 0 and regions[1] == (4 if not empty else 2 * 32), "ground-truth boxes, or else all regions"
    # Once calibrated, nothing is shown that Detectron2's would not see.
    losses = losses_of(model, batch)
    assert len(regions) == 3 and regions[2] == 0
    sum(losses.values()).backward()
    assert losses["loss_mask"] == 0 and all(torch.isfinite(value) for value in losses.values())
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("method", ["lsq", "lsqplus", "pact", "dorefa", "n2uq"])
def test_every_method_steps_with_and_without_foreground(method):
    weight = {"n2uq": "lsq"}.get(method, method)
    methods = ("MODEL.QUANT.INPUT.QUANTIZER", method, "MODEL.QUANT.WEIGHT.QUANTIZER", weight)
    objects, none = shaped_batch(), shaped_batch(empty=(0, 1))
    model = calibrated(rcnn(*KINDS["all"], *QUANT, *methods).train(), objects)
    for batch in (objects, none):
        model.zero_grad()
        losses = losses_of(model, batch)
        sum(losses.values()).backward()
        assert set(losses) == set("loss_cls loss_box_reg loss_mask loss_keypoint loss_rpn_cls loss_rpn_loc".split())
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
    model.eval()
    with torch.no_grad(), without_scaffold(model):
        assert model(objects)[0]["instances"].has("pred_masks")


def test_p6_is_on_the_grid_of_p5():
    model = calibrated(rcnn(*QUANT, "MODEL.FPN.RELU", "True").train(), BATCH).eval()
    with torch.no_grad():
        levels = model.backbone(model.preprocess_image(BATCH).tensor)
    assert torch.equal(levels["p6"], levels["p5"][:, :, ::2, ::2])
    codes, scale, _ = model.backbone.p5_stream.quantizer.to_integer(levels["p6"])
    assert torch.equal(codes * scale, levels["p6"])


def test_objects_without_masks_are_refused_where_masks_are_trained():
    batch = shaped_batch()
    batch[1]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="MODEL.MASK_ON is True, but the training images have objects without masks"):
        losses_of(rcnn(*MASK).train(), batch)
