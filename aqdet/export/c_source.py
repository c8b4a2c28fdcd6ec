"""The integer program as plain C: ``detector.c`` and ``detector.h``, for microcontrollers and safety reviews.

The program is C99 without libraries; its buffers are static, and it allocates nothing. Weights are stored in their bits
and are unpacked layer by layer into one buffer. All arithmetic is on integers, except for the multiplication of a sum
by its multiplier, which is ONNX Runtime's: float32 times float32, rounded to nearest with ties to even. So the codes
equal those of the shipped ``model.onnx``.

Values are ``(H, W, C)`` bytes, each a code plus its grid's zero point; predictions are float32 ``(H, W, C)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .c_runtime import HEADER, KERNELS
from .program import IMAGE, Add, Conv, Grid, MaxPool, Operation, PadImage, Program, Requantize, inputs_of
from .reference import conv_multiplier, execute

PIXELS = 4
"""Number of output pixels of a row that are computed at once."""
_ALIGNMENT = 16
MAX_ARENA = 2**31 - 1
"""Bytes of the values between operations, whose places are 32-bit integers in C."""
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class CSource:
    """A detector as C.

    Attributes:
        header, source: The texts of ``detector.h`` and ``detector.c``.
        arena: Bytes of RAM in static buffers, without the caller's outputs.
        flash: Bytes of constants.
        outputs: Bytes of the structure that the caller passes for the predictions.
    """

    header: str
    source: str
    arena: int
    flash: int
    outputs: int

    @property
    def memory(self) -> dict[str, int]:
        """The bytes by name, for a report."""
        return {"arena": self.arena, "flash": self.flash, "outputs": self.outputs}


def build_c(program: Program, height: int, width: int) -> CSource:
    """Writes a program for images of one size as C.

    Args:
        program: The detector's program.
        height, width: Size of the image in pixels.

    Raises:
        ValueError: In one line, if the size is no multiple of the program's, or a layer is not supported.
    """
    divisor = program.size_divisibility
    if height < 1 or width < 1 or height % divisor or width % divisor:
        raise ValueError(f"--c: height and width must be multiples of {divisor}, got {height}x{width}")
    return _Writer(program, height, width).source()


class _Writer:
    def __init__(self, program: Program, height: int, width: int) -> None:
        self.program, self.grids = program, program.grids()
        self.shapes: dict[str, Shape] = {IMAGE: (height, width, 3)}
        self.constants: list[str] = []
        self.flash = 0
        self.tables: dict[bytes, str] = {}
        self.patches = self.weights = self.totals = 0
        for operation in program.operations:
            self.shapes[operation.output] = _shape(operation, [self.shapes[name] for name in inputs_of(operation)])
        self.predictions = [name for output in program.outputs for name in output.names]

    def source(self) -> CSource:
        places, arena = _places(self.program, self.shapes, self.predictions)
        calls = [line for operation in self.program.operations for line in self._call(operation, places)]
        height, width, _ = self.shapes[IMAGE]
        members, outputs = [], 0
        for name in self.predictions:
            shape = self.shapes[name]
            members.append(f"    float {name}[{shape[0]} * {shape[1]} * {shape[2]}];  /* {shape} */")
            outputs += 4 * int(np.prod(shape))
        header = HEADER.format(height=height, width=width, members="\n".join(members))
        source = KERNELS.format(
            pixels=PIXELS,
            arena=arena,
            patches=self.patches,
            weights=self.weights,
            totals=self.totals,
            constants="\n".join(self.constants),
            calls="\n".join(f"    {line}" for line in calls),
        )
        buffers = arena + 2 * (self.patches + self.weights) + 4 * self.totals
        return CSource(header, source, buffers, self.flash, outputs)

    def _call(self, operation: Operation, places: Mapping[str, int]) -> Iterator[str]:
        def at(name: str) -> str:
            return "image" if name == IMAGE else f"arena + {places[name]}"

        inputs = inputs_of(operation)
        height, width, channels = self.shapes[inputs[0]]
        if isinstance(operation, Conv):
            yield self._conv(operation, at)
            return
        target = at(operation.output)
        if isinstance(operation, PadImage):
            values = self._constant("uint8_t", operation.values, 1)
            vertical, horizontal = operation.amount
            yield f"pad_image({at(inputs[0])}, {height}, {width}, {vertical}, {horizontal}, {values}, {target});"
        elif isinstance(operation, Requantize):
            table = self._table(operation, self.grids)
            yield f"look_up({at(inputs[0])}, {height * width * channels}, {table}, {target});"
        elif isinstance(operation, Add):
            zeros = [self.grids[name].zero_point for name in inputs]
            grid = operation.grid
            yield (
                f"add({at(inputs[0])}, {at(inputs[1])}, {height * width * channels}, {zeros[0]}, {zeros[1]}, "
                f"{operation.multipliers[0]}, {operation.multipliers[1]}, {operation.shift}, {grid.quant_min}, "
                f"{grid.quant_max}, {grid.zero_point}, {target});"
            )
        elif isinstance(operation, MaxPool):
            out_height, out_width, _ = self.shapes[operation.output]
            yield (
                f"max_pool({at(inputs[0])}, {height}, {width}, {channels}, {operation.kernel}, {operation.stride}, "
                f"{operation.padding}, {out_height}, {out_width}, {target});"
            )
        else:
            yield f"upsample({at(inputs[0])}, {height}, {width}, {channels}, {target});"

    def _conv(self, conv: Conv, at: object) -> str:
        assert callable(at)
        height, width, channels = self.shapes[conv.input]
        out_height, out_width, out_channels = self.shapes[conv.output]
        kernel_h, kernel_w = conv.weight.shape[2:]
        source = self.grids[conv.input]
        taps = kernel_h * kernel_w * channels
        self.weights = max(self.weights, taps * out_channels)
        self.patches = max(self.patches, PIXELS * taps)
        self.totals = max(self.totals, PIXELS * out_channels)
        bits = max(conv.weight_bits, _bits(conv.weight))
        packed = self._constant("uint32_t", pack(conv.weight, bits), 4)
        factor = self._constant("int16_t", conv.sign.astype(np.int32) * conv.multiple, 2)
        bias = self._constant("int32_t", conv.bias, 4)
        multiplier = self._constant("float", [f"{float(m).hex()}f" for m in conv_multiplier(conv, source.scale)], 4)
        grid = conv.grid or Grid(1.0, 0, 0)
        codes, floats = ("NULL", f"outputs->{conv.output}") if conv.grid is None else (at(conv.output), "NULL")
        return (
            f"conv({at(conv.input)}, {height}, {width}, {channels}, {source.zero_point}, {packed}, {bits}, {factor}, "
            f"{bias}, {multiplier}, {kernel_h}, {kernel_w}, {conv.stride[0]}, {conv.stride[1]}, {conv.padding[0]}, "
            f"{conv.padding[1]}, {out_height}, {out_width}, {out_channels}, {grid.quant_min}, {grid.quant_max}, "
            f"{grid.zero_point}, {codes}, {floats});"
        )

    def _table(self, operation: Requantize, grids: Mapping[str, Grid]) -> str:
        """Returns the table of an operation on bytes: its result for each stored byte, computed by the reference."""
        zero = grids[operation.input].zero_point
        codes = (np.arange(256) - zero).reshape(1, 1, 1, 256)
        stored = np.asarray(execute(operation, [codes], grids)).reshape(-1) + operation.grid.zero_point
        return self._constant("uint8_t", stored, 1)

    def _constant(self, kind: str, values: Sequence[object] | NDArray[np.generic], size: int) -> str:
        """Returns the name of a table of constants; equal tables, as a head's weights for all levels, exist once."""
        text = ", ".join(str(value) for value in values)
        key = f"{kind}:{text}".encode()
        if key not in self.tables:
            name = f"table_{len(self.tables)}"
            self.tables[key] = name
            self.flash += size * len(values)
            self.constants.append(f"static const {kind} {name}[{len(values)}] = {{{text}}};")
        return self.tables[key]


def pack(weight: NDArray[np.int16], bits: int) -> NDArray[np.uint32]:
    """Packs weights in the order in which they are read, ``bits`` each in two's complement, low bits first.

    Args:
        weight: ``(O, C, kH, kW)``.
        bits: The number of bits of a weight.

    Returns:
        Words of the codes in the order ``(O, kH, kW, C)``.
    """
    codes = weight.transpose(0, 2, 3, 1).reshape(-1).astype(np.int64) & ((1 << bits) - 1)
    stream = ((codes[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)
    # One word is added, since two are read at a time.
    stream = np.pad(stream, (0, -len(stream) % 32 + 32))
    return np.packbits(stream, bitorder="little").view("<u4").astype(np.uint32)


def _bits(weight: NDArray[np.int16]) -> int:
    low, high = int(weight.min(initial=0)), int(weight.max(initial=0))
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1


def _shape(operation: Operation, inputs: Sequence[Shape]) -> Shape:
    """Returns height, width and channels of an operation's output."""
    height, width, channels = inputs[0]
    if isinstance(operation, PadImage):
        vertical, horizontal = operation.amount
        return height + 2 * vertical, width + 2 * horizontal, channels
    if isinstance(operation, Conv):
        if operation.groups != 1 or operation.dilation != (1, 1):
            raise ValueError(
                f"--c: layer {operation.name} is a grouped or dilated convolution, which it has no loop for"
            )
        kernel = operation.weight.shape[2:]
        sides = [
            (side + 2 * pad - size) // stride + 1
            for side, pad, size, stride in zip(
                (height, width), operation.padding, kernel, operation.stride, strict=True
            )
        ]
        return sides[0], sides[1], operation.weight.shape[0]
    if isinstance(operation, MaxPool):
        sides = [(side + 2 * operation.padding - operation.kernel) // operation.stride + 1 for side in (height, width)]
        return sides[0], sides[1], channels
    if isinstance(operation, Add | Requantize):
        return inputs[0]
    return 2 * height, 2 * width, channels


def _places(program: Program, shapes: Mapping[str, Shape], predictions: Sequence[str]) -> tuple[dict[str, int], int]:
    """Returns the places of values in the arena, where none overwrites one still in use, and the arena's size."""
    last = {name: step for step, operation in enumerate(program.operations) for name in inputs_of(operation)}
    places: dict[str, int] = {}
    live: list[tuple[int, int, int]] = []  # begin, end, last step
    total = 1
    for step, operation in enumerate(program.operations):
        name = operation.output
        if name in predictions:
            continue
        live = [entry for entry in live if entry[2] >= step]
        size = -(-math.prod(shapes[name]) // _ALIGNMENT) * _ALIGNMENT
        begin = 0
        for start, end, _ in sorted(live):
            if start - begin >= size:
                break
            begin = max(begin, end)
        places[name] = begin
        live.append((begin, begin + size, last.get(name, step)))
        total = max(total, begin + size)
    if total > MAX_ARENA:
        raise ValueError(
            f"--c: images of this size need {total:,} bytes of memory, at most {MAX_ARENA:,} are supported"
        )
    return places, total
