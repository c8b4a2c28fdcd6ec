"""``MODEL.BACKBONE.FREEZE_AT``: what is frozen is calibrated once, stays, and keeps nothing for backward."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from helpers import AUX, CLASSIFIER, QUANT, calibrated, losses_of, make_batch, make_cfg, make_model

from aqdet.engine.solver import build_optimizer
from aqdet.quantization import quantizers

R50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
METHODS = {
    "lsq": (),
    "pact": ("MODEL.QUANT.WEIGHT.QUANTIZER", "pact", "MODEL.QUANT.INPUT.QUANTIZER", "pact"),
    "lqnet": ("MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet", "MODEL.QUANT.INPUT.QUANTIZER", "lqnet"),
    "n2uq": ("MODEL.QUANT.INPUT.QUANTIZER", "n2uq", "MODEL.QUANT.RESIDUAL_QUANTIZER", "lsq"),
    "lsqplus": ("MODEL.QUANT.INPUT.QUANTIZER", "lsqplus", "MODEL.QUANT.RESIDUAL_QUANTIZER", "lsqplus"),
}


def freeze_at(stages):
    return ("MODEL.BACKBONE.FREEZE_AT", str(stages))


def is_frozen(name, stages):
    """Whether a parameter or module belongs to the stem (1) or one of the next stages (2 ...)."""
    parts = ["stem", *(f"res{index}" for index in range(2, stages + 1))][:stages]
    return any(name.startswith(f"backbone.bottom_up.{part}.") for part in parts)


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_parameters_and_scales_of_frozen_stages_are_in_no_group(stages):
    cfg = make_cfg(*QUANT, *freeze_at(stages))
    model = make_model(*QUANT, *freeze_at(stages))
    optimized = {p for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (parameter in optimized) == parameter.requires_grad == (not is_frozen(name, stages)), name
    assert len(list(quantizers(model))) == len(list(quantizers(make_model(*QUANT))))


@pytest.mark.parametrize("overrides", [(), R50, CLASSIFIER], ids=["r18", "r50", "classifier"])
def test_freezing_later_is_the_same(overrides):
    configured = make_model(*QUANT, *overrides, *freeze_at(2))
    later = make_model(*QUANT, *overrides)
    later.backbone.bottom_up.freeze(2)
    for a, b in ((configured, later), (later, configured)):
        ours, theirs = dict(a.named_modules()), dict(b.named_modules())
        assert {name: type(module) for name, module in ours.items()} == {n: type(m) for n, m in theirs.items()}
        assert {n: p.requires_grad for n, p in a.named_parameters()} == {
            n: p.requires_grad for n, p in b.named_parameters()
        }
        assert {n: q.frozen for n, q in quantizers(a)} == {n: is_frozen(n, 2) for n, q in quantizers(b)}
    norms = [m for n, m in configured.named_modules() if is_frozen(n, 2) and n.endswith(".norm")]
    assert norms and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_state_is_calibrated_once_and_stays(method):
    overrides = (*QUANT, *METHODS[method], *freeze_at(2), "SOLVER.BASE_LR", "0.01", "MODEL.FPN.RELU", "True")
    model = calibrated(make_model(*overrides), make_batch())
    assert all(quantizer.is_calibrated for _, quantizer in quantizers(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(make_cfg(*overrides), model)
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(model, make_batch()).values()).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in changed if is_frozen(key, 2)]
    assert any("_quantizer" in key for key in changed)
    assert all(p.grad is None for name, p in model.named_parameters() if is_frozen(name, 2))


def test_values_are_those_of_a_detector_whose_first_stages_train():
    frozen, free = (calibrated(make_model(*QUANT, *o), make_batch()) for o in (freeze_at(2), ()))
    free.load_state_dict(frozen.state_dict(), strict=False)
    for model in (frozen, free):
        model.eval()
    with torch.no_grad():
        (a, b) = (model.backbone(torch.ones(1, 3, 64, 64)) for model in (frozen, free))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["lsq", "lqnet"])
def test_nothing_of_frozen_stages_is_kept_for_backward(method):
    model = calibrated(make_model(*QUANT, *METHODS[method], *freeze_at(2)), make_batch())
    trunk, x = model.backbone.bottom_up, torch.randn(2, 3, 64, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x = trunk.res2(trunk.stem(x))
        assert not kept and not x.requires_grad
        x = trunk.res3(x)
    assert kept and x.requires_grad


def test_the_auxiliary_path_reads_a_frozen_trunk():
    overrides = (*QUANT, *AUX, "MODEL.AUX.TAPS", "backbone", *freeze_at(2))
    model = calibrated(make_model(*overrides), make_batch())
    losses = losses_of(model, make_batch())
    sum(losses.values()).backward()
    assert any(key.startswith("aux_") for key in losses)
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in grads if is_frozen(name, 2)]
    assert any(name.startswith("auxiliary.") for name in grads)
