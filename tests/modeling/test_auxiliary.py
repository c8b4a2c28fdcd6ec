import math

import pytest
import torch
from helpers import AUX, QUANT, calibrated, gradients, losses_of, make_batch, make_model

from aqdet.modeling.auxiliary import Adaptor, AuxiliaryPath, strip
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


def test_started_from_the_head_it_predicts_what_the_float_head_predicts():
    model = make_model(*QUANT, *AUX, "MODEL.FPN.RELU", "True")
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


def test_without_relu_in_the_pyramid_the_head_sees_its_positive_part():
    model = make_model(*AUX)
    model.auxiliary.initialize_from(model.head)
    features = [torch.randn(2, 16, s, s) for s in (16, 8, 4, 4, 2)]
    with torch.no_grad():
        ours = model.auxiliary(features)
        theirs = model.head([f.relu() for f in features])
    for a, b in zip(sum(map(list, ours), []), sum(map(list, theirs), []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_an_aligned_adaptor_is_the_identity_on_what_it_was_aligned_to(norm):
    adaptor = Adaptor(3, norm)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 20, 0]).view(3, 1, 1)
    adaptor.align(x)
    torch.testing.assert_close(adaptor(x), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(adaptor(-x - 1), torch.zeros_like(x)) or norm == "BN"


def test_only_a_calibration_batch_aligns():
    model = make_model(*AUX)
    path = model.auxiliary
    path.initialize_from(model.head)
    features = [torch.rand(1, 16, s, s) for s in (16, 8, 4, 4, 2)]
    path(features)  # a training step has gradients
    with torch.no_grad():
        path.eval()(features)  # counting operations for a plan is in evaluation mode
        assert path.needs_alignment and path.adaptors[0].conv.norm.bias.abs().sum() == 0
        path.train()(features)
    assert not path.needs_alignment and path.adaptors[0].conv.norm.bias.abs().sum() > 0
    aligned = path.adaptors[0].conv.norm.bias.clone()
    with torch.no_grad():
        path([2 * f for f in features])
    assert torch.equal(aligned, path.adaptors[0].conv.norm.bias)


def test_the_copied_head_is_a_copy():
    model = make_model(*QUANT, *AUX)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.5)
    model.auxiliary.initialize_from(model.head)
    own, theirs = model.auxiliary.head.state_dict(), model.head.state_dict()
    assert set(theirs) - set(own) and all(torch.equal(own[k], theirs[k]) for k in own)
    storages = {t.data_ptr() for t in model.head.parameters()}
    assert not any(t.data_ptr() in storages for t in model.auxiliary.head.parameters())


def test_a_path_for_other_levels_is_not_cut_short():
    path = make_model(*AUX).auxiliary
    with pytest.raises(ValueError, match="shorter|longer"):
        path([torch.rand(1, 16, 4, 4)] * 3)


def test_strip_takes_only_the_paths_own_keys():
    state = {"auxiliary.head.a": 1, "backbone.auxiliary.b": 2, "auxiliary_c": 3}
    assert strip(state) == {"backbone.auxiliary.b": 2, "auxiliary_c": 3}
    assert "auxiliary.head.a" in state
