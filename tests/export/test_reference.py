"""The integer reference against hand-computed values and plain loops."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import make_conv

from aqdet.export.program import Add, Grid, MaxPool, PadImage, Requantize, Upsample
from aqdet.export.reference import conv_multiplier, execute

U4, S8 = Grid(0.5, 0, 15), Grid(0.25, -127, 127)


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


def test_a_multiplier_is_rounded_twice_to_float32():
    conv = make_conv(np.ones((2, 1, 1, 1)), scale=[1 / 3, 1e-3], grid=Grid(0.7, 0, 255))
    f32 = np.float32
    expected = [f32(f32(f32(0.1) * f32(scale)) / f32(0.7)) for scale in (1 / 3, 1e-3)]
    assert conv_multiplier(conv, 0.1).tolist() == expected and conv_multiplier(conv, 0.1).dtype == np.float32
    prediction = make_conv(np.ones((1, 1, 1, 1)), scale=[1 / 3], grid=None)
    assert conv_multiplier(prediction, 0.1).tolist() == [f32(0.1) * f32(1 / 3)]


def test_a_sum_is_a_float32_before_it_is_multiplied():
    # 2**24 + 1 is no float32; and half of an odd sum is a tie, to even.
    conv = make_conv(np.ones((1, 1, 1, 1)), bias=[2**24], scale=[1.0], grid=None)
    assert execute(conv, [np.full((1, 1, 1, 1), 1)], {"x": Grid(1.0, 0, 15)}).item() == 2.0**24
    halved = make_conv(np.ones((1, 1, 1, 1)), scale=[0.5], grid=Grid(1.0, 0, 15))
    x = np.arange(8).reshape(1, 1, 2, 4)
    assert execute(halved, [x], {"x": Grid(1.0, 0, 15)}).flatten().tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


def test_other_operations_by_hand():
    x = np.array([[[[1, 2, 3], [15, 5, 6]]]])
    grids = {"x": U4, "y": S8}
    assert execute(Requantize("z", "x", Grid(1.0, 0, 3)), [x], grids).flatten().tolist() == [0, 1, 2, 3, 2, 3]
    y = np.array([[[[-8, 1, 0], [-2, 2, 127]]]])
    # x 17/32 + y 8/32: sums of 32nds -47, 42, 51, 239, 101 and 1118.
    added = execute(Add("z", ("x", "y"), Grid(1.0, 0, 30), (17, 8), 5), [x, y], grids)
    assert added.flatten().tolist() == [0, 1, 2, 7, 3, 30]
    assert execute(Upsample("z", "x"), [x], grids)[0, 0].tolist() == np.kron(x[0, 0], np.ones((2, 2))).tolist()
    padded = execute(PadImage("z", "x", (1, 0), (7,), (7.2,)), [x], grids)
    assert padded[0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [15, 5, 6], [7, 7, 7]]


def test_max_pool_is_torchs():
    x = np.random.default_rng(0).integers(-127, 128, (2, 3, 7, 8))
    pooled = execute(MaxPool("z", "x", 3, 2, 1), [x], {"x": S8})
    expected = F.max_pool2d(torch.from_numpy(x).double(), 3, 2, 1)
    np.testing.assert_array_equal(pooled, expected.numpy())
