"""Bounds of the int32 sums: by hand, never passed by the worst input, and refused where they do not hold."""

import numpy as np
import pytest
from programs import make_conv, shared

from aqdet.export.program import Grid
from aqdet.export.proof import bound_accumulator, describe, operation_rows, tightest
from aqdet.export.reference import accumulate

U4, S4, U8 = Grid(0.5, 0, 15), Grid(0.5, -8, 7), Grid(0.5, 0, 255)
WEIGHT = np.array([[[[2, -8]], [[7, 1]]], [[[3, 3]], [[-1, 0]]]])  # 2 x 2 x 1 x 2


def test_bounds_by_hand():
    conv = make_conv(WEIGHT, factor=[2, -1], bias=[10, -300])
    bound = bound_accumulator(conv, U4)
    assert bound.by_codes == max(15 * 2 * 18 + 10, 15 * 7 + 300)
    assert bound.by_bits == 15 * 4 * (8 * 2) + 10  # 4 bits are at most 8, four taps
    assert (bound.max_input_code, bound.max_weight_code) == (15, 16)
    signed = bound_accumulator(conv, S4)
    assert signed.max_input_code == 7 + 128
    assert signed.by_codes == (135 + 128) * 36 + 10


@pytest.mark.parametrize("source", [U4, S4, U8], ids=describe)
def test_the_worst_input_stays_within(source):
    conv = make_conv(WEIGHT, factor=[15, -15], bias=[1000, -7], grid=Grid(1.0, 0, 255))
    bound = bound_accumulator(conv, source)
    weight = conv.integer_weight
    for channel in range(2):
        for sign in (1, -1):
            worst = np.where(sign * weight[channel] > 0, source.quant_max, source.quant_min)
            sums = accumulate(conv, worst[None].astype(np.int64))
            assert np.abs(sums).max() <= bound.by_codes <= bound.by_bits


def test_a_sum_that_may_overflow_is_refused():
    conv = make_conv(np.full((1, 4096, 16, 16), 127), grid=Grid(1.0, 0, 255))
    with pytest.raises(
        ValueError, match=f"layer conv: its sums may reach {4096 * 16 * 16 * 127 * 255}, more than int32 holds"
    ):
        bound_accumulator(conv, U8)


def test_rows_of_a_detector():
    _, program = shared()
    rows = operation_rows(program)
    assert len(rows) == len(program.operations)
    convs = [row for row in rows if row["kind"] == "conv"]
    worst = tightest(rows)
    assert all(row["accumulator_bound"] <= row["accumulator_bound_by_bits"] < 2**31 for row in convs)
    assert worst["accumulator_bound"] == max(row["accumulator_bound"] for row in convs)
    stem, inner = convs[0], convs[1]
    assert stem["types"] == "u8 in uint8 * s8 in int8 + int32 -> int32 -> u8 in uint8"
    assert stem["max_weight_code"] <= 64  # in two parts
    assert (inner["layer"], inner["weight_bits"], inner["input_bits"]) == ("backbone.bottom_up.res2.0.conv1", 4, 4)
    assert inner["max_input_code"] == 15 and inner["max_weight_code"] <= 127
    assert {row["types"].split(" -> ")[-1] for row in convs if row["layer"].startswith("head.cls_score")} == {"float32"}
    assert sum(row["constant_channels"] for row in convs) > 0 < sum(row["flipped_channels"] for row in convs)
