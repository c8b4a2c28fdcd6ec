"""Quantization without training: what is tried, by what it is judged, and what the corrections do."""

import copy

import pytest
import torch
from helpers import FCOS, QUANT, make_cfg
from lively import STD, images, lively, pair

from aqdet.engine import post_training
from aqdet.engine.post_training import (
    check_quantizable,
    correct_biases,
    output_error,
    predict,
    quantize_detector,
    quantized_overrides,
    reestimate_bn,
)
from aqdet.quantization import quantizers


def test_keys_that_quantize_a_config():
    theirs = quantized_overrides(make_cfg(theirs=True), 5)
    cfg = make_cfg(*theirs, theirs=True)
    assert cfg.MODEL.META_ARCHITECTURE == "QuantRetinaNet" and cfg.MODEL.QUANT.ENABLED
    assert cfg.MODEL.BACKBONE.NAME == "build_quant_retinanet_resnet_fpn_backbone"
    assert (cfg.MODEL.QUANT.WEIGHT.NUM_BITS, cfg.MODEL.QUANT.INPUT.NUM_BITS) == (5, 5)
    assert "MODEL.META_ARCHITECTURE" not in quantized_overrides(make_cfg(), 4)
    check_quantizable(cfg)
    eight = make_cfg(*quantized_overrides(make_cfg(), 8))
    assert (eight.MODEL.QUANT.WEIGHT.NUM_BITS, eight.MODEL.QUANT.INPUT.NUM_BITS) == (7, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "must be one of RetinaNet, QuantFCOS, QuantRetinaNet .* got"),
        (("MODEL.PIXEL_STD", "[57.0, 58.0, 59.0]"), "MODEL.PIXEL_STD .* one value for all"),
        (("MODEL.RETINANET.NORM", "GN"), "MODEL.RETINANET.NORM GN does not fold"),
    ],
)
def test_what_has_no_integer_form_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_quantizable(make_cfg(*QUANT, *overrides))


def slow_error(wanted, found, classes):
    """The error, prediction by prediction."""
    sums = [0.0] * 4
    for level, logits in enumerate(wanted[0]):
        n, channels, height, width = logits.shape
        own = [torch.sigmoid(predictions[0][level]) for predictions in (wanted, found)]
        if len(wanted) > 2:
            own = [p * torch.sigmoid(x[2][level]) for p, x in zip(own, (wanted, found), strict=True)]
        for i in range(n):
            for a in range(channels // classes):
                for y in range(height):
                    for x in range(width):
                        scores = [p[i, a * classes : (a + 1) * classes, y, x] for p in own]
                        sums[0] += float((scores[0] - scores[1]).square().sum())
                        sums[1] += float(scores[0].square().sum())
                        boxes = [p[1][level][i, a * 4 : a * 4 + 4, y, x] for p in (wanted, found)]
                        sums[2] += float(scores[0].max() * (boxes[0] - boxes[1]).square().sum())
                        sums[3] += float(scores[0].max() * boxes[0].square().sum())
    return sums[0] / sums[1] + sums[2] / sums[3]


@pytest.mark.parametrize("centerness", [False, True])
def test_the_error_of_outputs(centerness):
    torch.manual_seed(0)
    anchors = 1 if centerness else 2
    shapes = [(anchors * 3, 2, 3), (anchors * 3, 1, 2)]

    def draw():
        kinds = [[torch.randn(2, *s) for s in shapes], [torch.randn(2, anchors * 4, *s[1:]) for s in shapes]]
        return [*kinds, [torch.randn(2, 1, *s[1:]) for s in shapes]] if centerness else kinds

    wanted, found = draw(), draw()
    assert output_error(wanted, wanted, 3) == 0
    assert output_error(wanted, found, 3) == pytest.approx(slow_error(wanted, found, 3), rel=1e-5)


def means_of(model, batch, names):
    """Mean of each channel at modules that are called once."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found.__setitem__(name, output.mean((0, 2, 3)))
        )
        for name in names
    ]
    with torch.no_grad():
        predict(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_corrected_biases_bring_the_means_back(norm):
    full, model = pair("MODEL.RESNETS.NORM", norm or "BN", "MODEL.FPN.NORM", norm)
    suffix = ".norm" if norm else ""
    names = [
        "backbone.bottom_up.stem.conv1.norm",
        "backbone.bottom_up.res4.1.conv2.norm",
        *[f"backbone.fpn_{kind}{level}{suffix}" for kind in ("lateral", "output") for level in (3, 5)],
        "backbone.top_block.p7",
    ]
    batch = images(2)
    wanted, before = means_of(full, batch, names), means_of(model, batch, names)
    state = copy.deepcopy(full.state_dict())
    correct_biases(model, full, [batch])
    after = means_of(model, batch, names)
    for name in names:
        left = (after[name] - wanted[name]).abs().max()
        assert left < 1e-4 or left < 0.05 * (before[name] - wanted[name]).abs().max(), name
    assert (before[names[2]] - wanted[names[2]]).abs().max() > 1e-3
    assert all(torch.equal(value, state[key]) for key, value in full.state_dict().items())
    assert not model._forward_hooks and not model.backbone.bottom_up.stem.conv1.norm._forward_hooks


def test_bn_statistics_are_those_of_the_images():
    _, model = pair()
    norm = model.backbone.bottom_up.res3[0].conv1.norm
    seen = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batches = [images(2), images(2, seed=1)]
    reestimate_bn(model, lambda: iter(batches))
    handle.remove()
    values = torch.cat(seen[:2]).double()
    torch.testing.assert_close(norm.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), values.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("overrides", [(), FCOS, ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")])
def test_the_best_of_what_was_tried_is_taken(tmp_path, overrides):
    if overrides and overrides[0].startswith("MODEL.RESNETS"):
        overrides += ("MODEL.RETINANET.NORM", "")
    full = lively(*overrides)
    file = tmp_path / "full.pth"
    torch.save({"model": full.state_dict()}, file)
    cfg = make_cfg(*STD, *quantized_overrides(make_cfg(*overrides), 4), *overrides)
    lines = []
    batches = [images(2, seed=seed) for seed in range(4)]
    made = quantize_detector(cfg, str(file), batches, methods=("minmax", "mean"), progress=lines.append)
    names = [attempt.name for attempt in made.attempts]
    best = min(made.attempts, key=lambda attempt: attempt.error)
    method = best.name.split(", ")[0]
    corrections = ["biases corrected", "BN estimated again", "BN estimated again, biases corrected"]
    if "FrozenBN" in overrides:
        corrections = corrections[:1]
    assert names == ["minmax", "mean", *[f"{method}, {correction}" for correction in corrections]]
    assert made.chosen == best.name and len(lines) >= len(names)
    assert all(quantizer.is_active for _, quantizer in quantizers(made.model)) and not made.model.training
    with torch.no_grad():
        wanted, found = predict(made.float_model, batches[3]), predict(made.model, batches[3])
        assert torch.equal(wanted[0][0], predict(full, batches[3])[0][0])
    assert output_error(wanted, found, 3) == pytest.approx(best.error, rel=1e-4)


def test_weights_are_reconstructed_first_if_that_is_asked_for(tmp_path, monkeypatch):
    torch.save({"model": lively().state_dict()}, tmp_path / "full.pth")
    rounded = []
    monkeypatch.setattr(post_training, "reconstruct_weights", lambda model, run: rounded.append(len(run())))
    batches = [images(2, seed=seed) for seed in range(4)]
    cfg = make_cfg(*STD, *quantized_overrides(make_cfg(), 4))
    options = {"methods": ("minmax",), "reconstruct": True}
    made = quantize_detector(cfg, str(tmp_path / "full.pth"), batches, **options)
    both = "BN estimated again, biases corrected"
    names = [attempt.name for attempt in made.attempts[-2:]]
    assert names == [f"minmax, {both}", f"minmax, weights rounded by outputs, {both}"] and rounded == [3]
    assert made.attempts[-1].error == pytest.approx(made.attempts[-2].error)  # nothing was rounded here


@pytest.mark.parametrize("number, calibrated_on", [(1, [0]), (2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (5, [0, 1, 2, 4])])
def test_what_is_held_out_is_not_calibrated_on(tmp_path, monkeypatch, number, calibrated_on):
    torch.save({"model": lively().state_dict()}, tmp_path / "full.pth")
    batches = [images(2, seed=seed) for seed in range(number)]
    seen = []

    def observe(model, run):
        monkeypatch.setattr(
            post_training, "predict", lambda _, batch: seen.append([id(b) for b in batches].index(id(batch)))
        )
        run()
        raise StopIteration

    monkeypatch.setattr(post_training, "observe", observe)
    with pytest.raises(StopIteration):
        quantize_detector(make_cfg(*STD, *QUANT), str(tmp_path / "full.pth"), batches, methods=("minmax",))
    assert seen == calibrated_on


def test_a_batch_too_small_for_bn_leaves_that_correction_out(tmp_path):
    torch.save({"model": lively().state_dict()}, tmp_path / "full.pth")
    lines = []
    batches = [images(1)]  # one value a channel at the coarsest level
    made = quantize_detector(
        make_cfg(*STD, *QUANT), str(tmp_path / "full.pth"), batches, methods=("minmax",), progress=lines.append
    )
    assert [attempt.name for attempt in made.attempts] == ["minmax", "minmax, biases corrected"]
    assert any(line.startswith("BN estimated again: left out, ") for line in lines)
    assert not any(module.training for module in made.model.modules())


def test_a_single_batch_serves_for_both_and_none_is_refused(tmp_path):
    file = tmp_path / "full.pth"
    torch.save({"model": lively().state_dict()}, file)
    cfg = make_cfg(*STD, *QUANT)
    made = quantize_detector(cfg, str(file), [images(2)], methods=("minmax",))
    assert made.attempts[0].name == "minmax" and made.attempts[0].error > 0
    with pytest.raises(ValueError, match="at least one image"):
        quantize_detector(cfg, str(file), [])


def test_a_backbone_alone_is_no_detector(tmp_path):
    state = lively().backbone.bottom_up.state_dict()
    torch.save({"model": {f"backbone.bottom_up.{key}": value for key, value in state.items()}}, tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"r18.pth"):
        quantize_detector(make_cfg(*STD, *QUANT), str(tmp_path / "r18.pth"), [images()])
