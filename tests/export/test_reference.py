"""The integer reference against hand-computed values and plain loops."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import make_conv

from aqdet.export.program import Add, Grid, MaxPool, PadImage, Requantize, Upsample
from aqdet.export.reference import as_multiplier, execute, shift_round

U4, S8 = Grid(0.5, 0, 15), Grid(0.25, -127, 127)


@pytest.mark.parametrize(
    "value, shift, expected", [(5, 1, 2), (7, 1, 4), (-5, 1, -2), (-7, 1, -4), (6, 2, 2), (10, 2, 2)]
)
def test_ties_go_to_even(value, shift, expected):
    assert shift_round(np.array([value]), shift)[0] == expected


def test_shift_round_is_python_rounding_of_fractions():
    values = np.arange(-300, 300)
    for shift in (1, 3, 5):
        assert shift_round(values, shift).tolist() == [round(Fraction(int(v), 2**shift)) for v in values]


@pytest.mark.parametrize("ratio", [0.75, 1.0, 1 / 3, 3.7e-9, 12.5, 1e-12])
def test_multiplier_has_31_bits(ratio):
    multiplier, shift = as_multiplier(ratio)
    assert 0 < multiplier <= 2**31 and 1 <= shift <= 62
    # 1e-12 has a multiplier of few bits, and products that round to zero with it.
    tolerance = Fraction(1, 2**31) if ratio > 1e-9 else Fraction(1, 2**20)
    assert abs(Fraction(multiplier, 2**shift) / Fraction(ratio) - 1) <= tolerance
    assert as_multiplier(0.75) == (0x60000000, 31)


def test_a_multiplier_too_large_is_refused():
    with pytest.raises(ValueError, match="less than 2"):
        as_multiplier(2.0**40)


def naive_conv(x, conv):
    """Every product, one by one."""
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    weight = conv.integer_weight
    out, depth, kh, kw = weight.shape
    rows = (x.shape[2] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((x.shape[0], out, rows, columns), np.int64)
    for n, o, r, c, d, i, j in itertools.product(*map(range, (*y.shape, depth, kh, kw))):
        channel = o // (out // conv.groups) * depth + d
        row, column = r * sh - ph + i * dh, c * sw - pw + j * dw
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            y[n, o, r, c] += int(x[n, channel, row, column]) * int(weight[o, d, i, j])
    return y + conv.bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"padding": (1, 1), "stride": (2, 2)},
        {"padding": (2, 1), "dilation": (2, 1), "stride": (1, 2)},
        {"groups": 2},
    ],
)
def test_conv_is_every_product_summed(geometry):
    generator = np.random.default_rng(0)
    groups = geometry.get("groups", 1)
    weight = generator.integers(-8, 8, (4, 4 // groups, 3, 3))
    conv = make_conv(weight, bias=[3, -70, 0, 9], factor=[15, -15, 0, 1], grid=None, **geometry)
    x = generator.integers(0, 16, (2, 4, 6, 5))
    unit = Grid(1.0, 0, 15)
    np.testing.assert_array_equal(execute(conv, [x], {"x": unit}), naive_conv(x, conv))


def test_conv_requantizes_by_channel():
    # Sums 6, -12 and 21, in units of 0.5 * 0.25 on the grid of 0.5: times a quarter, then 7 and the ReLU.
    x = np.full((1, 1, 1, 1), 3)
    conv = make_conv([[[[2]]], [[[-4]]], [[[7]]]], scale=[0.25, 0.25, 0.5], bias=[0, 0, 7])
    assert execute(conv, [x], {"x": Grid(0.5, 0, 15)}).flatten().tolist() == [2, 0, 14]
    signed = make_conv([[[[2]]], [[[-4]]]], scale=[0.25, 0.25], grid=Grid(0.25, -127, 127))
    assert execute(signed, [x], {"x": Grid(0.5, 0, 15)}).flatten().tolist() == [3, -6]


def test_other_operations_by_hand():
    x = np.array([[[[1, 2, 3], [15, 5, 6]]]])
    grids = {"x": U4, "y": S8}
    assert execute(Requantize("z", "x", Grid(1.0, 0, 3)), [x], grids).flatten().tolist() == [0, 1, 2, 3, 2, 3]
    y = np.array([[[[-8, 1, 0], [-2, 2, 127]]]])
    # 0.5 x + 0.25 y on the grid of 1.
    added = execute(Add("z", ("x", "y"), Grid(1.0, 0, 255)), [x, y], grids)
    assert added.flatten().tolist() == [0, 1, 2, 7, 3, 35]
    assert execute(Upsample("z", "x"), [x], grids)[0, 0].tolist() == np.kron(x[0, 0], np.ones((2, 2))).tolist()
    padded = execute(PadImage("z", "x", (1, 0), (7,), (7.2,)), [x], grids)
    assert padded[0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [15, 5, 6], [7, 7, 7]]


def test_max_pool_is_torchs():
    x = np.random.default_rng(0).integers(-127, 128, (2, 3, 7, 8))
    pooled = execute(MaxPool("z", "x", 3, 2, 1), [x], {"x": S8})
    expected = F.max_pool2d(torch.from_numpy(x).double(), 3, 2, 1)
    np.testing.assert_array_equal(pooled, expected.numpy())
