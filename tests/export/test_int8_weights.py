"""Integer weights in int8 tensors."""

import numpy as np
import pytest
from programs import make_conv, shared

from aqdet.export.int8_weights import PAIR_LIMIT, int8_parts
from aqdet.export.program import Grid, largest_code

OUT = Grid(1.0, 0, 255)


@pytest.mark.parametrize("largest, count", [(15, 3), (128, 3), (129, 3), (255, 4)])
def test_wide_codes_are_a_sum_of_int8(largest, count):
    weight = np.arange(-255, 256, 2).reshape(1, -1, 1, 1)
    parts = int8_parts(make_conv(weight, grid=OUT), Grid(1.0, 0, largest))
    assert len(parts) == count and all(part.dtype == np.int8 for part in parts)
    np.testing.assert_array_equal(sum(part.astype(int) for part in parts), weight)
    assert all(2 * largest * np.abs(part.astype(int)).max() <= PAIR_LIMIT for part in parts)


def test_one_part_where_two_products_fit_int16():
    # 2 * 129 * 127 is 32766, 2 * 130 * 127 is 33020; a signed code of s8 is stored as up to 255.
    for weight, source, count in (
        (127, Grid(1.0, 0, 129), 1),
        (127, Grid(1.0, 0, 130), 2),
        (-127, Grid(1.0, 0, 130), 2),
        (64, Grid(1.0, -128, 127), 1),
        (65, Grid(1.0, -128, 127), 2),
        (127, Grid(1.0, 0, 15), 1),
        (200, Grid(1.0, 0, 130), 2),
    ):
        for grid in (OUT, None):
            assert len(int8_parts(make_conv(np.full((1, 2, 1, 1), weight), grid=grid), source)) == count


def test_a_grouped_convolution_has_one_part_or_none():
    conv = make_conv(np.full((2, 1, 1, 1), 65), grid=OUT, groups=2)
    assert len(int8_parts(conv, Grid(1.0, 0, 127))) == 1
    with pytest.raises(ValueError, match=r"layer conv: weight codes up to 65 .* at most 64 .* \(MODEL.QUANT.RULES\)"):
        int8_parts(conv, Grid(1.0, 0, 255))


def test_the_stem_and_the_predictions_of_a_4_bit_detector():
    _, program = shared()
    grids = program.grids()
    wide = {conv.name for conv in program.convs() if len(int8_parts(conv, grids[conv.input])) > 1}
    assert wide == {"backbone.bottom_up.stem.conv1", "head.cls_score", "head.bbox_pred"}
    for conv in program.convs():
        parts = int8_parts(conv, grids[conv.input])
        np.testing.assert_array_equal(sum(part.astype(int) for part in parts), conv.integer_weight)
        largest = max(np.abs(part.astype(int)).max() for part in parts)
        assert 2 * largest_code(grids[conv.input]) * largest <= PAIR_LIMIT
