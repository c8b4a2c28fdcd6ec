"""What the auxiliary path is compared with: the extra head, and distillation."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from helpers import (
    AUX,
    FCOS,
    QUANT,
    assert_off_is_off,
    calibrated,
    gradients,
    losses_of,
    make_batch,
    make_cfg,
    make_model,
)

from aqdet.analysis.plan import make_plan, total
from aqdet.config import detector_only
from aqdet.layers import QuantConv2d
from aqdet.modeling import quantizable_layers, strip, without_scaffold
from aqdet.modeling.scaffold.distillation import Distillation, box_loss, feature_loss, logit_loss
from aqdet.quantization import quantizers

BATCH = make_batch()
EXTRA = ("MODEL.EXTRA_LOSS.ENABLED", "True")
RELU = ("MODEL.FPN.RELU", "True")
ARCHITECTURES = pytest.mark.parametrize("arch", [(), tuple(FCOS)], ids=["retinanet", "fcos"])


def distilled(*overrides, weights=(1.0, 1.0, 0.0)):
    """A calibrated 4-bit detector and its teacher, of other weights."""
    model = calibrated(make_model(*QUANT, *RELU, *overrides), BATCH)
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    floats = [part for pair in pairs if not pair[0].startswith(("MODEL.AUX.", "MODEL.EXTRA_LOSS.")) for part in pair]
    teacher = make_model(*RELU, *floats, seed=1)
    keys = "feature_weight", "logit_weight", "box_weight"
    model.distillation = Distillation(teacher, **dict(zip(keys, weights, strict=True)))
    return model


# --- the extra head ---


@ARCHITECTURES
def test_the_extra_head_is_quantized_as_the_head_and_named_apart(arch):
    rule = str([["^head\\.cls_subnet", {"WEIGHT.NUM_BITS": 3}], ["bbox_pred", {"ENABLED": False}]])
    model = make_model(*arch, *QUANT, *EXTRA, "MODEL.QUANT.RULES", rule)
    own = {n: q for n, q in quantizers(model.extra_head)}
    assert {n: q.spec for n, q in own.items()} == {n: q.spec for n, q in quantizers(model.head)}
    assert any(q.spec.num_bits == 3 for q in own.values())
    assert all(q.name == f"extra_head.{n}" for n, q in own.items())
    assert not isinstance(model.extra_head.bbox_pred, QuantConv2d)
    names = set(model.state_dict())
    bare = make_model(*arch, *QUANT, "MODEL.QUANT.RULES", rule)
    assert names - set(bare.state_dict()) == {f"extra_head.{k}" for k in model.head.state_dict()}
    assert set(strip(model.state_dict())) == set(bare.state_dict())
    assert not any(n.startswith("extra_head.") for n, _ in quantizable_layers(model))
    assert all(torch.equal(bare.state_dict()[k], v) for k, v in strip(model.state_dict()).items())


@ARCHITECTURES
def test_its_losses_are_the_heads_on_its_predictions_and_reach_the_trunk(arch):
    model = calibrated(make_model(*arch, *QUANT, *RELU, *EXTRA, "MODEL.EXTRA_LOSS.LOSS_WEIGHT", "0.5"), BATCH)
    losses, _ = gradients(model, BATCH)
    extra = {k for k in losses if k.startswith("extra_")}
    assert {f"extra_{k}" for k in losses if k not in extra} == extra
    _, alone = gradients(model, BATCH, keys=extra)
    assert any(n.startswith("backbone.bottom_up.stem") and g.abs().max() > 0 for n, g in alone.items())
    assert {n for n in alone if n.startswith("extra_head.")} == {
        f"extra_head.{n}" for n, _ in model.extra_head.named_parameters()
    }
    assert not any(n.startswith("head.") for n in alone)
    # The losses that a detector with that head for its own would have.
    twin, state = make_model(*arch, *QUANT, *RELU), model.state_dict()
    own = {key.removeprefix("extra_"): value for key, value in state.items() if key.startswith("extra_head.")}
    twin.load_state_dict({**strip(state), **own})
    for key, value in gradients(twin, BATCH)[0].items():
        torch.testing.assert_close(losses[f"extra_{key}"], 0.5 * value)


def test_a_copy_of_the_head_would_only_double_the_trunks_gradient():
    """Why the extra head is not a copy."""
    model = calibrated(make_model(*QUANT, *RELU, *EXTRA), BATCH)
    model.extra_head.load_state_dict(model.head.state_dict())
    for _ in range(3):
        gradients(model, BATCH)
    losses, both = gradients(model, BATCH)
    _, main = gradients(model, BATCH, keys={k for k in losses if not k.startswith("extra_")})
    name = "backbone.bottom_up.res4.0.conv1.weight"
    torch.testing.assert_close(both[name], 2 * main[name], rtol=1e-3, atol=1e-6)


# --- distillation ---


def test_the_feature_loss_by_hand():
    teacher = [torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.full((1, 1, 2, 2), 2.0)]
    student = [torch.tensor([3.0, 3.0]).view(1, 2, 1, 1), torch.zeros(1, 1, 2, 2)]
    assert feature_loss(student, teacher).item() == pytest.approx((1 / 25 + 1) / 2)
    assert feature_loss(teacher, teacher) == 0
    assert feature_loss([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)]) == 0
    # A level that is dead in the teacher has the millionth of the largest mean square as its size: 0.1^2 / (4e-6).
    dead = [torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 3), 1e-9)]
    off = [torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 3), 0.1)]
    assert feature_loss(off, dead).item() == pytest.approx(0.01 / 4e-6 / 2, rel=1e-4)


def test_the_logit_loss_is_the_sum_of_divergences_and_its_gradient_the_difference():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, r, 3, generator=generator, requires_grad=True) for r in (4, 1)]
    teacher = [2 * torch.randn(2, r, 3, generator=generator) for r in (4, 1)]
    weights = [torch.rand(2, r, 1, generator=generator) for r in (4, 1)]
    loss = logit_loss(student, teacher, weights)
    loss.backward()
    slow = 0.0
    for s, t, w in zip(student, teacher, weights, strict=True):
        for index in range(s.numel()):
            p, q = (1 / (1 + math.exp(-x.flatten()[index].item())) for x in (t, s))
            factor = w.expand_as(s).flatten()[index].item()
            slow += factor * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        torch.testing.assert_close(s.grad, w * (s.detach().sigmoid() - t.sigmoid()))
    assert loss.item() == pytest.approx(slow, rel=1e-5)
    assert logit_loss(teacher, teacher, weights).item() == pytest.approx(0, abs=1e-6)


def test_the_box_loss_is_the_sum_of_weighted_distances_and_its_gradient_their_signs():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(2, r, 4, generator=generator, requires_grad=True) for r in (3, 1)]
    teacher = [torch.randn(2, r, 4, generator=generator) for r in (3, 1)]
    weights = [torch.rand(2, r, 1, generator=generator) for r in (3, 1)]
    loss = box_loss(student, teacher, weights)
    loss.backward()
    slow = 0.0
    for s, t, w in zip(student, teacher, weights, strict=True):
        slow += sum(
            w[n, r, 0].item() * abs(s[n, r, k].item() - t[n, r, k].item())
            for n in range(2)
            for r in range(s.shape[1])
            for k in range(4)
        )
        torch.testing.assert_close(s.grad, w * (s.detach() - t).sign())
    assert loss.item() == pytest.approx(slow, rel=1e-5)


@ARCHITECTURES
def test_boxes_are_distilled_where_the_teacher_is_sure(arch):
    model = distilled(*arch, weights=(0.0, 0.0, 2.0))
    kept = {}
    handle = model.head.register_forward_hook(lambda _, inputs, out: kept.setdefault("head", out))
    losses, grads = gradients(model, BATCH, keys={"distill_loss_boxes"})
    handle.remove()
    assert {k for k in losses if k.startswith("distill_")} == {"distill_loss_boxes"}
    assert grads["head.bbox_pred.weight"].abs().max() > 0 and "head.cls_score.weight" not in grads
    teacher, wanted = model.distillation.teacher, 0.0
    with torch.no_grad():
        levels = teacher.backbone(teacher.preprocess_image(BATCH).tensor)
        targets = teacher.head([levels[n] for n in model.head_in_features])
    for logits, s, t in zip(targets[0], kept["head"][1], targets[1], strict=True):
        sure = logits.sigmoid().unflatten(1, (-1, 3)).amax(dim=2)
        wanted += ((s - t).abs().unflatten(1, (-1, 4)) * sure.unsqueeze(2)).sum().item()
    assert losses["distill_loss_boxes"].item() == pytest.approx(2 * wanted / model.loss_normalizer, rel=1e-4)


@ARCHITECTURES
def test_distillation_in_a_step(arch):
    model = distilled(*arch, weights=(2.0, 3.0, 0.0))
    teacher = model.distillation.teacher
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    losses, _ = gradients(model, BATCH)
    assert {k for k in losses if k.startswith("distill_")} == {"distill_loss_features", "distill_loss_logits"}
    _, grads = gradients(model, BATCH, keys={"distill_loss_features"})
    assert grads["backbone.bottom_up.stem.conv1.weight"].abs().max() > 0
    assert not any(n.startswith("head.") for n in grads)
    _, grads = gradients(model, BATCH, keys={"distill_loss_logits"})
    assert grads["head.cls_score.weight"].abs().max() > 0 and "head.bbox_pred.weight" not in grads
    assert ("head.ctrness.weight" in grads) == bool(arch)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    # Against the losses by hand, from what student and teacher compute for the batch.
    kept = {}
    handles = [
        m.register_forward_hook(lambda m, i, o, n=n: kept.setdefault(n, o))
        for n, m in (("features", model.backbone), ("head", model.head))
    ]
    losses, _ = gradients(model, BATCH)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        levels = teacher.backbone(teacher.preprocess_image(BATCH).tensor)
        targets = teacher.head([levels[n] for n in model.head_in_features])
        names = model.head_in_features
        relative = [(kept["features"][n] - levels[n]).square().sum() / levels[n].square().sum() for n in names]
        terms = 0.0
        for index in (0, 2) if arch else (0,):
            for level, (s, t) in enumerate(zip(kept["head"][index], targets[index], strict=True)):
                p, q = t.double().sigmoid(), s.double().sigmoid()
                divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
                # Channels are anchor after anchor, each with its three classes.
                sure = targets[0][level].sigmoid().unflatten(1, (-1, 3)).amax(dim=2)
                terms += (divergence.unflatten(1, (sure.shape[1], -1)) * sure.unsqueeze(2)).sum()
    assert losses["distill_loss_features"].item() == pytest.approx(2 * sum(relative).item() / len(names), rel=1e-4)
    assert losses["distill_loss_logits"].item() == pytest.approx(3 * terms.item() / model.loss_normalizer, rel=1e-3)


def test_a_float_student_of_the_teachers_weights_in_evaluation_statistics_has_nothing_to_learn():
    model, teacher = make_model(*RELU), make_model(*RELU)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    model.distillation = Distillation(teacher, feature_weight=1.0, logit_weight=1.0)
    losses = losses_of(model, BATCH)
    assert losses["distill_loss_features"] == 0
    assert losses["distill_loss_logits"].item() == pytest.approx(0, abs=1e-4)


def test_a_weight_of_zero_leaves_the_term_out(monkeypatch):
    model, teacher = make_model(), make_model()
    model.distillation = Distillation(teacher, feature_weight=0.0, logit_weight=1.0)
    assert "distill_loss_features" not in losses_of(model, BATCH)
    model.distillation = Distillation(teacher, feature_weight=1.0, logit_weight=0.0)
    monkeypatch.setattr(teacher.head, "forward", lambda *_: pytest.fail("ran"))
    assert "distill_loss_logits" not in losses_of(model, BATCH)


def test_the_main_losses_and_the_normalizer_do_not_know_of_the_rivals():
    model = distilled(*AUX, *EXTRA)
    for _ in range(3):
        gradients(model, BATCH)
    losses, _ = gradients(model, BATCH)
    normalizer = model.loss_normalizer
    with without_scaffold(model):
        bare, _ = gradients(model, BATCH)
    assert model.loss_normalizer == normalizer
    assert all(torch.equal(losses[k], v) for k, v in bare.items())
    prefixes = {k.partition("_loss")[0] for k in set(losses) - set(bare)}
    assert prefixes == {"aux", "extra", "distill"}


# --- dropped is dropped ---


@pytest.mark.parametrize("arch, beside", [(tuple(FCOS), ()), ((), (*AUX, "MODEL.AUX.TAPS", "both"))])
def test_dropped_is_dropped(arch, beside, monkeypatch):
    model = distilled(*arch, *EXTRA, *beside)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    teachers = {id(p) for p in model.distillation.teacher.parameters()}
    assert not teachers & {id(p) for group in optimizer.param_groups for p in group["params"]}
    gradients(model, BATCH)
    optimizer.step()
    bare = make_model(*arch, *QUANT, *RELU)
    assert set(bare.state_dict()) == set(strip(model.state_dict()))
    assert not any("teacher" in k or "distillation" in k for k in model.state_dict())
    bare.load_state_dict(strip(model.state_dict()))
    model.eval(), bare.eval()
    model.test_score_thresh = bare.test_score_thresh = 0.0
    parts = model.extra_head, model.distillation
    monkeypatch.setattr(parts[0], "forward", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(parts[1].teacher.backbone, "forward", lambda *_: pytest.fail("ran"))
    with without_scaffold(model):
        assert model.extra_head is model.distillation is None
        kinds = [(n, type(m)) for n, m in model.named_modules()]
        inside = model(BATCH)
    assert [(n, type(m)) for n, m in bare.named_modules()] == kinds
    assert (model.extra_head, model.distillation) == parts and "extra_head" in dict(model.named_children())
    for a, b, c in zip(inside, bare(BATCH), model(BATCH), strict=True):
        assert len(a["instances"]) > 0
        for other in (b, c):
            assert torch.equal(a["instances"].scores, other["instances"].scores)
            assert torch.equal(a["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)


def test_off_is_off_beside_them():
    theirs = make_model(*RELU)
    model = distilled(*EXTRA)
    assert_off_is_off(theirs, model, BATCH)


def test_the_plan_counts_the_extra_head_as_training_only():
    rows = make_plan(make_model(*QUANT, *RELU, *EXTRA), (64, 64))
    bare = make_plan(make_model(*QUANT, *RELU), (64, 64))
    assert total(rows, "float", "quantized") == total(bare, "float", "quantized")
    head = [(row.name, row.macs, row.weight) for row in bare if row.name.startswith("head.")]
    own = [(row.name.removeprefix("extra_"), row.macs, row.weight) for row in rows if row.part == "auxiliary"]
    assert own == head


def test_a_config_of_the_detector_alone_and_the_one_it_comes_from():
    cfg = make_cfg(*QUANT, *AUX, *EXTRA, "MODEL.DISTILL.ENABLED", "True")
    cfg.freeze()
    alone = detector_only(cfg)
    assert not (alone.MODEL.AUX.ENABLED or alone.MODEL.EXTRA_LOSS.ENABLED or alone.MODEL.DISTILL.ENABLED)
    assert alone.MODEL.QUANT.ENABLED and not alone.is_frozen() and cfg.MODEL.AUX.ENABLED
    assert set(build_model(alone).state_dict()) == set(make_model(*QUANT).state_dict())


def test_wrong_values_are_one_line():
    with pytest.raises(ValueError, match="EXTRA_LOSS.LOSS_WEIGHT must not be negative, got -1.0"):
        build_model(make_cfg(*EXTRA, "MODEL.EXTRA_LOSS.LOSS_WEIGHT", "-1."))
    with pytest.raises(ValueError, match="DISTILL.FEATURE_WEIGHT must not be negative, got -2"):
        Distillation(torch.nn.Identity(), feature_weight=-2, logit_weight=1)
    with pytest.raises(ValueError, match="FEATURE_WEIGHT, LOGIT_WEIGHT, BOX_WEIGHT are all 0"):
        Distillation(torch.nn.Identity(), feature_weight=0, logit_weight=0)
