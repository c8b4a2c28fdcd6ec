"""Scales of sums: no pair of codes at a tie, the same in ONNX Runtime's kernel, near to what was trained."""

from fractions import Fraction

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from programs import LSQPLUS, shared

from aqdet.export.program import Add, Grid
from aqdet.export.reference import execute
from aqdet.export.sums import choose_sum_scales, largest_move

U8, S8, N8 = (0, 255), (-128, 127), (-127, 127)


def grids_of(ratios, ranges):
    return tuple(Grid(ratio, *bounds) for ratio, bounds in zip(ratios, ranges, strict=True))


def random_sums(number):
    generator = np.random.default_rng(3)
    for _ in range(number):
        ratios = np.exp(generator.uniform(np.log(0.03), np.log(6), 2))
        ranges = [(U8, S8, N8)[index] for index in generator.integers(0, 3, 3)]
        yield grids_of(ratios, ranges[:2]), Grid(1.0, *ranges[2])


def add_of(operands, target):
    multipliers, shift = choose_sum_scales(operands, target)
    return Add("z", ("x", "y"), target, multipliers, shift), {"x": operands[0], "y": operands[1], "z": target}


def all_codes(operands):
    axes = (np.arange(grid.quant_min, grid.quant_max + 1) for grid in operands)
    return np.meshgrid(*axes, indexing="ij")


def qlinear_add(add, grids, a, b):
    """ONNX Runtime's own kernel."""
    scales = [multiplier / 2**add.shift for multiplier in add.multipliers] + [1.0]
    names = [*add.inputs, add.output]
    constants, inputs = [], []
    for name, scale in zip(names, scales, strict=True):
        constants.append(numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"))
        constants.append(numpy_helper.from_array(np.array(grids[name].zero_point, np.uint8), f"{name}_zero"))
        inputs += [f"{name}_in"] * (name != add.output) + [f"{name}_scale", f"{name}_zero"]
    node = helper.make_node("QLinearAdd", inputs, ["out"], domain="com.microsoft")
    info = [helper.make_tensor_value_info(n, TensorProto.UINT8, None) for n in ("x_in", "y_in", "out")]
    graph = helper.make_graph([node], "g", info[:2], info[2:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {
        f"{name}_in": (codes + grids[name].zero_point).astype(np.uint8)
        for name, codes in zip(add.inputs, (a, b), strict=True)
    }
    out = session.run(None, feed)[0].astype(int) - add_zero(add)
    return np.clip(out, add.grid.quant_min, add.grid.quant_max)


def add_zero(add):
    return add.grid.zero_point


def test_no_pair_of_codes_is_a_tie_and_every_product_is_exact():
    for operands, target in random_sums(12):
        add, _ = add_of(operands, target)
        a, b = all_codes(operands)
        sums = a * add.multipliers[0] + b * add.multipliers[1]
        half = 2 ** (add.shift - 1)
        inside = (sums > target.quant_min * 2 * half) & (sums < target.quant_max * 2 * half)
        assert not ((sums % (2 * half) == half) & inside).any()
        assert np.abs(sums).max() < 2**23 and 1 <= add.shift <= 15


def test_the_kernel_is_the_reference_for_every_pair_of_codes():
    for operands, target in random_sums(12):
        add, grids = add_of(operands, target)
        a, b = all_codes(operands)
        np.testing.assert_array_equal(qlinear_add(add, grids, a, b), execute(add, [a, b], grids))


def test_rounding_is_that_of_fractions():
    operands, target = next(random_sums(1))
    add, grids = add_of(operands, target)
    generator = np.random.default_rng(0)
    a, b = (generator.integers(grid.quant_min, grid.quant_max + 1, 200) for grid in operands)
    expected = [
        min(
            max(
                round(Fraction(int(x) * add.multipliers[0] + int(y) * add.multipliers[1], 2**add.shift)),
                target.quant_min,
            ),
            target.quant_max,
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert execute(add, [a, b], grids).tolist() == expected


def test_the_move_is_small_and_as_measured():
    for operands, target in random_sums(12):
        add, grids = add_of(operands, target)
        a, b = all_codes(operands)
        own = a * operands[0].scale + b * operands[1].scale
        ours = (a * add.multipliers[0] + b * add.multipliers[1]) / 2**add.shift
        bound = largest_move(add, grids)
        assert np.abs(own - ours).max() <= bound + 1e-9 and bound < 0.25


def test_whole_ratios_stay_whole():
    # 1 and 2 are no problem as they are: no fraction, no tie.
    multipliers, shift = choose_sum_scales(grids_of((1.0, 2.0), (U8, N8)), Grid(1.0, *U8))
    assert (multipliers[0] / 2**shift, multipliers[1] / 2**shift) == (1.0, 2.0)


@pytest.mark.parametrize("ratios", [(1e6, 1.0), (1.0, 1e-7), (1e-9, 1e-9)])
def test_scales_that_are_too_far_apart_are_refused(ratios):
    with pytest.raises(ValueError, match="layer some.add: its operands' scales .* too far apart"):
        choose_sum_scales(grids_of(ratios, (U8, N8)), Grid(1.0, *U8), "some.add")


@pytest.mark.parametrize("overrides", [(), LSQPLUS], ids=["relu", "lsq+"])
def test_the_sums_of_a_detector_move_little(overrides):
    _, program = shared(*overrides)
    grids = program.grids()
    moves = [largest_move(operation, grids) for operation in program.operations if isinstance(operation, Add)]
    assert len(moves) == 10 and max(moves) < 0.15
