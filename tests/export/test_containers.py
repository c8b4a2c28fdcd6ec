"""Integer weights in 8-bit tensors."""

import numpy as np
import pytest
from programs import make_conv, shared

from aqdet.export.containers import split_copies, stored_as_uint8
from aqdet.export.program import Grid


def test_wide_codes_are_a_sum_of_int8():
    weight = np.arange(-255, 256, 2).reshape(1, -1, 1, 1)
    parts = split_copies(weight, "conv", 1)
    assert len(parts) == 3 and all(part.dtype == np.int8 for part in parts)
    np.testing.assert_array_equal(sum(part.astype(int) for part in parts), weight)
    assert len(split_copies(np.full((1, 1, 1, 1), -127), "conv", 1)) == 1
    with pytest.raises(ValueError, match="layer conv: weight codes up to 255"):
        split_copies(weight, "conv", 2)


def test_uint8_where_two_products_may_exceed_int16():
    out = Grid(1.0, 0, 255)
    # 2 * 129 * 127 is 32766, 2 * 130 * 127 is 33020; a signed code of s8 is stored as up to 255.
    for weight, source, expected in (
        (127, Grid(1.0, 0, 129), False),
        (127, Grid(1.0, 0, 130), True),
        (-127, Grid(1.0, 0, 130), True),
        (64, Grid(1.0, -128, 127), False),
        (65, Grid(1.0, -128, 127), True),
        (127, Grid(1.0, 0, 15), False),
        (200, Grid(1.0, 0, 130), False),  # as the sum of two of 100
    ):
        assert stored_as_uint8(make_conv(np.full((1, 2, 1, 1), weight), grid=out), source) is expected
    assert stored_as_uint8(make_conv(np.full((1, 2, 1, 1), 1), grid=None), Grid(1.0, 0, 15))  # a prediction


def test_only_the_stem_of_a_4_bit_detector():
    _, program = shared()
    grids = program.grids()
    wide = [conv.path for conv in program.convs() if conv.grid and stored_as_uint8(conv, grids[conv.input])]
    assert wide == ["backbone.bottom_up.stem.conv1"]
