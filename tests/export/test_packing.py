"""The packed file: bits by hand, the whole program back, damage refused."""

import dataclasses

import numpy as np
import pytest
from helpers import FCOS
from programs import LSQPLUS, image, shared

from aqdet.export.packing import load_program, pack, save_program, storage_bits, unpack
from aqdet.export.program import Conv
from aqdet.export.reference import run

DOREFA = ("MODEL.QUANT.WEIGHT.QUANTIZER", "dorefa", "MODEL.QUANT.INPUT.QUANTIZER", "dorefa")
TWO = ("MODEL.QUANT.WEIGHT.NUM_BITS", "2", "MODEL.QUANT.WEIGHT.PER_CHANNEL", "False")


def test_packing_by_hand():
    assert pack(np.array([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([3, 0, 1, 2, 1]), 2).tolist() == [0b10010011, 1]
    assert pack(np.array([7, 200]), 8).tolist() == [7, 200]
    assert [storage_bits(bits) for bits in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpack_inverts_pack(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 3, 1))
    packed = pack(codes, bits)
    assert packed.nbytes == -(-codes.size * storage_bits(bits) // 8)
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("overrides", [(), DOREFA, TWO, LSQPLUS, FCOS], ids=["lsq", "dorefa", "2 bits", "lsq+", "fcos"])
def test_the_program_comes_back(tmp_path, overrides):
    _, program = shared(*overrides)
    path = tmp_path / "model.safetensors"
    save_program(program, path)
    loaded = load_program(path)
    assert (loaded.image, loaded.outputs, loaded.size_divisibility) == (
        program.image,
        program.outputs,
        program.size_divisibility,
    )
    for ours, theirs in zip(loaded.operations, program.operations, strict=True):
        if not isinstance(theirs, Conv):
            assert ours == theirs
            continue
        for field in dataclasses.fields(Conv):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name), field.name)
    batch = image(32, 32)
    again = run(loaded, batch)
    for name, value in run(program, batch).items():
        np.testing.assert_array_equal(again[name], value)


def test_four_bit_weights_take_half_a_byte(tmp_path):
    _, program = shared()
    path = tmp_path / "model.safetensors"
    save_program(program, path)
    weights = {conv.path: (conv.weight.size, conv.weight_bits) for conv in program.convs()}
    packed = sum(-(-size * bits // 8) for size, bits in weights.values())
    # What is not a weight: a factor, a scale and a bias a channel, and the operations.
    rest = path.stat().st_size - packed
    assert 0 < rest < 0.05 * packed


def test_damage_is_refused_in_one_line(tmp_path):
    _, program = shared()
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_program(path)
    save_program(program, path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content.replace(b'"kind\\":\\"Add', b'"kind\\":\\"Axe', 1)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a packed detector of aqdet, or damaged") as error:
            load_program(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
