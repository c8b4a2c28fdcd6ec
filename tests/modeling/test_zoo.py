"""Detectors of Detectron2's zoo configs with quantization off: Detectron2's own, to the bit."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS as FCOSModel
from detectron2.modeling.meta_arch.fcos import FCOSHead
from helpers import AUX, QUANT, calibrated, make_batch, outputs_of

from aqdet.config import load_config
from aqdet.quantization import set_quantization

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
OURS = (
    *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "QuantRetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_quant_retinanet_resnet_fpn_backbone"),
)
FCOS = (*OURS[:3], "QuantFCOS", *OURS[4:], "MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5")
SCORE = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.FCOS.SCORE_THRESH_TEST", "0.0")
BATCH = make_batch(size=128)


def their_retinanet():
    cfg = load_config(RETINANET, ["MODEL.DEVICE", "cpu", *SCORE])
    return build_model(cfg)


def group_norm(channels):
    """GN for Detectron2 0.6, which tries a head's norm with one channel; newer releases of PyTorch refuse that."""
    return torch.nn.GroupNorm(1 if channels == 1 else 32, channels)


def their_fcos():
    node = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    node.test_score_thresh = 0.0
    assert node.head.norm == "GN"
    parts = {key: instantiate(node[key]) for key in node if key not in ("_target_", "head")}
    arguments = {key: instantiate(node.head[key]) for key in node.head if key not in ("_target_", "norm")}
    return FCOSModel(head=FCOSHead(**arguments, norm=group_norm), **parts)


@pytest.mark.parametrize("extra", [(), (*QUANT, *AUX)])
@pytest.mark.parametrize("arch", ["RetinaNet", "FCOS"])
def test_off_is_detectron2s(arch, extra):
    torch.manual_seed(0)
    theirs = (their_retinanet if arch == "RetinaNet" else their_fcos)()
    ours = build_model(load_config(RETINANET, [*(OURS if arch == "RetinaNet" else FCOS), *SCORE, *extra]))
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and bool(missing) == bool(extra)
    if extra:
        calibrated(ours, BATCH)
        set_quantization(ours, False)
    for _ in range(2):  # the focal loss is a script whose arithmetic settles after some runs
        outputs_of(theirs, BATCH)
    (losses, grads, found), (our_losses, our_grads, our_found) = outputs_of(theirs, BATCH), outputs_of(ours, BATCH)
    assert all(torch.equal(our_losses[key], value) for key, value in losses.items())
    assert set(our_losses) == set(losses) if not extra else set(our_losses) > set(losses)
    assert sum(grad is not None for grad in grads.values()) == len(grads) > 50
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())
    for wanted, got in zip(found, our_found, strict=True):
        assert len(wanted) > 10 and torch.equal(got.pred_boxes.tensor, wanted.pred_boxes.tensor)
        assert torch.equal(got.scores, wanted.scores) and torch.equal(got.pred_classes, wanted.pred_classes)
