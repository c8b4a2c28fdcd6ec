import math

import pytest
import torch
from helpers import AUX, QUANT, calibrated, gradients, losses_of, make_batch, make_model

from aqdet.modeling.auxiliary import AuxiliaryPath
from aqdet.quantization import set_quantization

BATCH = make_batch()
MAIN = ("loss_cls", "loss_box_reg")


def trunk(grads):
    return {n: g for n, g in grads.items() if n.startswith("backbone.")}


def pair(weight):
    model = calibrated(make_model(*QUANT, *AUX, "MODEL.AUX.LOSS_WEIGHT", str(weight)), BATCH)
    for _ in range(3):
        gradients(model, BATCH)
    return model


def test_the_trunks_gradient_changes_with_the_auxiliary_loss():
    model = pair(1.0)
    main, both = trunk(gradients(model, BATCH, MAIN)[1]), trunk(gradients(model, BATCH)[1])
    weights = [n for n in main if n.endswith(("conv1.weight", "conv2.weight", "scale"))]
    assert len(weights) > 30
    assert all(not torch.equal(main[n], both[n]) for n in weights)
    alone = gradients(model, BATCH, ("aux_loss_cls", "aux_loss_box_reg"))[1]
    assert all(alone[n].abs().max() > 0 for n in weights)
    assert not any(n.startswith("head.") for n in alone)


def test_with_weight_zero_it_is_the_main_losss_alone():
    model = pair(0.0)
    main, both = trunk(gradients(model, BATCH, MAIN)[1]), trunk(gradients(model, BATCH)[1])
    for name in main:
        torch.testing.assert_close(main[name], both[name], rtol=1e-6, atol=1e-7)


def test_every_trainable_parameter_gets_a_gradient():
    model = pair(1.0)
    model.zero_grad()
    sum(losses_of(model, BATCH).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_matched_once_and_normalizer_moved_once(monkeypatch):
    model, bare = pair(1.0), calibrated(make_model(*QUANT), BATCH)
    calls = []
    real = model.label_anchors
    monkeypatch.setattr(model, "label_anchors", lambda *a: calls.append(1) or real(*a))
    bare.loss_normalizer = model.loss_normalizer = 50.0
    losses_of(model, BATCH), losses_of(bare, BATCH)
    assert len(calls) == 1
    assert model.loss_normalizer == bare.loss_normalizer != 50.0


def test_schedules():
    def weight(schedule, iteration):
        path = AuxiliaryPath(adaptors=[], head=torch.nn.Identity(), loss_weight=2.0, schedule=schedule, max_iter=100)
        return path.weight_at(iteration)

    assert [weight("constant", i) for i in (0, 50, 100)] == [2, 2, 2]
    assert [weight("linear", i) for i in (0, 25, 100, 200)] == [2, 1.5, 0, 0]
    assert weight("cosine", 25) == pytest.approx(1 + math.cos(math.pi / 4))
    assert weight("cosine", 100) == pytest.approx(0)


def test_the_loss_follows_the_schedule():
    model = pair(1.0)
    model.auxiliary.schedule, model.auxiliary.max_iter = "linear", 10
    full, half = (gradients(model, BATCH, iteration=i)[0]["aux_loss_cls"] for i in (0, 5))
    assert half.item() == pytest.approx(full.item() / 2, rel=1e-5)


@pytest.mark.parametrize("relu", ["True"])
def test_started_from_the_head_it_predicts_what_the_float_head_predicts(relu):
    model = make_model(*QUANT, *AUX, "MODEL.FPN.RELU", relu)
    model.auxiliary.initialize_from(model.head)
    calibrated(model, BATCH)
    assert not model.auxiliary.needs_alignment
    set_quantization(model, False)
    model.train()
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(BATCH).tensor)
        features = [features[name] for name in model.head_in_features]
        ours, theirs = model.auxiliary(features), model.head(features)
    for a, b in zip(sum(map(list, ours), []), sum(map(list, theirs), []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)
