"""The meta-architecture: one set of targets, one normalizer, what runs in training and in evaluation."""

import pytest
import torch
import torch.distributed as dist
from helpers import AUX, QUANT, calibrated, gradients, losses_of, make_batch, make_model

from aqdet.layers import QuantConv2d
from aqdet.modeling import without_scaffold
from aqdet.quantization import set_quantization

BATCH = make_batch()
RELU = ("MODEL.FPN.RELU", "True")


@pytest.fixture(scope="module")
def model():
    model = calibrated(make_model(*QUANT, *AUX, *RELU), BATCH)
    for _ in range(3):  # the focal loss is a script whose arithmetic settles after some runs
        gradients(model, BATCH)
    return model


def test_calibrated_then_off_is_detectron2s_without_any_norm_of_ours():
    extra = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.FPN.NORM", "")
    extra = (*extra, "MODEL.RETINANET.NORM", "", "MODEL.RETINANET.NUM_CONVS", "2")
    theirs, ours = make_model(*extra, theirs=True), calibrated(make_model(*QUANT, *extra), BATCH)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    set_quantization(ours, False)
    for _ in range(3):
        gradients(theirs, BATCH)
    losses, expected = gradients(theirs, BATCH)
    own, grads = gradients(ours, BATCH)
    assert set(own) == set(losses) and all(torch.equal(own[k], losses[k]) for k in losses)
    assert set(grads) == set(expected) and all(torch.equal(grads[k], expected[k]) for k in expected)
    set_quantization(ours, True)
    assert not torch.equal(gradients(ours, BATCH)[0]["loss_cls"], losses["loss_cls"])


def test_both_heads_have_the_same_targets_and_normalizer(model, monkeypatch):
    # With the main head's predictions in place of its own, the auxiliary loss must be the main loss.
    kept = []
    handle = model.head.register_forward_hook(lambda m, i, o: kept.append(o))
    monkeypatch.setattr(model.auxiliary, "forward", lambda *_: kept[-1])
    try:
        model.loss_normalizer = 3.0
        losses = losses_of(model, BATCH)
    finally:
        handle.remove()
    assert len(kept) == 1
    for key in ("loss_cls", "loss_box_reg"):
        assert losses[key] > 0 and torch.equal(losses[key], losses[f"aux_{key}"])


def test_the_normalizer_is_free_again_after_an_exception(model, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(model.auxiliary, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        losses_of(model, BATCH)
    monkeypatch.undo()
    model.loss_normalizer = 1000.0
    losses_of(model, BATCH)
    assert model.loss_normalizer < 1000


def test_the_main_losses_do_not_know_of_the_auxiliary_path(model):
    with_path = gradients(model, BATCH)[0]
    with without_scaffold(model):
        without = gradients(model, BATCH)[0]
    assert set(with_path) - set(without) == {"aux_loss_cls", "aux_loss_box_reg"}
    assert all(torch.equal(with_path[k], v) for k, v in without.items())


def test_in_training_only_the_auxiliary_path_convolves_in_float(model, monkeypatch):
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    running, seen = [], set()
    handles = [m.register_forward_pre_hook(lambda *_, n=n: running.append(n)) for n, m in convs.items()]
    real = torch.conv2d

    def spy(x, weight, *args, **kwargs):
        layer = convs[running[-1]]
        if isinstance(layer, QuantConv2d):
            per_channel = 2**layer.weight_quantizer.spec.num_bits
            assert all(len(row.unique()) <= per_channel for row in weight), running[-1]
            if layer.input_quantizer is not None:
                assert len(x.unique()) <= 2**layer.input_quantizer.spec.num_bits, running[-1]
        seen.add((running[-1], isinstance(layer, QuantConv2d)))
        return real(x, weight, *args, **kwargs)

    monkeypatch.setattr(
        "aqdet.quantization.lean.conv.largest_integer_weight", lambda _: 0
    )  # another operator, on the same values
    monkeypatch.setattr(torch, "conv2d", spy)
    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    losses_of(model, BATCH)
    for handle in handles:
        handle.remove()
    assert {name for name, _ in seen} == set(convs)
    assert all(quantized != name.startswith("auxiliary.") for name, quantized in seen)


def test_the_auxiliary_path_does_not_run_in_evaluation(model, monkeypatch):
    monkeypatch.setattr(model.auxiliary, "forward", lambda *_: pytest.fail("ran"))
    model.eval()
    try:
        assert len(model(BATCH)) == 2
    finally:
        model.train()


def test_an_image_without_boxes_beside_one_with(model):
    losses, grads = gradients(model, make_batch(empty=(1,)))
    assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    assert all(torch.isfinite(g).all() for g in grads.values())
    losses, _ = gradients(model, make_batch(empty=(0, 1)))
    assert losses["loss_box_reg"] == losses["aux_loss_box_reg"] == 0


def test_a_step_under_autocast_keeps_float32_gradients(model):
    # Every level is 2x2 or more: torch's own bfloat16 convolution on a CPU reads memory that was never written
    # for the weight gradient of a 1x1 input.
    batch = make_batch(num_images=1, size=256)
    expected = losses_of(model, batch)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, batch)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    assert losses["loss_cls"].item() == pytest.approx(expected["loss_cls"].item(), rel=0.5)


def test_a_full_precision_detector_can_have_the_path_too():
    model = make_model(*AUX)
    losses = losses_of(model, BATCH)
    assert set(losses) == {"loss_cls", "loss_box_reg", "aux_loss_cls", "aux_loss_box_reg"}
    assert not any(isinstance(m, QuantConv2d) for m in model.modules())


def test_detached_in_ddp_twice_and_after_an_exception(model, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        path, names = model.auxiliary, list(model.state_dict())
        with pytest.raises(ZeroDivisionError), without_scaffold(wrapped) as inner:
            assert inner is wrapped and model.auxiliary is None
            assert not any("auxiliary" in key for key in wrapped.state_dict())
            with without_scaffold(model):
                assert model.auxiliary is None
            assert model.auxiliary is None
            raise ZeroDivisionError
        assert model.auxiliary is path and list(model.state_dict()) == names
    finally:
        dist.destroy_process_group()


def test_a_detector_without_a_path_passes_through_detaching():
    plain = torch.nn.Linear(1, 1)
    with without_scaffold(plain) as inner:
        assert inner is plain
    assert not hasattr(plain, "auxiliary")
