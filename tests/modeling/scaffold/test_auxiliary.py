import itertools
import math

import pytest
import torch
import torch.distributed as dist
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from helpers import AUX, QUANT, calibrated, gradients, losses_of, make_batch, make_cfg, make_model

from aqdet.modeling import without_scaffold
from aqdet.modeling.scaffold import (
    TAPS,
    Adaptor,
    Aggregation,
    AuxiliaryPath,
    aligning,
    strip,
    tapped_sums,
    waiting_adaptors,
)
from aqdet.quantization import calibrate, set_quantization

BATCH = make_batch()
MAIN = ("loss_cls", "loss_box_reg")


def trunk(grads):
    return {n: g for n, g in grads.items() if n.startswith("backbone.")}


def pair(weight, taps="fpn"):
    extra = ("MODEL.AUX.LOSS_WEIGHT", str(weight), "MODEL.AUX.TAPS", taps)
    model = calibrated(make_model(*QUANT, *AUX, *extra), BATCH)
    for _ in range(3):
        gradients(model, BATCH)
    return model


@pytest.mark.parametrize("taps", TAPS)
def test_the_trunks_gradient_changes_with_the_auxiliary_loss(taps):
    model = pair(1.0, taps)
    main, both = trunk(gradients(model, BATCH, MAIN)[1]), trunk(gradients(model, BATCH)[1])
    weights = [n for n in main if n.endswith(("conv1.weight", "conv2.weight", "scale"))]
    if taps == "backbone":
        # The route does not pass the trunk's pyramid, nor what quantizes the last block's output for it.
        weights = [n for n in weights if "bottom_up" in n and "res5.1.output_stream" not in n]
    assert len(weights) > 30
    assert all(not torch.equal(main[n], both[n]) for n in weights)
    alone = gradients(model, BATCH, ("aux_loss_cls", "aux_loss_box_reg"))[1]
    assert all(alone[n].abs().max() > 0 for n in weights)
    assert taps != "backbone" or not any(n.startswith("backbone.fpn_") for n in alone)
    assert not any(n.startswith("head.") for n in alone)


def test_with_weight_zero_it_is_the_main_losss_alone():
    # In double precision: gradients of zero change the memory layout of the sum and with it the rounding, and a scale's
    # gradient is a sum of terms far larger than itself.
    model = pair(0.0).double()
    main, both = trunk(gradients(model, BATCH, MAIN)[1]), trunk(gradients(model, BATCH)[1])
    for name in main:
        assert main[name].dtype == torch.float64
        difference = (main[name] - both[name]).abs().max()
        assert difference <= 1e-9 * main[name].abs().max() + 1e-12, name


@pytest.mark.parametrize("taps", TAPS)
def test_every_trainable_parameter_gets_a_gradient(taps):
    model = pair(1.0, taps)
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
    model.auxiliary.initialize_from(model)
    calibrated(model, BATCH)
    assert not model.auxiliary.needs_alignment
    set_quantization(model, False)
    model.train()
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(BATCH).tensor)
        features = [features[name] for name in model.head_in_features]
        ours, theirs = model.auxiliary(features), model.head(features)
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_without_relu_in_the_pyramid_the_head_sees_its_positive_part():
    model = make_model(*AUX)
    model.auxiliary.initialize_from(model)
    features = [torch.randn(2, 16, s, s) for s in (16, 8, 4, 4, 2)]
    with torch.no_grad(), aligning(model):
        ours = model.auxiliary(features)
        theirs = model.head([f.relu() for f in features])
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_an_aligned_adaptor_is_the_identity_on_what_it_was_aligned_to(norm):
    adaptor = Adaptor(3, norm)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 20, 0]).view(3, 1, 1)
    adaptor.align(x)
    torch.testing.assert_close(adaptor(x), x, rtol=1e-4, atol=1e-4)
    assert torch.equal(adaptor(-x - 1), torch.zeros_like(x)) or norm == "BN"


def test_only_an_explicit_alignment_aligns_and_the_first_batch_does():
    model = make_model(*AUX)
    path = model.auxiliary
    path.initialize_from(model)
    features = [torch.rand(1, 16, s, s) for s in (16, 8, 4, 4, 2)]
    path(features)
    with torch.no_grad():  # a plan, or statistics of batch norms
        path(features), path.eval()(features), path.train()
    assert path.needs_alignment and path.adaptors[0].conv.norm.bias.abs().sum() == 0
    with aligning(model):
        path(features)
        aligned = path.adaptors[0].conv.norm.bias.clone()
        path([2 * f for f in features])
    assert not path.needs_alignment and aligned.abs().sum() > 0 and waiting_adaptors(model) == []
    assert torch.equal(aligned, path.adaptors[0].conv.norm.bias)
    path.adaptors[1].needs_alignment = True
    with pytest.raises(ZeroDivisionError), aligning(model):
        raise ZeroDivisionError
    assert waiting_adaptors(model) == [path.adaptors[1]] and not any(m._forward_pre_hooks for m in model.modules())


def test_the_copied_head_is_a_copy():
    model = make_model(*QUANT, *AUX)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.5)
    model.auxiliary.initialize_from(model)
    own, theirs = model.auxiliary.head.state_dict(), model.head.state_dict()
    assert set(theirs) - set(own) and all(torch.equal(own[k], theirs[k]) for k in own)
    storages = {t.data_ptr() for t in model.head.parameters()}
    assert not any(t.data_ptr() in storages for t in model.auxiliary.head.parameters())


def test_a_path_for_other_levels_is_not_cut_short():
    path = make_model(*AUX).auxiliary
    with pytest.raises(ValueError, match="shorter|longer"):
        path([torch.rand(1, 16, 4, 4)] * 3)


def small_resnet(*overrides):
    cfg = make_cfg(*overrides)
    cfg.MODEL.BACKBONE.NAME = "build_quant_resnet_backbone"
    return build_backbone(cfg, ShapeSpec(channels=3))


def test_taps_are_the_sums_before_relu_and_quantizer_and_leave_no_hook():
    trunk = small_resnet(*QUANT, "MODEL.RESNETS.OUT_FEATURES", "['stem','res2','res3','res4','res5']")
    set_quantization(trunk, False)
    image = torch.randn(1, 3, 64, 64)
    with tapped_sums(trunk) as sums:
        outputs = trunk(image)
    assert len(sums) == 9 and all(s.min() < 0 for s in sums)
    for index, name in enumerate(["stem", "res2", "res3", "res4", "res5"]):
        # In float a stage's output is the ReLU of its last block's sum.
        assert torch.equal(sums[2 * index].relu(), outputs[name])
    trunk(image)
    with pytest.raises(ZeroDivisionError), tapped_sums(trunk):
        raise ZeroDivisionError
    assert len(sums) == 9 and not any(m._forward_pre_hooks for m in trunk.modules())


def test_with_quantizers_the_taps_are_sums_of_quantized_operands_and_gradients_pass_straight_through():
    keys = (*QUANT, "MODEL.QUANT.RESIDUAL_NUM_BITS", "4", "MODEL.RESNETS.OUT_FEATURES", "['res5']")
    trunk = small_resnet(*keys)
    image = torch.randn(1, 3, 64, 64)
    calibrate(trunk, lambda: trunk(image), method="minmax")
    block = trunk.res3[0]
    operands = []
    handle = block.residual_add.register_forward_pre_hook(lambda _, inputs: operands.extend(inputs))
    with tapped_sums(trunk) as sums:
        trunk(image)
    handle.remove()
    x, y = (operand.detach().requires_grad_() for operand in operands)
    add = block.residual_add
    tap = sums[3]  # stem, two blocks of res2, then this one
    assert torch.equal(tap, add.x_quantizer(x) + add.y_quantizer(y)) and not torch.allclose(tap, x + y)
    assert len(add.x_quantizer(x).unique()) <= 16 and tap.min() < 0
    (add(x, y) * 3).sum().backward()
    for quantizer, operand in ((add.x_quantizer, x), (add.y_quantizer, y)):
        levels = quantizer(operand).detach()
        inside = (operand > levels.min()) & (operand < levels.max())
        assert inside.sum() > 0.9 * inside.numel() and (operand.grad[inside] == 3).all()
        assert set(operand.grad.unique().tolist()) <= {0.0, 3.0}


@pytest.mark.parametrize("depth, width", [(18, 64), (50, 256)])
def test_aggregation_is_the_papers_formula(depth, width):
    names = ("MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", str(width))
    trunk = small_resnet(*names, "MODEL.RESNETS.OUT_FEATURES", "['stem','res3','res5']")
    path = Aggregation(trunk, norm="BN").eval()
    trunk.eval()
    for parameter in path.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with tapped_sums(trunk) as sums, torch.no_grad():
        trunk(torch.randn(1, 3, 32, 32))
    read = list(sums)
    ours = path(read)
    assert not read  # a sum is not alive longer than its reader needs it

    state = path.state_dict()

    def conv(key, x, stride=1):
        weight, norm = state[f"{key}.weight"], [state[f"{key}.norm.{k}"] for k in ("weight", "bias")]
        y = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x[:, :, ::stride, ::stride])
        return y / math.sqrt(1 + 1e-5) * norm[0].view(1, -1, 1, 1) + norm[1].view(1, -1, 1, 1)  # fresh statistics

    h, tap = conv("stem.conv", sums[0]).relu(), 1
    outputs = {"stem": h}
    for stage, blocks in zip(("res2", "res3", "res4", "res5"), {18: (2,) * 4, 50: (3, 4, 6, 3)}[depth], strict=True):
        for block in range(blocks):
            if block == 0 and not (depth == 18 and stage == "res2"):
                h = conv(f"{stage}.0.shortcut", h, 1 if stage == "res2" else 2)
            h = (h + conv(f"{stage}.{block}.adaptor.conv", sums[tap])).relu()
            tap += 1
        outputs[stage] = h
    assert list(ours) == ["stem", "res3", "res5"] and tap == len(sums)
    for name, value in ours.items():
        torch.testing.assert_close(value, outputs[name], rtol=1e-4, atol=1e-5)
    shapes = trunk.output_shape()
    assert {k: vars(v) for k, v in path.output_shape().items()} == {k: vars(shapes[k]) for k in shapes}


@pytest.mark.parametrize("norm", ["BN", ""])
def test_an_adaptor_beside_something_carried_is_aligned_by_least_squares(norm):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 2, 8, 8, generator=generator) * torch.tensor([1.0, 5.0]).view(2, 1, 1) + 3
    carried = 0.4 * x + torch.randn(4, 2, 8, 8, generator=generator) + 1
    adaptor = Adaptor(2, norm)
    adaptor.align(x, carried)
    got = adaptor.conv(x)
    for channel in range(2):
        values = x[:, channel].flatten()
        columns = torch.stack([values, torch.ones_like(values)], dim=1)
        wanted = (x - carried)[:, channel].flatten()
        fit = columns @ torch.linalg.lstsq(columns, wanted.unsqueeze(1)).solution
        torch.testing.assert_close(got[:, channel].flatten(), fit.flatten(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["BN", ""])
@pytest.mark.parametrize("level", [0.0, 0.1, 7.3])
def test_a_constant_channel_beside_something_carried_gets_no_gain_of_its_own(norm, level):
    x = torch.full((4, 1, 16, 16), level)
    carried = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(4)) + 1
    adaptor = Adaptor(1, norm)
    adaptor.align(x, carried)
    with torch.no_grad():
        # A later batch, in which the channel is no longer quite constant.
        got = adaptor.eval().conv(x + 0.01)
    assert got.abs().max() < 20
    torch.testing.assert_close(adaptor.train().conv(x).mean(), (x - carried).mean(), rtol=1e-3, atol=1e-3)


def test_a_channel_that_varies_by_rounding_alone_is_constant():
    generator = torch.Generator().manual_seed(4)
    where = torch.rand(4, 1, 16, 16, generator=generator) < 0.5
    carried = torch.randn(4, 1, 16, 16, generator=generator) + 1
    for level in torch.linspace(1.1, 1.9, 50):
        x = torch.where(where, torch.nextafter(level, torch.tensor(2.0)), level)
        if x.square().mean() > x.mean().square():  # the moments say that it varies
            break
    gains = []
    for values in (x, x * torch.linspace(0.9, 1.1, 16)):
        adaptor = Adaptor(1, "")
        adaptor.align(values, carried)
        gains.append(adaptor.conv.weight.item())
    assert x.square().mean() > x.mean().square()
    assert gains[0] == 1 and gains[1] != 1


def test_started_from_a_detector_every_h_is_near_the_blocks_own_output():
    extra = ("MODEL.AUX.TAPS", "backbone", "MODEL.FPN.RELU", "True")
    model = make_model(*QUANT, *AUX, *extra)
    assert model.auxiliary.initialize_from(model) == []
    own, theirs = model.auxiliary.state_dict(), model.state_dict()
    assert torch.equal(own["trunk.fpn_output4.weight"], theirs["backbone.fpn_output4.weight"])
    assert torch.equal(own["trunk.top_block.p6.weight"], theirs["backbone.top_block.p6.weight"])
    key = "bottom_up.res4.0.shortcut.weight"
    assert torch.equal(own[f"trunk.{key}"], theirs[f"backbone.{key}"])
    calibrated(model, BATCH)
    assert not model.auxiliary.needs_alignment
    set_quantization(model, False)
    with torch.no_grad(), tapped_sums(model.backbone.bottom_up) as sums:
        model.backbone(model.preprocess_image(BATCH).tensor)
        own = model.auxiliary.trunk.bottom_up(list(sums))
    for name, last in (("res3", 4), ("res4", 6), ("res5", 8)):
        target = sums[last].relu()
        # Half of a block's sum is carried, where the trunk carries all of it: a random trunk is the worst case.
        error = (own[name] - target).square().mean() / target.var()
        assert error < 0.2, (name, error)


def test_both_reads_the_mean_of_the_levels_of_the_two():
    model = make_model(*AUX, "MODEL.AUX.TAPS", "both")
    path = model.auxiliary.eval()
    path.head = torch.nn.Identity()
    with torch.no_grad(), path.tapping(model.backbone), tapped_sums(model.backbone.bottom_up) as sums:
        features = model.backbone(torch.randn(1, 3, 64, 64))
        levels = [features[name] for name in model.head_in_features]
        got, own = path(levels), path.trunk(sums)
    for a, name, adaptor, level in zip(got, model.head_in_features, path.adaptors, levels, strict=True):
        assert torch.equal(a, (adaptor(level) + own[name]) / 2)


@pytest.mark.parametrize("taps", ["backbone", "both"])
def test_detached_or_in_evaluation_nothing_is_tapped(taps, monkeypatch):
    model = make_model(*AUX, "MODEL.AUX.TAPS", taps)
    monkeypatch.setattr("aqdet.modeling.scaffold.auxiliary.tapped_sums", lambda _: pytest.fail("tapped"))
    with without_scaffold(model):
        losses_of(model, BATCH)
    with torch.no_grad():
        model.eval()(BATCH)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_taps_are_let_go_after_a_step_and_after_a_failure(monkeypatch):
    model = make_model(*AUX, "MODEL.AUX.TAPS", "backbone")
    features = [torch.rand(1, 16, s, s) for s in (16, 8, 4, 4, 2)]
    losses_of(model, BATCH)
    with pytest.raises(RuntimeError, match="run the backbone in its tapping"):
        model.auxiliary(features)
    monkeypatch.setattr(model, "losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        losses_of(model, BATCH)
    with pytest.raises(RuntimeError, match="run the backbone in its tapping"):
        model.auxiliary(features)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("taps", ["backbone", "both"])
def test_steps_in_ddp_which_refuses_unused_parameters(taps, tmp_path):
    model = calibrated(make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", taps), BATCH)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        for _ in range(2):  # the second forward fails if the first step left a parameter out
            sum(losses_of(wrapped, BATCH).values()).backward()
            with without_scaffold(wrapped), torch.no_grad():
                wrapped.eval()(BATCH)
            wrapped.train()
    finally:
        dist.destroy_process_group()


def test_a_backbone_without_tap_points_is_refused():
    cfg = make_cfg(*AUX, "MODEL.AUX.TAPS", "both", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone")
    with pytest.raises(ValueError, match="MODEL.AUX.TAPS 'both' reads the blocks of a build_quant_.*got"):
        build_model(cfg)


def test_strip_takes_only_the_paths_own_keys():
    state = {"auxiliary.head.a": 1, "backbone.auxiliary.b": 2, "auxiliary_c": 3}
    assert strip(state) == {"backbone.auxiliary.b": 2, "auxiliary_c": 3}
    assert "auxiliary.head.a" in state
