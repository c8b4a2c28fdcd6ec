"""Weights of an ONNX graph, stored in the bits that they were trained with.

An initializer holds the packed codes. Standard nodes turn them into int8: they unpack, multiply by the channel's sign
and multiple, and cast. These nodes depend on constants alone, so that ONNX Runtime computes them once, when it loads
the file, and then has the int8 weights that its integer convolutions need. The file has half or a quarter of the size,
and speed and values are the same.

- 1 and 2 bits: four codes in a byte of a UINT8 tensor, the first in the lowest bits; shifts and a mask unpack them.
- 3 and 4 bits: an INT4 tensor, two codes in a byte. ONNX Runtime reads it from version 1.23 on.
- More bits: int8 without packing, multiplied by sign and multiple.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .program import Conv

if TYPE_CHECKING:
    from .onnx_graph import GraphBuilder

CODES_PER_BYTE = 4
INT4_MIN = -8


def packed_bits(conv: Conv) -> int:
    """Returns the bits that a code of the convolution's weight takes in the file: 2, 4 or 8."""
    smallest, step = grid_of_codes(conv.weight, conv.weight_bits)
    places = conv.weight.astype(np.int32) - smallest
    if places.min(initial=0) < 0 or (places % step).any():
        return 8
    bits = int(places.max(initial=0) // step).bit_length()
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def grid_of_codes(weight: NDArray[np.int16], num_bits: int) -> tuple[int, int]:
    """Returns smallest code and step: -8 and 1 for 4 bits, but -15 and 2 for odd codes, such as DoReFa's."""
    if int(np.abs(weight.astype(np.int32)).max(initial=0)) > 2 ** (num_bits - 1) or bool((weight & 1).all()):
        return -(2**num_bits - 1), 2
    return -(2 ** (num_bits - 1)), 1


def pack_int4(codes: NDArray[np.integer]) -> bytes:
    """Packs two 4-bit two's complement codes into a byte, the first in the low half."""
    flat = codes.astype(np.int8).reshape(-1) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    return (flat[::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def pack_pairs_of_bits(codes: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Packs four unsigned 2-bit codes into a byte, the first lowest; ``[3, 0, 1, 2, 1]`` becomes ``[0x93, 1]``."""
    flat = codes.astype(np.uint8).reshape(-1)
    rows = np.pad(flat, (0, -flat.size % CODES_PER_BYTE)).reshape(-1, CODES_PER_BYTE)
    return (rows << np.arange(0, 8, 2, dtype=np.uint8)).sum(1).astype(np.uint8)


def write_weight(builder: GraphBuilder, conv: Conv) -> str:
    """Adds a convolution's integer weight, ``(O, C / groups, kH, kW)``, to a graph.

    Levels of the pyramid share the packed codes, and the int8 weight, too, if their signs and multiples are equal.

    Returns:
        The name of the int8 tensor ``weight * sign * multiple``, whose magnitudes have to fit.
    """
    name = builder.weight_name(conv)
    if packed_bits(conv) > 4:
        return builder.constant(name, conv.integer_weight, np.int8)
    factor = (conv.sign.astype(np.int32) * conv.multiple).reshape(-1, 1, 1, 1)
    key = (conv.name, conv.weight.tobytes(), factor.tobytes())
    if key not in builder.written_weights:
        codes, step, offset = _write_codes(builder, conv)
        wide = builder.node("Cast", [codes], f"{name}.wide", to=TensorProto.INT32)
        if step != 1:
            wide = builder.node("Mul", [wide, builder.constant(f"step_{step}", step, np.int32)], f"{name}.stepped")
        if offset:
            wide = builder.node(
                "Add", [wide, builder.constant(f"offset_{offset}", offset, np.int32)], f"{name}.centred"
            )
        wide = builder.node("Mul", [wide, builder.constant(f"{name}.factor", factor, np.int32)], f"{name}.scaled")
        builder.written_weights[key] = builder.node("Cast", [wide], f"{name}.int8", to=TensorProto.INT8)
    return builder.written_weights[key]


def _write_codes(builder: GraphBuilder, conv: Conv) -> tuple[str, int, int]:
    """Adds packed codes; returns the tensor that a Cast to int32 reads, and step and offset of the codes after it."""
    weight, base = conv.weight.astype(np.int32), f"{conv.name}.weight"
    smallest, step = grid_of_codes(conv.weight, conv.weight_bits)
    if packed_bits(conv) == 4:
        offset = 0
        if step != 1:
            weight = (weight - smallest) // step + INT4_MIN
            offset = smallest - INT4_MIN * step
        tensor = helper.make_tensor(f"{base}.int4", TensorProto.INT4, weight.shape, pack_int4(weight), raw=True)
        return builder.initializer(tensor), step, offset
    packed = pack_pairs_of_bits((weight - smallest) // step)
    column = builder.constant(f"{base}.2bit", packed.reshape(-1, 1), np.uint8)
    name = f"{column}.unpacked"
    if name not in {node.output[0] for node in builder.nodes}:
        shifts = builder.constant("bit_shifts", np.arange(0, 8, 2), np.uint8)
        shifted = builder.node("BitShift", [column, shifts], f"{column}.shifted", direction="RIGHT")
        masked = builder.node("BitwiseAnd", [shifted, builder.constant("bit_mask", 3, np.uint8)], f"{column}.masked")
        if packed.size * CODES_PER_BYTE != weight.size:
            flat = builder.node("Reshape", [masked, builder.constant("flat_shape", [-1], np.int64)], f"{column}.flat")
            bounds = [builder.constant(f"slice_{value}", [value], np.int64) for value in (0, weight.size)]
            masked = builder.node("Slice", [flat, *bounds], f"{column}.cut")
        shape = builder.constant(f"{column}.shape", weight.shape, np.int64)
        builder.node("Reshape", [masked, shape], name)
    return name, step, smallest
