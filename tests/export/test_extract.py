"""From modules to the program: batch norm of any sign, padding, and one-line refusals that name the layer."""

import copy

import numpy as np
import pytest
import torch
from helpers import FCOS, QUANT, calibrated, make_batch, make_model
from programs import LSQPLUS, OVERRIDES, RELU, STD, image, shared, trained_like
from torch import nn

from aqdet.export.agreement import trained_values
from aqdet.export.extract import extract
from aqdet.export.fold import fold as fold_conv
from aqdet.export.program import Grid, PadImage, Requantize, inputs_of
from aqdet.export.reference import run
from aqdet.export.rounded import with_rounded_constants
from aqdet.quantization import QUANTIZER_REGISTRY, Quantizer, set_quantization

U4, U8 = Grid(0.1, 0, 15), Grid(0.05, 0, 255)
CODES = np.array([[2, -8], [7, 1], [3, 3], [-1, 0]]).reshape(4, 2, 1, 1)


def fold(scale, bias, target=U8, codes=CODES):
    return fold_conv(codes, np.array(scale, float), np.array(bias, float), U4, target, "some.conv")


def real_outputs(folded, codes=CODES, x=(3, 5)):
    """The real outputs of folded integers for one pixel."""
    weight = codes[:, :, 0, 0] * (folded["sign"].astype(int) * folded["multiple"]).reshape(-1, 1)
    return (weight @ np.array(x) + folded["bias"]) * folded["scale"].astype(float) * U4.scale


def test_fold_gives_the_real_outputs_back():
    scale, bias = np.array([0.02, -0.03, 0.0, 1e-13]), np.array([0.7, -0.4, 1.5, 2.5])
    folded = fold(scale, bias)
    expected = (CODES[:, :, 0, 0] @ np.array([3, 5])) * scale * U4.scale + bias
    assert folded["sign"].tolist() == [1, -1, 0, 0]
    assert folded["scale"].dtype == np.float32 and (folded["scale"] > 0).all()
    # Half a unit of the sum, which is as fine as int8 allows: 127 // 8 and 127 // 7.
    assert folded["multiple"][:2].tolist() == [15, 18]
    unit = folded["scale"].astype(float) * U4.scale
    assert (np.abs(real_outputs(folded) - expected) <= 0.5001 * unit + 1e-9).all()


def test_a_bias_that_saturates_the_output_stays_saturated():
    # More than 2**31 units of bias: the channel is off for good.
    folded = fold([1e-9, 1e-9, -1e-9, 1e-9], [-1e4, 1e4, -1e4, 1e4])
    assert folded["sign"].tolist() == [0] * 4
    assert (np.sign(real_outputs(folded)) == [-1, 1, -1, 1]).all() and (np.abs(real_outputs(folded)) > 255 * 0.05).all()


def test_a_bias_that_does_not_fit_is_refused():
    big = np.full((1, 1, 1, 1), 100_000)
    with pytest.raises(ValueError, match="layer some.conv: the bias of channel 0 needs more than 32 bits"):
        fold([1e-9], [4.0], codes=big)
    with pytest.raises(ValueError, match="layer some.conv: the bias of channel 0 needs"):
        fold([1e-12], [4.0], target=None, codes=CODES[:1])
    with pytest.raises(ValueError, match="not finite"):
        fold([np.nan] * 4, [0] * 4)


def test_pairs_of_products_do_not_saturate_16_bits_where_avoidable():
    signed = Grid(0.1, -8, 7)
    folded = fold_conv(np.full((1, 4, 1, 1), 1), np.ones(1), np.zeros(1), signed, U8, "c")
    assert folded["multiple"].tolist() == [121]  # 2 * (7 + 128) * 121 is 32670


def test_every_conv_of_the_detector_once_a_level():
    model, program = shared()
    convs = [module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    names = [conv.name for conv in program.convs()]
    assert len(set(names)) == len(convs)
    head = [name for name in names if name.startswith("head.")]
    assert len(head) == 5 * 4 and len(names) == len(convs) - 4 + 20
    known = {"image"}
    for operation in program.operations:
        assert set(inputs_of(operation)) <= known
        known.add(operation.output)


def test_batch_norm_of_either_sign_and_none_is_there():
    _, program = shared()
    signs = np.concatenate([conv.sign for conv in program.convs()])
    assert {-1, 0, 1} == set(signs.tolist())


def test_levels_have_a_norm_each():
    _, program = shared()
    tower = [conv for conv in program.convs() if conv.name == "head.bbox_subnet.0"]
    assert [conv.level for conv in tower] == ["p3", "p4", "p5", "p6", "p7"]
    assert len({conv.scale.tobytes() for conv in tower}) == 5
    assert len({conv.weight.tobytes() for conv in tower}) == 1


def test_the_image_is_padded_with_the_mean_pixel():
    _, program = shared()
    pad = program.operations[0]
    assert isinstance(pad, PadImage) and pad.amount == (3, 3)
    assert pad.values == (104, 116, 124) and pad.mean[0] == pytest.approx(103.53)
    assert program.image.scale == np.float32(1 / 57)


def test_a_whole_mean_pixel_is_exact():
    # On an image of the mean pixel the normalised image is zero, and so is every product of the stem.
    model, program = shared("MODEL.PIXEL_MEAN", "[128.0, 128.0, 128.0]")
    batch = np.full((1, 3, 32, 32), 128, np.uint8)
    stem = next(program.convs())
    values = run(program, batch)[stem.output]
    assert all(len(np.unique(channel)) == 1 for channel in values[0])
    theirs = trained_values(model, program, batch)[stem.output]
    np.testing.assert_array_equal(values, theirs)


def test_requantization_clips_like_the_quantizer():
    model, program = shared()
    values = run(program, image())
    grids = program.grids()
    for operation in program.operations:
        if isinstance(operation, Requantize):
            quantizer = model.get_submodule(operation.output.split("@")[0])
            real = torch.from_numpy(values[operation.input].astype(np.float32)) * grids[operation.input].scale
            np.testing.assert_array_equal(values[operation.output], quantizer.to_integer(real).codes.numpy())


def test_an_offset_is_a_zero_point_of_zero():
    # LSQ+ shifts the range by whole codes: the code of zero stays 0, and padding is exact.
    model, program = shared(*LSQPLUS)
    quantizer = model.backbone.fpn_output3.input_quantizer
    grid = program.grids()["backbone.fpn_output3.input_quantizer"]
    assert quantizer.spec.signed and grid.quant_max - grid.quant_min == 15 and grid.quant_min < 0
    real = torch.linspace(-3, 3, 50)
    integers = quantizer.to_integer(real)
    assert grid.quant_min == -integers.zero_point
    codes = np.clip(np.round(real.numpy() / np.float32(grid.scale)), grid.quant_min, grid.quant_max)
    np.testing.assert_array_equal(codes, integers.codes.numpy() - integers.zero_point)
    assert [Grid(1.0, *bounds).zero_point for bounds in ((0, 255), (-3, 12), (-128, 127), (-100, 155), (-255, 0))] == [
        0,
        128,
        128,
        100,
        255,
    ]


def test_fcos_predicts_three_outputs_from_two_towers():
    _, program = shared(*FCOS)
    assert program.outputs[0].names == ("logits_p3", "deltas_p3", "centerness_p3")
    # The box tower's last conv once for each grid that reads it.
    last = [conv for conv in program.convs() if conv.name == "head.bbox_subnet.0"]
    assert len(last) == 2 * 5
    assert {conv.output.split("@")[0] for conv in last} == {
        "head.bbox_pred.input_quantizer",
        "head.ctrness.input_quantizer",
    }
    assert len([conv for conv in program.convs() if conv.name == "head.cls_subnet.0"]) == 5
    _, program = shared(*FCOS, "MODEL.FCOS.CLASS_LOSS", "quality")
    assert program.outputs[0].names == ("logits_p3", "deltas_p3")
    assert len([conv for conv in program.convs() if conv.name == "head.bbox_subnet.0"]) == 5


def test_rounded_constants_are_the_programs():
    model, program = shared()
    rounded = with_rounded_constants(model)
    again = extract(rounded)
    for ours, theirs in zip(again.convs(), program.convs(), strict=True):
        np.testing.assert_array_equal(ours.bias, theirs.bias)
        np.testing.assert_array_equal(ours.scale, theirs.scale)
    pairs = zip(rounded.state_dict().values(), model.state_dict().values(), strict=True)
    moved = [(a.float() - b.float()).abs().max() for a, b in pairs]
    assert 0 < max(moved) < 0.1


# --- refusals ---


def refusal(model):
    with pytest.raises(ValueError) as error:
        extract(model)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_uncalibrated_is_refused():
    message = refusal(make_model(*OVERRIDES))
    assert "layer backbone.bottom_up.stem.output_stream.quantizer" in message and "not calibrated" in message


def test_float_is_refused():
    assert "layer backbone.bottom_up.stem" in refusal(make_model(*STD))
    rule = "[['res2.0.conv2', {'ENABLED': False}]]"
    message = refusal(trained_like("MODEL.QUANT.RULES", rule))
    assert "layer backbone.bottom_up.res2.0.conv2 is in float" in message and "MODEL.QUANT.RULES" in message


def test_switched_off_is_refused():
    model = trained_like()
    set_quantization(model, False)
    assert "switched off" in refusal(model)


def test_another_detector_is_refused():
    model = make_model(theirs=True)
    assert "MODEL.META_ARCHITECTURE must be QuantRetinaNet" in refusal(model)


def test_one_deviation_a_channel_is_refused():
    model = calibrated(make_model(*QUANT, *RELU, "MODEL.PIXEL_STD", "[58.0, 57.0, 57.0]"), make_batch())
    message = refusal(model)
    assert "MODEL.PIXEL_STD" in message and "stem.conv1" in message


def test_group_norm_is_refused():
    model = copy.deepcopy(shared()[0])
    model.backbone.fpn_output3.norm = nn.GroupNorm(4, 16)
    assert "layer backbone.fpn_output3: norm GroupNorm does not fold" in refusal(model)


class Levels(Quantizer):
    """A method that export does not know, with no uniform grid."""

    def set_range(self, statistics, method):
        pass

    def fake_quantize(self, x):
        return torch.sign(x) * x.abs().sqrt().round().square()


@pytest.mark.parametrize(
    "key, name, method, reason",
    [
        ("INPUT", "input_quantizer", "lqnet", "has levels that are no multiples of one step"),
        ("WEIGHT", "weight_quantizer", "lqnet", "has levels that are no multiples of one step"),
        ("INPUT", "input_quantizer", "n2uq", "compares with learned thresholds"),
    ],
)
def test_lqnet_and_n2uq_are_refused(key, name, method, reason):
    message = refusal(trained_like("MODEL.QUANT.RULES", f"[['res3.1.conv1', {{'{key}.QUANTIZER': '{method}'}}]]"))
    assert message.startswith(f"layer backbone.bottom_up.res3.1.conv1.{name}: quantizer '{method}' {reason}")
    methods = {"INPUT": "dorefa, lsq, lsqplus or pact", "WEIGHT": "dorefa, lsq, lsqodd, lsqplus or pact"}
    assert f"train the layer with {methods[key]} to export it" in message


@pytest.mark.parametrize("key, name", [("WEIGHT", "weight_quantizer"), ("INPUT", "input_quantizer")])
def test_a_method_that_is_not_uniform_is_refused(monkeypatch, key, name):
    monkeypatch.setitem(QUANTIZER_REGISTRY, "squares", {"weight": Levels, "input": Levels})
    rule = f"[['res3.1.conv1', {{'{key}.QUANTIZER': 'squares'}}]]"
    message = refusal(trained_like("MODEL.QUANT.RULES", rule))
    assert f"layer backbone.bottom_up.res3.1.conv1.{name}: quantizer 'squares'" in message


def broken(path, value, index=0):
    """A detector of which one value of a parameter or buffer is another."""
    model = trained_like()
    with torch.no_grad():
        model.state_dict(keep_vars=True)[path].flatten()[index] = value
    return model


CONV = "backbone.bottom_up.res4.0.conv1"


@pytest.mark.parametrize(
    "path, value, words",
    [
        (f"{CONV}.input_quantizer.scale", np.nan, "its scale must be above 0 and at most 1e+06, got nan"),
        (f"{CONV}.input_quantizer.scale", np.inf, "its scale must be above 0 and at most 1e+06, got inf"),
        (f"{CONV}.input_quantizer.scale", 0.0, "its scale must be above 0 and at most 1e+06, got 0"),
        (f"{CONV}.input_quantizer.scale", -0.25, "its scale must be above 0 and at most 1e+06, got -0.25"),
        (f"{CONV}.input_quantizer.scale", 1e32, "its scale must be above 0 and at most 1e+06, got 1e+32"),
        (f"{CONV}.weight_quantizer.scale", -3e-9, "its scale must be above 0 and at most 1e+06, got -3e-09"),
        (f"{CONV}.weight_quantizer.scale", 1e32, "its scale must be above 0 and at most 1e+06, got 1e+32 (1 of 256"),
        ("backbone.bottom_up.res3.1.residual_add.x_quantizer.alpha", -1e-9, "its alpha must be above 0 and"),
        ("backbone.fpn_lateral4.input_quantizer.scale", -1.0, "its scale must be above 0 and at most 1e+06, got -1"),
        (
            f"{CONV}.weight",
            np.nan,
            "its weight must be finite, got nan (1 of 294912 values, the first at [0, 0, 0, 0])",
        ),
        (f"{CONV}.weight", -np.inf, "its weight must be finite, got -inf (1 of"),
        (f"{CONV}.norm.weight", np.nan, "its weight must be finite, got nan (1 of 256 values, the first at [0])"),
        (f"{CONV}.norm.running_var", -1.0, "its running_var must be finite and not negative, got -1"),
        (f"{CONV}.norm.weight", 1e32, "one unit of the sum of channel 0 is"),
        ("head.bbox_pred.bias", np.nan, "its bias must be finite, got nan"),
    ],
)
def test_a_bad_value_is_refused_by_layer_and_value(path, value, words):
    message = refusal(broken(path, value))
    assert message.startswith(f"layer {path.rpartition('.')[0].removesuffix('.norm')}") and words in message


@pytest.mark.parametrize("factor", [2e3, 1e5])
def test_a_scale_at_which_everything_is_zero_is_refused(factor):
    # The stream before it ends at 255 of its steps, far below half of one of these.
    model = trained_like()
    with torch.no_grad():
        model.get_submodule(f"{CONV}.input_quantizer").scale.mul_(factor)
    message = refusal(model)
    assert message.startswith(f"layer {CONV}.input_quantizer: its scale is ") and "no value before it" in message


def test_weights_that_all_round_to_zero_are_refused():
    model = trained_like()
    with torch.no_grad():
        model.get_submodule(f"{CONV}.weight_quantizer").scale.mul_(1e3)
    message = refusal(model)
    assert message.startswith(f"layer {CONV}.weight_quantizer: its scale is ") and "no weight is larger" in message


def test_values_of_what_does_not_ship_are_nobodys_business():
    model = trained_like("MODEL.AUX.ENABLED", "True")
    with torch.no_grad():
        next(model.auxiliary.parameters()).fill_(np.nan)
    extract(model)


def test_an_unknown_activation_is_refused():
    model = copy.deepcopy(shared()[0])
    model.backbone.fpn_lateral4.activation = torch.tanh
    assert "layer backbone.fpn_lateral4: activation" in refusal(model)


def test_extraction_leaves_the_model_alone():
    model, _ = shared()
    before = copy.deepcopy(model.state_dict())
    extract(model)
    with_rounded_constants(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
