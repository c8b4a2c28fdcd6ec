"""The image classifier: contracts of the auxiliary path, torchvision as reference, its backbone in a detector."""

import logging

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from helpers import CLASSIFIER, FCOS, QUANT, calibrated, gradients, losses_of, make_batch, make_cfg, make_model

from aqdet.analysis.plan import make_plan, total
from aqdet.checkpoint import AqdetCheckpointer, convert_torchvision_resnet
from aqdet.layers import QuantConv2d, QuantLinear
from aqdet.modeling import strip, without_scaffold
from aqdet.quantization import quantizers, set_quantization

AUX = ("MODEL.AUX.ENABLED", "True")
BATCH = make_batch()
RGB = ("MODEL.PIXEL_MEAN", "[0.,0.,0.]", "MODEL.PIXEL_STD", "[64.,64.,64.]")


@pytest.mark.parametrize("depth, width", [(18, 64), (50, 256)])
def test_off_it_is_torchvisions_resnet(depth, width):
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=3)
    names = ("MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.RES2_OUT_CHANNELS", str(width))
    model = make_model(*CLASSIFIER, *RGB, *QUANT, *names, "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    state, left_out = convert_torchvision_resnet(theirs.state_dict())
    state |= {f"head.linear.{key.removeprefix('fc.')}": theirs.state_dict()[key] for key in left_out}
    quantizer_names = tuple(f"{name}." for name, _ in quantizers(model))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith(quantizer_names) for key in missing)
    set_quantization(model, False)
    theirs.eval(), model.eval()
    with torch.no_grad():
        expected = theirs(torch.stack([x["image"] for x in BATCH]) / 64).softmax(dim=1)
        scores = torch.stack([x["scores"] for x in model(BATCH)])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_step_and_dropped_is_dropped():
    model = calibrated(make_model(*CLASSIFIER, *QUANT, *AUX), BATCH)
    losses, grads = gradients(model, BATCH)
    assert set(losses) == {"loss_cls", "aux_loss_cls"} and all(torch.isfinite(v) for v in losses.values())
    assert set(grads) == {n for n, p in model.named_parameters() if p.requires_grad}
    alone = gradients(model, BATCH, ("aux_loss_cls",))[1]
    assert alone["backbone.bottom_up.res2.0.conv1.weight"].abs().max() > 0
    assert not any(n.startswith("head.") for n in alone)
    bare = make_model(*CLASSIFIER, *QUANT)
    assert set(bare.state_dict()) == set(strip(model.state_dict()))
    bare.load_state_dict(strip(model.state_dict()))
    assert set(losses_of(bare, BATCH)) == {"loss_cls"}
    bare.load_state_dict(strip(model.state_dict()))
    model.eval(), bare.eval()
    with without_scaffold(model):
        inside = model(BATCH)
    for a, b, c in zip(inside, bare(BATCH), model(BATCH), strict=True):
        assert torch.equal(a["scores"], b["scores"]) and torch.equal(a["scores"], c["scores"])
        assert a["scores"].sum().item() == pytest.approx(1)


def test_the_policy_has_the_classifier_and_the_stem_at_eight_bits():
    model = make_model(*CLASSIFIER, *QUANT, *AUX)
    linear = model.head.linear
    assert isinstance(linear, QuantLinear) and not linear.input_quantizer.spec.signed
    assert linear.weight_quantizer.spec.num_bits == linear.input_quantizer.spec.num_bits == 8
    assert linear.weight_quantizer.scale.shape == (3,)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(isinstance(m, QuantConv2d) != n.startswith("auxiliary.") for n, m in convs.items())
    assert not any(n.startswith("auxiliary.") for n, _ in quantizers(model))
    rows = {r.name: r for r in make_plan(model, (64, 64))}
    assert (rows["head.linear"].kind, rows["head.linear"].macs, rows["head.linear"].parameters) == (
        "linear",
        1536,
        1539,
    )
    assert rows["head.linear"].bit_ops == 1536 * 64 and rows["auxiliary.head.linear"].part == "auxiliary"
    parameters = sum(p.numel() for p in model.auxiliary.parameters())
    assert total(list(rows.values()), "auxiliary").parameters == parameters
    cfg = make_cfg(*CLASSIFIER, *QUANT)
    cfg.MODEL.QUANT.RULES = [[r"^head\.linear$", {"ENABLED": False}]]
    assert type(build_model(cfg).head.linear) is torch.nn.Linear


def test_quantized_linear_by_hand():
    from aqdet.quantization import QuantSpec, calibrate

    torch.manual_seed(0)
    float_layer = torch.nn.Linear(6, 4)
    specs = QuantSpec("lsq", 4, "weight", per_channel=True), QuantSpec("lsq", 4, "input", signed=False)
    layer = QuantLinear.from_float(float_layer, *specs)
    assert layer.weight is float_layer.weight and layer.bias is float_layer.bias
    x = torch.rand(5, 6)
    calibrate(layer, lambda: layer(x), method="minmax")
    weight, x_q = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    assert all(len(row.unique()) <= 16 for row in weight) and len(x_q.unique()) <= 16
    torch.testing.assert_close(layer(x), x_q @ weight.T + layer.bias)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_wrong_configs_are_one_line():
    for overrides, words in [
        ((*AUX, "MODEL.AUX.TAPS", "fpn"), "TAPS must be 'backbone' where there is no pyramid, got 'fpn'"),
        (("MODEL.RESNETS.OUT_FEATURES", "['res4']"), r"OUT_FEATURES must have 'res5', .* got \['res4'\]"),
        ((*AUX, "MODEL.BACKBONE.NAME", "build_resnet_backbone"), "MODEL.BACKBONE.NAME must be one, got"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            build_model(make_cfg(*CLASSIFIER, *overrides))
        assert "\n" not in str(error.value)


def test_the_paths_loss_follows_weight_and_schedule():
    model = calibrated(make_model(*CLASSIFIER, *QUANT, *AUX, "MODEL.AUX.LOSS_WEIGHT", "2.0"), BATCH)
    model.auxiliary.schedule, model.auxiliary.max_iter = "linear", 10
    full, half = (gradients(model, BATCH, ("aux_loss_cls",), iteration)[1] for iteration in (0, 5))
    twice, once = (gradients(model, BATCH, iteration=iteration)[0]["aux_loss_cls"].item() for iteration in (0, 5))
    assert twice == pytest.approx(2 * once, rel=1e-5)
    model.auxiliary.loss_weight = 1.0
    assert gradients(model, BATCH)[0]["aux_loss_cls"].item() == pytest.approx(once, rel=1e-5)
    key = "backbone.bottom_up.res2.0.conv1.weight"
    torch.testing.assert_close(full[key], 2 * half[key])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a trained classifier, in float and quantized, with the auxiliary path."""
    folder = tmp_path_factory.mktemp("classifier")
    states = {}
    for name, extra in (("float", ()), ("quantized", QUANT)):
        model = make_model(*CLASSIFIER, *AUX, *extra, seed=5)
        if extra:
            calibrated(model, BATCH)
        states[name] = model.state_dict()
        torch.save({"model": states[name], "iteration": 3}, folder / f"{name}.pth")
    return folder, states


@pytest.mark.parametrize("arch", [(), FCOS], ids=["retinanet", "fcos"])
def test_its_backbone_loads_into_a_detector_quantizers_included(files, arch, caplog):
    caplog.set_level(logging.INFO, "aqdet")
    folder, states = files
    detector = make_model(*arch, *QUANT, *AUX, "MODEL.AUX.TAPS", "both")
    AqdetCheckpointer(detector, aux_init="head").load(str(folder / "quantized.pth"))
    loaded = detector.state_dict()
    backbone = {k for k in states["quantized"] if k.startswith("backbone.")}
    assert backbone == {k for k in loaded if k.startswith("backbone.bottom_up.")}
    assert all(torch.equal(loaded[key], states["quantized"][key]) for key in backbone)
    for name, quantizer in quantizers(detector):
        assert quantizer.is_calibrated == name.startswith("backbone.bottom_up."), name
    assert "is of a classifier: " in caplog.text and "lacks of it, starts at random" in caplog.text
    calibrated(detector, BATCH)
    assert all(torch.isfinite(v) for v in losses_of(detector, BATCH).values())


def test_a_float_classifier_starts_a_quantized_detector_and_not_the_other_way(files):
    folder, states = files
    detector = make_model(*QUANT)
    AqdetCheckpointer(detector).load(str(folder / "float.pth"))
    assert not any(q.is_calibrated for _, q in quantizers(detector))
    key = "backbone.bottom_up.res5.1.conv2.weight"
    assert torch.equal(detector.state_dict()[key], states["float"][key])
    with pytest.raises(ValueError, match="unexpected backbone.bottom_up.*MODEL.QUANT.ENABLED is False"):
        AqdetCheckpointer(make_model()).load(str(folder / "quantized.pth"))


def test_low_precision_starts_from_the_float_classifier_with_its_path(files, tmp_path):
    folder, states = files
    model = make_model(*CLASSIFIER, *QUANT, *AUX)
    AqdetCheckpointer(model, aux_init="head").load(str(folder / "float.pth"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in states["float"].items())
    assert not model.auxiliary.needs_alignment
    # Without a path in the file it starts from the classifier's own layers.
    torch.save({"model": strip(states["float"])}, tmp_path / "bare.pth")
    model = make_model(*CLASSIFIER, *QUANT, *AUX)
    AqdetCheckpointer(model, aux_init="head").load(str(tmp_path / "bare.pth"))
    assert model.auxiliary.needs_alignment
    assert torch.equal(model.auxiliary.head.linear.weight, states["float"]["head.linear.weight"])
    wrong = make_model(*CLASSIFIER, "MODEL.CLASSIFIER.NUM_CLASSES", "4")
    with pytest.raises(ValueError, match="of another shape head.linear.bias .3,. in the file, .4,. in the model"):
        AqdetCheckpointer(wrong).load(str(tmp_path / "bare.pth"))
