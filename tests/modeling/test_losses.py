"""Losses of FCOS that Detectron2 lacks, against plain formulas, and the detectors that learn by them."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from helpers import AUX, FCOS, QUANT, calibrated, gradients, losses_of, make_batch, make_cfg, make_model

from aqdet.modeling import strip
from aqdet.modeling.losses import FLOOR, harmonious_iou_loss, quality_focal_loss, task_correlation_loss
from aqdet.modeling.meta_arch import fcos

BATCH = make_batch()
ATSS = (*FCOS, "MODEL.FCOS.ASSIGNMENT", "atss")
QUALITY = (*ATSS, "MODEL.FCOS.CLASS_LOSS", "quality")
HARMONY = ("MODEL.FCOS.HARMONIOUS_IOU_WEIGHT", "0.5", "MODEL.FCOS.TASK_CORRELATION_WEIGHT", "2.0")
GRID = [(p, u) for p in (0.02, 0.3, 0.5, 0.9, 0.99) for u in (0.0, 0.02, 0.4, 0.5, 1.0)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.5])
def test_quality_focal_loss_and_its_gradient_are_the_formulas(exponent):
    pairs = [(x, q) for x in (-6.0, -0.4, 0.3, 5.0) for q in (0.0, 0.25, 0.7, 1.0)]
    logits = torch.tensor([x for x, _ in pairs], dtype=torch.float64, requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([q for _, q in pairs], dtype=torch.float64), exponent)
    loss.sum().backward()
    for (x, q), value, slope in zip(pairs, loss.tolist(), logits.grad.tolist(), strict=True):
        p = sigmoid(x)
        entropy = -(1 - q) * math.log(1 - p) - q * math.log(p)
        assert value == pytest.approx(abs(q - p) ** exponent * entropy, rel=1e-9)
        sign = 1 if p > q else -1
        by_hand = exponent * abs(q - p) ** (exponent - 1) * sign * p * (1 - p) * entropy + abs(q - p) ** exponent * (
            p - q
        )
        assert slope == pytest.approx(by_hand, rel=1e-9)


def test_quality_focal_loss_is_zero_and_flat_at_its_target():
    logits = torch.tensor([0.3, -2.0], requires_grad=True)
    loss = quality_focal_loss(logits, logits.detach().sigmoid(), 2.0)
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and logits.grad.tolist() == [0, 0]


def test_harmonious_iou_loss_and_its_gradient_are_the_formulas():
    overlap = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    loss = harmonious_iou_loss(overlap)
    loss.sum().backward()
    for u, value, slope in zip(overlap.tolist(), loss.tolist(), overlap.grad.tolist(), strict=True):
        assert value == pytest.approx(1.5 * (1 - u) * (1 + u) ** 0.8, abs=1e-12)
        assert slope == pytest.approx(1.5 * (0.8 * (1 - u) * (1 + u) ** -0.2 - (1 + u) ** 0.8), rel=1e-9)


def test_task_correlation_loss_and_its_gradient_are_the_formulas():
    score, overlap = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in zip(*GRID, strict=True)
    )
    loss = task_correlation_loss(score, overlap)
    loss.sum().backward()
    rows = zip(GRID, loss.tolist(), score.grad.tolist(), overlap.grad.tolist(), strict=True)
    for (p, true_u), value, slope_p, slope_u in rows:
        u = max(true_u, FLOOR)
        weight, c = 1 + abs(p - true_u), p**u * u**p
        assert value == pytest.approx(weight * (math.exp(-c) - math.exp(-1)), rel=1e-9, abs=1e-12)
        outer = -weight * math.exp(-c) * c
        assert slope_p == pytest.approx(outer * (u / p + math.log(u)), rel=1e-9, abs=1e-12)
        expected = 0 if true_u < FLOOR else outer * (math.log(p) + p / u)
        assert slope_u == pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- in the detector ---


def slow_terms(model, outputs):
    """The losses of a head's predictions, point by point, without a normalizer."""
    anchors = model.anchor_generator([torch.zeros(1, 1, *level.shape[2:]) for level in outputs[0]])
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in BATCH])
    logits, deltas = (torch.cat(kind, dim=1) for kind in model.by_anchor([list(kind) for kind in outputs[:2]]))
    points = torch.cat([level.tensor for level in anchors])
    terms = {"cls": 0.0, "iou": 0.0, "task": 0.0}
    weighted = []
    for image in range(len(labels)):
        matched = getattr(boxes[image], "tensor", boxes[image])
        for r in range(len(points)):
            own, quality = labels[image][r].item(), 0.0
            if own < 3:
                stride = (points[r, 2] - points[r, 0]).item()
                x, y = ((points[r, :2] + points[r, 2:]) / 2).tolist()
                left, top, right, bottom = (max(d, 0) * stride for d in deltas[image, r].tolist())
                a, b = (x - left, y - top, x + right, y + bottom), matched[r].tolist()
                shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
                union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
                hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
                quality = shared / union
                best = max(sigmoid(v) for v in logits[image, r].tolist())
                weighted.append((best, 1 - quality + (hull - union) / hull))
                p, u = sigmoid(logits[image, r, own].item()), quality
                terms["iou"] += 1.5 * (1 - u) * (1 + u) ** 0.8
                c = max(p, FLOOR) ** max(u, FLOOR) * max(u, FLOOR) ** max(p, FLOOR)
                terms["task"] += (1 + abs(p - u)) * (math.exp(-c) - math.exp(-1))
            for k in range(3):
                p, q = sigmoid(logits[image, r, k].item()), quality if k == own else 0.0
                terms["cls"] += (q - p) ** 2 * (-(1 - q) * math.log(1 - p) - q * math.log(p))
    mean = sum(weight for weight, _ in weighted) / len(weighted)
    terms["loc"] = 2 * sum(weight / mean * giou for weight, giou in weighted)
    return terms, len(weighted)


def lively(*overrides):
    """A detector with predictions of some size, and what its head predicts at each call."""
    model, kept = make_model(*overrides), []
    with torch.no_grad():
        model.head.bbox_pred.bias.fill_(1.5)
        model.head.cls_score.weight.mul_(20)
    model.head.register_forward_hook(lambda m, i, o: kept.append(o))
    return model, kept


@pytest.mark.parametrize("arch", [QUALITY, ATSS], ids=["quality", "focal"])
def test_losses_of_a_batch_are_the_slow_ones(arch):
    model, kept = lively(*arch, *HARMONY)
    losses = losses_of(model, BATCH)
    terms, number = slow_terms(model, kept[0])
    normalizer = 0.9 * 300 + 0.1 * number
    assert number > 10 and model.loss_normalizer == pytest.approx(normalizer)
    expected = {"loss_fcos_iou": 0.5 * terms["iou"], "loss_fcos_task": 2 * terms["task"]}
    if arch is QUALITY:
        expected |= {"loss_fcos_cls": terms["cls"], "loss_fcos_loc": terms["loc"]}
        assert set(losses) == set(expected)
    else:
        plain = make_model(*ATSS)
        plain.load_state_dict(model.state_dict())
        theirs = losses_of(plain, BATCH)
        assert set(losses) == set(expected) | set(theirs)
        assert all(torch.equal(losses[key], value) for key, value in theirs.items())
    for key, value in expected.items():
        assert losses[key].item() * normalizer == pytest.approx(value, rel=1e-4), key


def test_the_boxes_weights_average_to_one_over_all_processes(monkeypatch):
    model, _ = lively(*QUALITY)
    model.loss_normalizer = 30.0
    alone = losses_of(model, BATCH)

    def another_process(tensors):
        """One that has as many positive points with twice the mean score."""
        for sums in tensors:
            sums += sums * torch.tensor([2.0, 1.0])
            sums /= 2

    monkeypatch.setattr(fcos, "average_over_processes", another_process)
    model.loss_normalizer = 30.0
    shared = losses_of(model, BATCH)
    assert torch.equal(shared["loss_fcos_cls"], alone["loss_fcos_cls"])
    torch.testing.assert_close(shared["loss_fcos_loc"], alone["loss_fcos_loc"] * (2 / 3))
    with torch.no_grad():  # as in calibration, where processes do not wait for each other
        model.loss_normalizer = 30.0
        torch.testing.assert_close(losses_of(model, BATCH)["loss_fcos_loc"], alone["loss_fcos_loc"])


def test_overlaps_as_targets_pass_no_gradient_to_the_boxes():
    model, _ = lively(*QUALITY)
    _, grads = gradients(model, BATCH, keys={"loss_fcos_cls"})
    assert "head.bbox_pred.weight" not in grads and grads["head.cls_score.weight"].abs().max() > 0
    _, grads = gradients(model, BATCH, keys={"loss_fcos_loc"})
    assert "head.cls_score.weight" not in grads and grads["head.bbox_pred.weight"].abs().max() > 0
    model, _ = lively(*QUALITY, *HARMONY)
    _, grads = gradients(model, BATCH, keys={"loss_fcos_task"})
    assert all(grads[f"head.{name}.weight"].abs().max() > 0 for name in ("cls_score", "bbox_pred"))


def test_without_a_centerness_nothing_of_it_is_left():
    arch = (*QUALITY, *QUANT, "MODEL.FPN.RELU", "True")
    model = calibrated(make_model(*arch, *AUX, "MODEL.AUX.TAPS", "both", "MODEL.EXTRA_LOSS.ENABLED", "True"), BATCH)
    assert not any("ctrness" in key for key in model.state_dict())
    losses, grads = gradients(model, BATCH)
    kinds = {"loss_fcos_cls", "loss_fcos_loc"}
    assert set(losses) == kinds | {f"{part}_{kind}" for part in ("aux", "extra") for kind in kinds}
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    assert set(grads) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    bare = make_model(*arch)
    bare.load_state_dict(strip(model.state_dict()))
    for a, b in zip(model.eval()(BATCH), bare.eval()(BATCH), strict=True):
        assert len(a["instances"]) > 0 and torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("empty", [(1,), (0, 1)])
def test_images_without_boxes(empty):
    model = make_model(*QUALITY, *HARMONY, *AUX)
    losses, grads = gradients(model, make_batch(empty=empty))
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert (losses["loss_fcos_loc"] == 0) == (losses["loss_fcos_task"] == 0) == (len(empty) == 2)
    assert losses["loss_fcos_cls"] > 0


def test_the_path_starts_from_the_head_and_has_its_targets(monkeypatch):
    model, kept = make_model(*QUALITY, *HARMONY, *AUX), []
    assert model.auxiliary.initialize_from(model) == []
    model.head.register_forward_hook(lambda m, i, o: kept.append(o))
    monkeypatch.setattr(model.auxiliary, "forward", lambda *_: kept[-1])
    losses = losses_of(model, BATCH)
    for key in ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_iou", "loss_fcos_task"):
        assert losses[key] > 0 and torch.equal(losses[key], losses[f"aux_{key}"])


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("CLASS_LOSS", "qfl", "MODEL.FCOS.CLASS_LOSS must be one of focal, quality, got 'qfl'"),
        ("HARMONIOUS_IOU_WEIGHT", "-1.0", "MODEL.FCOS.HARMONIOUS_IOU_WEIGHT must not be negative, got -1.0"),
        ("TASK_CORRELATION_WEIGHT", "-0.5", "MODEL.FCOS.TASK_CORRELATION_WEIGHT must not be negative, got -0.5"),
    ],
)
def test_wrong_values_are_one_line(key, value, words):
    with pytest.raises(ValueError, match=words) as error:
        build_model(make_cfg(*FCOS, f"MODEL.FCOS.{key}", value))
    assert "\n" not in str(error.value)
