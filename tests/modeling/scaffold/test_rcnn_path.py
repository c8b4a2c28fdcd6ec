"""The auxiliary path of two-stage detectors."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import QUANT, calibrated, losses_of
from two_stage import KEYPOINTS, MASK, rcnn, shaped_batch

from aqdet.modeling import quantizable_layers, strip, without_scaffold
from aqdet.modeling.scaffold import TAPS, Distillation, waiting_adaptors
from aqdet.quantization import quantizers

BATCH = shaped_batch(size=64)
AUX = ("MODEL.AUX.ENABLED", "True", "MODEL.AUX.NORM", "BN")
ALL = (*MASK, *KEYPOINTS, "MODEL.FPN.RELU", "True")
HEADS = {"box": {"loss_cls", "loss_box_reg"}, "mask": {"loss_mask"}, "keypoint": {"loss_keypoint"}}
RPN = {"loss_rpn_cls", "loss_rpn_loc"}


def taps(name):
    return (*AUX, "MODEL.AUX.TAPS", name)


def step(model, batch=BATCH, seed=5):
    model.train().zero_grad()
    torch.manual_seed(seed)
    with EventStorage() as storage:
        losses = model(batch)
    return losses, storage


@pytest.mark.parametrize("name", TAPS)
def test_the_path_trains_on_what_the_detector_sampled_and_reaches_its_weights(name):
    bare, model = (calibrated(rcnn(*ALL, *QUANT, *extra).train(), BATCH) for extra in ((), taps(name)))
    missing, unexpected = model.load_state_dict(bare.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("auxiliary.") for key in missing)
    expected, plain = step(bare)
    sampled = {"anchors": [], "regions": []}
    for rpn in (model.proposal_generator, model.auxiliary.head.proposal_generator):
        theirs = rpn.losses
        rpn.losses = lambda *a, theirs=theirs: sampled["anchors"].append((a[0], a[2], a[4])) or theirs(*a)
    for heads in (model.roi_heads, model.auxiliary.head.roi_heads):
        predictor, theirs = heads.box_predictor, heads.box_predictor.losses
        predictor.losses = lambda p, r, theirs=theirs: sampled["regions"].append(list(r)) or theirs(p, r)
    losses, storage = step(model)
    # The detector's own losses are those without a path, to the bit; the path's are of the same anchors and regions.
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    assert set(losses) == {*expected, *(f"aux_{key}" for key in expected)} and len(expected) == 6
    for mine, theirs in zip(*sampled["anchors"], strict=True):
        assert len(mine) == len(theirs) > 0 and all(a is b for a, b in zip(mine, theirs, strict=True))
    (regions, again) = sampled["regions"]
    assert len(regions) == len(again) == 2 and all(a is b for a, b in zip(regions, again, strict=True))
    # What Detectron2 logs of the detector is not overwritten by the path's.
    values = {key: value for key, (value, _) in storage.latest().items()}
    assert all(values[key] == value for key, (value, _) in plain.latest().items())
    counted = {"roi_head/num_fg_samples", "roi_head/num_bg_samples"}  # by who samples
    assert {f"aux/{key}" for key in plain.latest().keys() - counted} == {k for k in values if k.startswith("aux/")}
    sum(value for key, value in losses.items() if key.startswith("aux_")).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    own = {name for name, _ in model.named_parameters() if name.startswith("auxiliary.")}
    assert len(own & reached) > 0.9 * len(own) and own <= {n for n, p in model.named_parameters() if p.grad is not None}
    assert "backbone.bottom_up.res5.1.conv2.weight" in reached
    assert any(key.startswith("backbone.fpn_output") for key in reached) == (name != "backbone")
    assert not any(key.startswith(("roi_heads.", "proposal_generator.")) for key in reached)


@pytest.mark.parametrize("name", TAPS)
def test_dropped_is_dropped(name):
    model = calibrated(rcnn(*ALL, *QUANT, *taps(name)).train(), BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sum(step(model)[0].values()).backward()
    optimizer.step()
    assert not any(n.startswith("auxiliary.") for n, _ in (*quantizers(model), *quantizable_layers(model)))
    bare = rcnn(*ALL, *QUANT)
    assert set(bare.state_dict()) == set(strip(model.state_dict()))
    bare.load_state_dict(strip(model.state_dict()))
    model.eval(), bare.eval()
    with torch.no_grad():
        with without_scaffold(model):
            assert not any(key.startswith("auxiliary") for key, _ in model.named_parameters())
            inside = model(BATCH)
        for a, b, c in zip(inside, bare(BATCH), model(BATCH), strict=True):
            assert len(a["instances"]) > 0
            for field in ("scores", "pred_masks", "pred_keypoints"):
                assert torch.equal(a["instances"].get(field), b["instances"].get(field))
                assert torch.equal(a["instances"].get(field), c["instances"].get(field))
    assert model.auxiliary is not None


@pytest.mark.parametrize(
    ("rpn", "parts"), [("True", []), ("False", ["box"]), ("False", ["mask"]), ("True", ["box", "mask"])]
)
def test_the_config_chooses_the_heads_of_the_path(rpn, parts):
    model = rcnn(*ALL, *taps("fpn"), "MODEL.AUX.RPN", rpn, "MODEL.AUX.ROI_HEADS", str(parts)).train()
    losses, _ = step(model)
    wanted = (RPN if rpn == "True" else set()).union(*(HEADS[part] for part in parts))
    assert {key.removeprefix("aux_") for key in losses if key.startswith("aux_")} == wanted
    sum(losses.values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("auxiliary."))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.AUX.ROI_HEADS", "['masks']"), r"MODEL.AUX.ROI_HEADS must be of box, mask, keypoint, got \['masks'\]"),
        (("MODEL.AUX.ROI_HEADS", "['mask']", "MODEL.AUX.RPN", "False"), "has none of the detector's heads, .* box$"),
    ],
)
def test_a_path_without_heads_is_refused_in_one_line(overrides, words):
    with pytest.raises(ValueError, match=words):
        rcnn(*AUX, *overrides)


@pytest.mark.parametrize("name", TAPS)
def test_the_path_starts_as_a_copy_of_the_detectors_own(name):
    normed = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.NORM", "BN")
    model = rcnn(*ALL, *normed, *QUANT, *taps(name)).train()
    path = model.auxiliary
    assert path.initialize_from(model) == []
    ours, theirs = path.state_dict(), model.state_dict()
    heads = {key: value for key, value in ours.items() if key.startswith("head.") and "num_batches" not in key}
    assert len(heads) > 25
    assert all(torch.equal(value, theirs[key.removeprefix("head.")]) for key, value in heads.items())
    waiting = len(waiting_adaptors(model))
    assert waiting == len(path.adaptors) + (9 if path.trunk is not None else 0)
    calibrated(model, BATCH)
    assert not waiting_adaptors(model)
    losses, _ = step(model)
    for key in ("loss_rpn_cls", "loss_cls", "loss_mask"):  # the path reads nearly what the detector reads
        assert losses[f"aux_{key}"].item() == pytest.approx(losses[key].item(), rel=0.3), key


def test_a_checkpoint_of_the_detector_starts_the_path_and_one_with_a_path_goes_on(tmp_path):
    from aqdet.checkpoint import AqdetCheckpointer

    detector = rcnn(*MASK)
    AqdetCheckpointer(detector, str(tmp_path)).save("detector")
    model = rcnn(*MASK, *QUANT, *taps("both"), seed=1)
    AqdetCheckpointer(model, str(tmp_path), aux_init="head").load(str(tmp_path / "detector.pth"))
    weight = "roi_heads.mask_head.deconv.weight"
    assert torch.equal(model.auxiliary.head.state_dict()[weight], detector.state_dict()[weight])
    assert waiting_adaptors(model)
    calibrated(model.train(), BATCH)
    AqdetCheckpointer(model, str(tmp_path)).save("whole")
    again = rcnn(*MASK, *QUANT, *taps("both"), seed=2)
    AqdetCheckpointer(again, str(tmp_path)).load(str(tmp_path / "whole.pth"))
    assert not waiting_adaptors(again)
    (losses, _), (expected, _) = step(again), step(model)
    assert all(torch.equal(losses[key], value) for key, value in expected.items())


def test_features_are_distilled():
    teacher = rcnn(*MASK)
    student = rcnn(*MASK)
    student.distillation = Distillation(copy.deepcopy(teacher), feature_weight=2.0, logit_weight=0)
    losses, _ = step(student.eval())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", *RPN, "distill_loss_features"}
    images = student.preprocess_image(BATCH).tensor
    with torch.no_grad():
        levels = [(student.backbone(images), teacher.eval().backbone(images))]
    mine, theirs = levels[0]
    wanted = [(mine[k] - theirs[k]).square().sum() / theirs[k].square().sum() for k in ("p2", "p3", "p4", "p5", "p6")]
    assert losses["distill_loss_features"].item() == pytest.approx(2 * sum(wanted).item() / 5, rel=0.05)


def test_images_without_objects_leave_the_path_finite():
    model = calibrated(rcnn(*ALL, *QUANT, *taps("both")).train(), BATCH)
    losses = losses_of(model, shaped_batch(empty=(0, 1)))
    sum(losses.values()).backward()
    assert losses["aux_loss_mask"] == 0 and all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
