"""The integer types of every operation, and the proof that no int32 sum can overflow."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .fold import INT32_LIMIT
from .int8_weights import INT8_LIMIT, int8_parts
from .program import Add, Conv, DepthToSpace, Grid, MaxPool, PadImage, Program, Requantize, inputs_of
from .sums import largest_move


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Bounds of a convolution's int32 sums.

    Both bounds hold for partial sums in any order, and for codes as they are stored: a signed activation is uint8 with
    a zero point, and the sum has a correction for it.

    Attributes:
        by_bits: The bound from bit widths, kernel and channels: the largest product times the number of products, plus
            the largest bias.
        by_codes: The bound from the weights' own codes: the largest sum of a channel's magnitudes, plus its bias.
        max_input_code: The largest stored code of the input.
        max_weight_code: The largest magnitude of a stored integer weight, see
            :func:`~aqdet.export.int8_weights.int8_parts`.
    """

    by_bits: int
    by_codes: int
    max_input_code: int
    max_weight_code: int


def bound_accumulator(conv: Conv, source: Grid) -> Accumulator:
    """Computes the bounds of a convolution's int32 sums, see :class:`Accumulator`.

    Raises:
        ValueError: Naming the layer, if its sums may overflow.
    """
    weight = np.abs(conv.integer_weight.astype(np.int64)).reshape(len(conv.bias), -1)
    bias = np.abs(conv.bias.astype(np.int64))
    input_code = source.quant_max + source.zero_point
    reach = input_code + source.zero_point
    widest = max(2 ** (conv.weight_bits - 1), int(np.abs(conv.weight.astype(np.int32)).max(initial=0)))
    limit = np.minimum(widest * conv.multiple.astype(np.int64), max(widest, INT8_LIMIT))
    taps = weight.shape[1]
    by_bits = int((limit * reach * taps + bias).max())
    by_codes = int((weight.sum(1) * reach + bias).max())
    if min(by_bits, by_codes) > INT32_LIMIT:
        raise ValueError(f"layer {conv.name}: its sums may reach {by_codes}, more than int32 holds ({INT32_LIMIT})")
    largest = max(int(np.abs(part.astype(np.int32)).max(initial=0)) for part in int8_parts(conv, source))
    return Accumulator(by_bits, by_codes, input_code, largest)


def describe(grid: Grid) -> str:
    """Describes a grid and its storage, for example ``u4 in uint8`` or ``s8 in uint8, zero point 128``."""
    text = f"{'s' if grid.signed else 'u'}{grid.num_bits} in uint8"
    return text + f", zero point {grid.zero_point}" * grid.signed


def operation_rows(program: Program) -> list[dict[str, Any]]:
    """Returns a row for each operation: its kind, inputs and output with their types, and bounds for convolutions.

    Raises:
        ValueError: Naming the layer, if the sums of a convolution may overflow.
    """
    grids = program.grids()
    rows: list[dict[str, Any]] = []
    for operation in program.operations:
        source = grids[inputs_of(operation)[0]]
        row: dict[str, Any] = {"output": operation.output, "inputs": list(inputs_of(operation))}
        if isinstance(operation, Conv):
            accumulator = bound_accumulator(operation, source)
            row |= {
                "kind": "conv",
                "layer": operation.name,
                "level": operation.level,
                "kernel": list(operation.weight.shape[2:]),
                "in_channels": operation.weight.shape[1] * operation.groups,
                "out_channels": operation.weight.shape[0],
                "groups": operation.groups,
                "stride": list(operation.stride),
                "weight_bits": operation.weight_bits,
                "input_bits": source.num_bits,
                "types": f"{describe(source)} * s{operation.weight_bits} in int8 + int32 -> int32 -> "
                + ("float32" if operation.grid is None else describe(operation.grid)),
                "weight_type": "int8",
                "max_input_code": accumulator.max_input_code,
                "max_weight_code": accumulator.max_weight_code,
                "accumulator_bound_by_bits": accumulator.by_bits,
                "accumulator_bound": min(accumulator.by_bits, accumulator.by_codes),
                "constant_channels": int((operation.sign == 0).sum()),
                "flipped_channels": int((operation.sign < 0).sum()),
            }
        else:
            names = {
                PadImage: "pad",
                Requantize: "requantize",
                Add: "add",
                MaxPool: "max pool",
                DepthToSpace: "depth to space",
            }
            target = describe(grids[operation.output])
            row |= {"kind": names.get(type(operation), "upsample"), "types": f"{describe(source)} -> {target}"}
            if isinstance(operation, Add):
                row["largest_move"] = largest_move(operation, grids)
        rows.append(row)
    return rows


def tightest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the convolution whose bound comes closest to int32's."""
    return max((row for row in rows if row["kind"] == "conv"), key=lambda row: row["accumulator_bound"])
