"""The contracts of the detector: names, off is off, dropped is dropped, b bits, padding."""

import itertools

import pytest
import torch
from helpers import AUX, QUANT, assert_off_is_off, calibrated, gradients, make_batch, make_cfg, make_model

from aqdet.layers import QuantConv2d, StreamQuantizer
from aqdet.modeling import quantizable_layers, strip, without_scaffold
from aqdet.modeling.scaffold import TAPS
from aqdet.quantization import quantizers, set_quantization

BATCH = make_batch()
FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.FPN.NORM", "")
R50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "MODEL.RETINANET.NORM", "")


@pytest.mark.parametrize("taps", TAPS)
def test_names_are_detectron2s_plus_quantizers_plus_auxiliary(taps):
    theirs = set(make_model(theirs=True).state_dict())
    model = make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", taps)
    names = tuple(f"{name}." for name, _ in quantizers(model))
    ours = set(model.state_dict())
    assert theirs <= ours
    assert all(key.startswith((*names, "auxiliary.")) for key in ours - theirs)
    assert set(strip(model.state_dict())) == {k for k in ours if not k.startswith("auxiliary.")}
    assert not any(name.startswith("auxiliary.") for name, _ in (*quantizers(model), *quantizable_layers(model)))


@pytest.mark.parametrize("extra", [(), FROZEN, R50], ids=["r18", "r18-frozen", "r50"])
@pytest.mark.parametrize("how", ["built without", "switched off"])
def test_off_is_off_bit_for_bit(extra, how):
    theirs = make_model(*extra, theirs=True)
    model = make_model(*extra, *(QUANT if how == "switched off" else ()))
    _, unexpected = model.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    set_quantization(model, False)
    for _ in range(3):  # the focal loss is a script whose arithmetic settles after some runs
        gradients(theirs, BATCH)
    expected, expected_gradients = gradients(theirs, BATCH)
    losses, grads = gradients(model, BATCH)
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    assert all(torch.equal(grads[key], value) for key, value in expected_gradients.items())
    assert set(grads) == set(expected_gradients)
    model.load_state_dict(theirs.state_dict(), strict=False)  # the batch norms have seen different batches
    theirs.eval(), model.eval()
    model.test_score_thresh = theirs.test_score_thresh = 0.0
    for a, b in zip(theirs(BATCH), model(BATCH), strict=True):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


@pytest.mark.parametrize("taps", TAPS)
def test_off_is_off_beside_an_auxiliary_path(taps):
    theirs = make_model(theirs=True)
    model = make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", taps)
    assert_off_is_off(theirs, model, BATCH)


@pytest.mark.parametrize("taps", TAPS)
def test_dropped_is_dropped(taps):
    model = calibrated(make_model(*QUANT, *AUX, "MODEL.FPN.RELU", "True", "MODEL.AUX.TAPS", taps), BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(2):
        gradients(model, BATCH)
        optimizer.step()
    bare = make_model(*QUANT, "MODEL.FPN.RELU", "True")
    kinds = [(n, type(m)) for n, m in model.named_modules() if not n.startswith("auxiliary")]
    assert [(n, type(m)) for n, m in bare.named_modules()] == kinds
    assert set(bare.state_dict()) == set(strip(model.state_dict()))
    bare.load_state_dict(strip(model.state_dict()))
    model.eval(), bare.eval()
    model.test_score_thresh = bare.test_score_thresh = 0.0
    path = model.auxiliary
    with without_scaffold(model):
        assert not any(name.startswith("auxiliary") for name, _ in model.named_parameters())
        inside = model(BATCH)
    assert model.auxiliary is path and "auxiliary" in dict(model.named_children())
    for a, b, c in zip(inside, bare(BATCH), model(BATCH), strict=True):
        assert len(a["instances"]) > 0
        for other in (b, c):
            assert torch.equal(a["instances"].scores, other["instances"].scores)
            assert torch.equal(a["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)
    with pytest.raises(ZeroDivisionError), without_scaffold(model):
        raise ZeroDivisionError
    assert model.auxiliary is path


@pytest.mark.parametrize(
    "method, relu",
    [
        *itertools.product(["lsq", "pact", "dorefa", "n2uq"], ["True", "False"]),
        *(("lsqplus", "False"), ("lqnet", "False"), ("lsqodd", "True")),
    ],
)
def test_every_convolution_sees_b_bits_and_zero_padding(monkeypatch, method, relu):
    weight_method = "lsq" if method == "n2uq" else method
    input_method = "lsq" if method == "lsqodd" else method
    extra = ("MODEL.QUANT.WEIGHT.QUANTIZER", weight_method, "MODEL.QUANT.INPUT.QUANTIZER", input_method)
    model = calibrated(make_model(*QUANT, *extra, "MODEL.FPN.RELU", relu), BATCH).eval()
    convs = {id(m): n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(isinstance(model.get_submodule(n), QuantConv2d) for n in convs.values())
    running: list[str] = []
    for name in convs.values():
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: running.append(name))
    real, seen = torch.conv2d, []

    def spy(x, weight, *args, **kwargs):
        layer = model.get_submodule(running[-1])
        bits = layer.weight_quantizer.spec.num_bits
        assert all(len(row.unique()) <= 2**bits for row in weight), running[-1]
        if layer.input_quantizer is not None:
            assert len(x.unique()) <= 2**layer.input_quantizer.spec.num_bits, running[-1]
        seen.append(running[-1])
        return real(x, weight, *args, **kwargs)

    monkeypatch.setattr(torch, "conv2d", spy)
    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    streams = []
    for _, module in model.named_modules():
        if isinstance(module, StreamQuantizer):
            module.register_forward_hook(lambda m, i, o: streams.append(o))
    with torch.no_grad():
        model(BATCH)
    # Every convolution ran through a quantized layer, and each layer ran: none was left behind in float.
    assert set(seen) == set(convs.values()) and len(seen) == len(running)
    assert streams and all(len(s.unique()) <= 256 for s in streams)
    for _, quantizer in quantizers(model):
        if quantizer.spec.role == "input":
            assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("relu", ["True", "False"])
@pytest.mark.parametrize("top", ["res5", "p5"])
def test_a_site_declared_unsigned_never_sees_a_negative(relu, top):
    from helpers import losses_of

    from aqdet.quantization import calibrate

    model = make_model(*QUANT, "MODEL.FPN.RELU", relu, "MODEL.FPN.TOP_BLOCK_IN_FEATURE", top)
    for batch_norm in model.modules():
        if isinstance(batch_norm, torch.nn.BatchNorm2d) and batch_norm.affine:
            torch.nn.init.normal_(batch_norm.bias)

    def run():
        with torch.no_grad():
            losses_of(model, BATCH)

    shares = calibrate(model, run, method="minmax")
    by_name = dict(quantizers(model))
    inputs = {n: s for n, s in shares.items() if by_name[n].spec.role == "input"}
    assert all(share == 0 for n, share in inputs.items() if not by_name[n].spec.signed)
    signed = {n for n in inputs if by_name[n].spec.signed}
    assert any("residual_add" in n for n in signed)
    assert ("head.cls_subnet.0.input_quantizer" in signed) == (relu == "False")


def test_images_without_boxes_and_evaluation_on_random_weights():
    model = calibrated(make_model(*QUANT, *AUX), BATCH)
    losses, grads = gradients(model, make_batch(empty=(0, 1)))
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(g).all() for g in grads.values())
    model.eval()
    assert len(model(BATCH)) == 2


def test_uncalibrated_says_what_is_missing():
    with pytest.raises(RuntimeError, match="stem.conv1.weight_quantizer' is not calibrated: call"):
        gradients(make_model(*QUANT), BATCH)


def test_config_values_are_checked_in_one_line():
    from detectron2.modeling import build_model

    for overrides, words in [
        (("MODEL.RESNETS.DEPTH", "20"), "DEPTH must be one of 18, 34, 50, 101, got 20"),
        (("MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p6"), "'res5' or 'p5', got 'p6'"),
        (("MODEL.FPN.FUSE_TYPE", "avg"), "FUSE_TYPE must be 'sum'"),
        ((*AUX, "MODEL.AUX.TAPS", "stem"), "TAPS must be one of fpn, backbone, both, got 'stem'"),
        ((*AUX, "MODEL.AUX.SCHEDULE", "step"), "SCHEDULE must be one of constant, linear, cosine"),
        ((*AUX, "MODEL.AUX.INIT", "zero"), "INIT must be one of head, random"),
        ((*AUX, "MODEL.AUX.LOSS_WEIGHT", "-1."), "LOSS_WEIGHT must not be negative"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            build_model(make_cfg(*overrides))
        assert "\n" not in str(error.value)
