"""The detector in C: compiled without warnings, its predictions are those of the shipped model to the bit."""

import dataclasses
import shutil

import c_program
import numpy as np
import onnxruntime
import pytest
from programs import LSQPLUS, SEVEN_BITS, image, make_conv, shared

from aqdet.export.c_source import build_c, pack
from aqdet.export.onnx_graph import build_onnx
from aqdet.export.program import IMAGE, Grid, Program
from aqdet.export.reference import run

ARM_GCC, QEMU = "arm-linux-gnueabihf-gcc", "qemu-arm-static"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


needs_arm = pytest.mark.skipif(
    shutil.which(ARM_GCC) is None or shutil.which(QEMU) is None,
    reason="needs gcc-arm-linux-gnueabihf, libc6-dev-armhf-cross and qemu-user-static",
)


def compiled(folder, source, *compiler):
    """A program that reads images from its standard input and writes the predictions."""
    for name, text in (("detector.h", source.header), ("detector.c", source.source)):
        (folder / name).write_text(text)
    return c_program.build(folder, folder, *compiler)


@needs_gcc
@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        ((), ("-O3",)),
        ((), ("-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover")),
        (SEVEN_BITS, ("-O3", "-march=native", "-ffp-contract=fast")),
        (LSQPLUS, ("-O1",)),
        (("MODEL.QUANT.WEIGHT.QUANTIZER", "lsqodd", "MODEL.QUANT.WEIGHT.NUM_BITS", "2"), ("-O1",)),
    ],
)
def test_predictions_are_the_shipped_ones_to_the_bit(tmp_path, overrides, flags):
    _, program = shared(*overrides)
    images = image(64, 96, count=2)
    source = build_c(program, 64, 96)
    expected = run(program, images)
    found = c_program.predictions([compiled(tmp_path, source, "gcc", *flags)], source.header, images)
    assert set(found) == {name for output in program.outputs for name in output.names}
    session = onnxruntime.InferenceSession(build_onnx(program).SerializeToString(), providers=["CPUExecutionProvider"])
    shipped = dict(zip([o.name for o in session.get_outputs()], session.run(None, {IMAGE: images}), strict=True))
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        np.testing.assert_array_equal(found[name], shipped[name], err_msg=name)
    assert source.outputs == sum(value[0].nbytes for value in found.values())


@needs_arm
@pytest.mark.parametrize(
    ("overrides", "flags"),
    [((), ("-O3", "-mthumb")), (LSQPLUS, ("-O3", "-marm", "-mcpu=cortex-a15", "-mfpu=neon-vfpv4"))],
    ids=["thumb", "neon"],
)
def test_predictions_on_32_bit_arm(tmp_path, overrides, flags):
    _, program = shared(*overrides)
    images = image(64, 64, count=1)
    source = build_c(program, 64, 64)
    binary = compiled(tmp_path, source, ARM_GCC, "-static", *flags)
    expected = run(program, images)
    for name, value in c_program.predictions([QEMU, binary], source.header, images).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@needs_gcc
def test_a_program_that_does_not_compile_says_why(tmp_path):
    source = build_c(shared()[1], 64, 64)
    with pytest.raises(RuntimeError, match="gcc: .*only without -ffast-math"):
        compiled(tmp_path, source, "gcc", "-ffast-math")


def slow_unpack(words, count, bits):
    """Codes of a packed stream, bit by bit."""
    codes = []
    for index in range(count):
        value = 0
        for bit in range(bits):
            position = index * bits + bit
            value |= (int(words[position // 32]) >> (position % 32) & 1) << bit
        codes.append(value - (1 << bits) if value >> (bits - 1) else value)
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_packed_weights(bits):
    generator = np.random.default_rng(bits)
    weight = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 5, 2, 3)).astype(np.int16)
    words = pack(weight, bits)
    codes = slow_unpack(words, weight.size, bits)
    assert codes == weight.transpose(0, 2, 3, 1).reshape(-1).tolist()
    assert len(codes) * bits + 32 <= len(words) * 32 < len(codes) * bits + 96


def test_memory_is_reported():
    _, program = shared()
    small, large = build_c(program, 64, 64), build_c(program, 128, 128)
    assert small.flash == large.flash and small.arena < large.arena
    weights = {conv.name: conv.weight.size * conv.weight_bits / 8 for conv in program.convs()}
    assert 1.0 < small.flash / sum(weights.values()) < 1.2
    assert "static uint8_t arena[" in small.source and "malloc" not in small.source
    assert "DETECTOR_HEIGHT = 64, DETECTOR_WIDTH = 64" in small.header


def test_sizes_and_layers_that_it_has_no_loops_for():
    _, program = shared()
    for height, width in ((60, 64), (64, 0)):
        with pytest.raises(ValueError, match=f"must be multiples of 32, got {height}x{width}"):
            build_c(program, height, width)
    with pytest.raises(ValueError, match="need [0-9,]+ bytes of memory, at most 2,147,483,647 are supported"):
        build_c(program, 320000, 320000)
    conv = dataclasses.replace(make_conv(np.ones((2, 1, 1, 1)), groups=2, grid=None), input=IMAGE)
    grouped = Program(Grid(1.0, 0, 255), (conv,), (), 1)
    with pytest.raises(ValueError, match="layer conv is a grouped or dilated convolution"):
        build_c(grouped, 4, 4)
