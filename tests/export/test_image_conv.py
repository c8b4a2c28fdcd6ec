"""The first convolution on blocks of pixels: the same sums as on the image, and where it is not possible."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from programs import image, make_conv, shared

from aqdet.export.agreement import runtime_session
from aqdet.export.image_conv import of_blocks, reads_blocks
from aqdet.export.integer_graph import check_integer
from aqdet.export.onnx_graph import build_onnx
from aqdet.export.program import IMAGE, Grid, PadImage, Program
from aqdet.export.reference import accumulate, run

PIXELS = Grid(1.0, 0, 255)


def space_to_depth(x):
    """SpaceToDepth as ONNX defines it."""
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in ("x", "y")]
    node = onnx.helper.make_node("SpaceToDepth", ["x"], ["y"], blocksize=2)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:]))
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def strided(kernel, channels=3, outputs=4, **changes):
    weight = np.random.default_rng(1).integers(-8, 8, (outputs, channels, *kernel))
    conv = make_conv(weight, stride=(2, 2), factor=[1, -2, 3, 0], bias=[7, -9, 0, 2])
    return dataclasses.replace(conv, **{"input": IMAGE, **changes})


@pytest.mark.parametrize("kernel", [(7, 7), (3, 3), (2, 2), (1, 1), (5, 3), (6, 7)])
@pytest.mark.parametrize("size", [(12, 20), (8, 8)])
def test_the_sums_are_those_of_the_strided_convolution(kernel, size):
    conv = strided(kernel)
    x = np.random.default_rng(0).integers(0, 256, (2, 3, *size))
    converted = of_blocks(conv, "blocks")
    assert (converted.input, converted.stride) == ("blocks", (1, 1))
    assert converted.weight.shape == (4, 12, -(-kernel[0] // 2), -(-kernel[1] // 2))
    np.testing.assert_array_equal(accumulate(converted, space_to_depth(x)), accumulate(conv, x))


def program_of(conv, *before, size_divisibility=32):
    return Program(PIXELS, (*before, conv), (), size_divisibility, pyramid=("y",))


def test_only_a_first_convolution_with_stride_2_does():
    conv = strided((3, 3))
    assert reads_blocks(conv, program_of(conv))
    padded = PadImage("padded", IMAGE, (3, 3), (1, 2, 3), (1.0, 2.0, 3.0))
    assert reads_blocks(dataclasses.replace(conv, input="padded"), program_of(conv, padded))
    for changes in (
        {"stride": (1, 1)},
        {"stride": (2, 1)},
        {"padding": (1, 1)},
        {"dilation": (2, 2)},
        {"groups": 3},
        {"input": "features"},
    ):
        assert not reads_blocks(dataclasses.replace(conv, **changes), program_of(conv)), changes
    assert not reads_blocks(strided((3, 3), channels=64), program_of(conv))
    assert not reads_blocks(conv, program_of(conv, size_divisibility=1))


def test_packed_codes_without_a_zero_are_not_filled_up():
    odd = 2 * np.random.default_rng(2).integers(-2, 2, (4, 3, 3, 3)) + 1
    conv = strided((3, 3), weight=odd.astype(np.int16), weight_bits=2)
    assert not reads_blocks(conv, program_of(conv))
    # 8 bits are stored as they are, whatever their grid.
    wide = strided((3, 3), weight=(odd * 85).astype(np.int16), weight_bits=8)
    assert reads_blocks(wide, program_of(wide))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_or_not_the_codes_are_the_references(bits):
    limit = 2 ** (bits - 1)
    weight = np.random.default_rng(3).integers(-limit, limit, (4, 3, 7, 7)).astype(np.int16)
    grid = Grid(2.0**bits * 64, -128, 127)
    conv = strided((7, 7), weight=weight, weight_bits=bits, input="padded", grid=grid)
    program = program_of(conv, PadImage("padded", IMAGE, (3, 3), (1, 2, 3), (1.0, 2.0, 3.0)))
    model = build_onnx(program)
    executed = check_integer(model)
    assert executed["SpaceToDepth"] == executed["QLinearConv"] == 1
    batch = image(32, 64)
    (found,) = runtime_session(model, optimize=True).run(["y"], {"image": batch})
    expected = run(program, batch)["y"] + grid.zero_point
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(found, expected)


def test_a_detector_reads_its_image_so():
    _, program = shared()
    stem = next(program.convs())
    assert reads_blocks(stem, program)
    assert not any(reads_blocks(conv, program) for conv in list(program.convs())[1:])
