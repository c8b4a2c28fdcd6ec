"""Parameter groups."""

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.solver import build_optimizer as detectron2_build_optimizer
from helpers import AUX, QUANT, make_cfg, make_model

from aqdet.engine.solver import RelativeStep, build_optimizer, with_relative_step
from aqdet.quantization import quantizers

SOLVER = (
    *("SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.01", "SOLVER.WEIGHT_DECAY_NORM", "0.002"),
    *("SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.003"),
    *("MODEL.QUANT.SCALE_LR", "0.05", "MODEL.QUANT.PACT_ALPHA_DECAY", "0.0007"),
)


def values_by_name(model, optimizer):
    """Parameter name -> (lr, weight decay); every parameter may be in one group only."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_every_trainable_parameter_is_in_one_group():
    frozen = ("MODEL.BACKBONE.FREEZE_AT", "2")
    model = make_model(*QUANT, *AUX, *frozen)
    found = values_by_name(model, build_optimizer(make_cfg(*QUANT, *AUX, *SOLVER, *frozen), model))
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "backbone.bottom_up.stem.conv1.weight" not in found


def test_values_by_kind_of_parameter():
    model = make_model(*QUANT, *AUX)
    found = values_by_name(model, build_optimizer(make_cfg(*QUANT, *AUX, *SOLVER), model))
    assert found["head.cls_score.weight"] == (0.1, 0.01)
    assert found["head.cls_score.bias"] == (0.2, 0.003)
    assert found["backbone.bottom_up.res2.0.conv1.norm.weight"] == (0.1, 0.002)
    # One BN a level, its affine shared.
    assert isinstance(model.head.cls_subnet[1], CycleBatchNormList)
    assert found["head.cls_subnet.1.weight"] == (0.1, 0.002)
    assert found["head.cls_subnet.1.bias"] == (0.2, 0.003)
    assert found["auxiliary.head.cls_subnet.1.weight"] == (0.1, 0.002)
    of_quantizers = {(f"{name}.{key}", key) for name, q in quantizers(model) for key, _ in q.named_parameters()}
    assert {key for _, key in of_quantizers} == {"scale", "alpha"}
    for name, key in of_quantizers:
        assert found[name] == pytest.approx((0.05, 0.0007 if key == "alpha" else 0.0)), name


def test_scales_of_activations_have_a_factor_of_their_own():
    model = make_model(*QUANT, *AUX)
    factor = ("MODEL.QUANT.INPUT.SCALE_LR_FACTOR", "4.0")
    found = values_by_name(model, build_optimizer(make_cfg(*QUANT, *AUX, *SOLVER, *factor), model))
    rates = {"weight": set(), "input": set()}
    for name, quantizer in quantizers(model):
        rates[quantizer.spec.role] |= {found[f"{name}.{key}"][0] for key, _ in quantizer.named_parameters()}
    assert rates == {"weight": {0.05}, "input": {0.2}}
    assert found["head.cls_score.weight"] == (0.1, 0.01)


def test_as_detectron2_where_there_is_nothing_new():
    overrides = (*SOLVER, "MODEL.RETINANET.NORM", "")
    cfg, model = make_cfg(*overrides), make_model(*overrides)
    cfg.SOLVER.WEIGHT_DECAY = 0.0001
    ours, theirs = (build(cfg, model) for build in (build_optimizer, detectron2_build_optimizer))
    assert values_by_name(model, ours) == values_by_name(model, theirs)
    assert len(ours.param_groups) == len(theirs.param_groups)


def test_gradient_clipping():
    model = torch.nn.Linear(1, 1, bias=False)
    cfg = make_cfg("SOLVER.BASE_LR", "1.0", "SOLVER.WEIGHT_DECAY", "0.0")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    optimizer = build_optimizer(cfg, model)
    before = model.weight.item()
    model.weight.grad = torch.full((1, 1), 100.0)
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 0.25)


def test_adamw_decays_weights_apart_from_its_step():
    model = torch.nn.Linear(1, 1, bias=False)
    cfg = make_cfg("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.5")
    optimizer = build_optimizer(cfg, model)
    before = model.weight.item()
    model.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    # The first step is the learning rate in the direction of the gradient.
    assert model.weight.item() == pytest.approx(before * (1 - 0.1 * 0.5) - 0.1)


def test_adamw_keeps_the_groups_and_clips():
    model = make_model(*QUANT)
    cfg = make_cfg(*QUANT, *SOLVER, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", "True")
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW) and isinstance(optimizer, RelativeStep)
    sgd = build_optimizer(make_cfg(*QUANT, *SOLVER), model)
    assert values_by_name(model, optimizer) == values_by_name(model, sgd)


BASES = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
bases = pytest.mark.parametrize("base", list(BASES))


def slow_relative(value, grads, unit, lr, decay):
    """Adam (1412.6980) on ``t`` where the value is ``unit t``, its steps bounded by the learning rate; float64."""
    first = second = 0.0
    for step, grad in enumerate(grads, 1):
        size = abs(unit(value))
        first, second = 0.9 * first + 0.1 * grad * size, 0.999 * second + 0.001 * (grad * size) ** 2
        share = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)) ** 0.5 + 1e-8)
        value = value * (1 - lr * decay) - lr * min(max(share, -1), 1) * size
    return value


@bases
@pytest.mark.parametrize("size", [3e-4, 0.5, 40.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_relative_step_is_a_share_of_the_unit(base, size, decay):
    scale, offset = (torch.nn.Parameter(torch.tensor([value])) for value in (size, 0.0))
    groups = [{"params": [scale], "weight_decay": decay}, {"params": [offset], "weight_decay": 0.0}]
    groups = [{**group, "relative": True} for group in groups]
    optimizer = with_relative_step(BASES[base])(groups, units={scale: scale, offset: scale}, lr=0.1)
    grads = torch.randn(6, generator=torch.Generator().manual_seed(0)).tolist()
    sizes = []
    for grad in grads:
        sizes.append(scale.item())
        scale.grad, offset.grad = (torch.full((1,), grad) for _ in range(2))
        optimizer.step()
    assert scale.item() == pytest.approx(slow_relative(size, grads, lambda value: value, 0.1, decay), rel=1e-5)
    taken = iter(sizes)
    assert offset.item() == pytest.approx(slow_relative(0.0, grads, lambda _: next(taken), 0.1, 0.0), rel=1e-5)


@bases
def test_other_parameters_step_as_without_the_rule(base):
    plain, mixed, scale = (torch.nn.Parameter(torch.full((3,), 0.7)) for _ in range(3))
    options = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if base == "SGD" else {})
    theirs = BASES[base]([plain], **options)
    groups = [{"params": [mixed], "relative": False}, {"params": [scale], "relative": True}]
    ours = with_relative_step(BASES[base])(groups, units={scale: scale}, **options)
    for seed in range(5):
        grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        plain.grad, mixed.grad, scale.grad = grad.clone(), grad.clone(), grad.clone()
        theirs.step()
        ours.step()
    assert torch.equal(plain, mixed) and not torch.equal(plain, scale)


@bases
@pytest.mark.parametrize("grads", [[1e-12] * 20 + [1e6] * 20, [1e15] * 3, [-1.0] * 40, [0.0, 0.0, 5.0] * 20])
def test_an_iteration_changes_a_scale_by_at_most_the_learning_rate(base, grads):
    scale = torch.nn.Parameter(torch.tensor([3e-4]))
    groups = [{"params": [scale], "relative": True, "weight_decay": 0.0}]
    optimizer = with_relative_step(BASES[base])(groups, units={scale: scale}, lr=0.05)
    for grad in grads:
        before = scale.item()
        scale.grad = torch.tensor([grad])
        optimizer.step()
        assert abs(scale.item() / before - 1) <= 0.05 * (1 + 1e-5)


@bases
@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_the_share_does_not_depend_on_the_size_of_the_gradient_or_of_the_scale(base, factor):
    """Elements, batch, processes and bit width scale the gradient; the unit scales both."""
    scales = [torch.nn.Parameter(torch.tensor([0.2 * unit])) for unit in (1.0, 1.0, factor)]
    groups = [{"params": scales, "relative": True}]
    optimizer = with_relative_step(BASES[base])(groups, units={s: s for s in scales}, lr=0.05)
    for grad in torch.randn(20, generator=torch.Generator().manual_seed(0)):
        for scale, times in zip(scales, (1.0, factor, 1 / factor), strict=True):
            scale.grad = grad.reshape(1) * times
        optimizer.step()
    one, same, other = (scale.item() for scale in scales)
    assert same == pytest.approx(one, rel=1e-4) and other / factor == pytest.approx(one, rel=1e-4)


@bases
def test_without_a_gradient_a_relative_parameter_stays(base):
    scale = torch.nn.Parameter(torch.tensor([2.0]))
    groups = [{"params": [scale], "relative": True}]
    with_relative_step(BASES[base])(groups, units={scale: scale}, lr=0.1).step()
    assert scale.item() == 2.0


@bases
def test_clipping_leaves_relative_parameters_alone(base):
    model = make_model(*QUANT)
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.25")
    optimizer = build_optimizer(make_cfg(*QUANT, *SOLVER, *clip, "SOLVER.OPTIMIZER", base), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    optimizer.step()
    learned = {parameter for _, q in quantizers(model) for parameter in q.parameters()}
    for parameter in model.parameters():
        assert (parameter.grad == (100.0 if parameter in learned else 0.25)).all()


@bases
def test_an_optimizer_state_of_before_is_refused_in_a_line(base):
    model, plain = make_model(*QUANT), make_model()
    ours, theirs = (
        build_optimizer(make_cfg(*overrides, *SOLVER, "SOLVER.OPTIMIZER", base), m)
        for overrides, m in ((QUANT, model), ((), plain))
    )
    states = [optimizer.state_dict() for optimizer in (ours, theirs)]
    for state in states:
        for group in state["param_groups"]:
            del group["relative"]
    with pytest.raises(ValueError, match="older version of aqdet.*MODEL.WEIGHTS, without --resume"):
        ours.load_state_dict(states[0])
    theirs.load_state_dict(states[1])
    assert not any(group["relative"] for group in theirs.param_groups)


@pytest.mark.parametrize(
    "quantizer, keys", [("lsq", {"scale"}), ("lsqplus", {"scale", "offset"}), ("n2uq", {"scale", "start", "intervals"})]
)
@bases
def test_what_a_quantizer_learned_moves_by_a_share_of_its_scale(base, quantizer, keys):
    overrides = (*QUANT, "MODEL.QUANT.INPUT.QUANTIZER", quantizer)
    model = make_model(*overrides)
    cfg = make_cfg(*overrides, "SOLVER.OPTIMIZER", base, "SOLVER.BASE_LR", "0.3", "MODEL.QUANT.SCALE_LR", "0.01")
    optimizer = build_optimizer(cfg, model)
    found = next(q for _, q in quantizers(model) if {name for name, _ in q.named_parameters()} == keys)
    with torch.no_grad():
        found.scale.fill_(0.002)
    before = {name: parameter.detach().clone() for name, parameter in found.named_parameters()}
    for parameter in found.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach() - before[name], torch.full_like(parameter, -0.01 * 0.002))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER must be one of SGD, AdamW, got 'adam'"):
        build_optimizer(make_cfg("SOLVER.OPTIMIZER", "adam"), make_model())
