"""The integer program: a shipped detector as a list of small operations on integers.

It is the one description that the integer reference executes, that is written as ONNX, packed and reported.

Every value between the image and the predictions is a tensor of integer codes, shape ``(N, C, H, W)``, that
stands for ``codes * grid.scale``. ReLU is no operation of its own: the next grid starts at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Integers ``quant_min`` to ``quant_max``, each standing for itself times ``scale`` (a float32 value)."""

    scale: float
    quant_min: int
    quant_max: int

    @property
    def zero_point(self) -> int:
        """The code of zero where codes are stored as uint8.

        0 for unsigned codes, 128 for signed ones; as many as there are negative codes where 128 leaves no room, as
        with LSQ+'s offset at 8 bits.
        """
        if self.quant_min >= 0:
            return 0
        return 128 if -128 <= self.quant_min and self.quant_max < 128 else -self.quant_min

    @property
    def signed(self) -> bool:
        """Whether there are negative codes."""
        return self.quant_min < 0

    @property
    def num_bits(self) -> int:
        """Bits that the codes need."""
        return (self.quant_max - self.quant_min).bit_length()


@dataclasses.dataclass(frozen=True)
class PadImage:
    """Surrounds the uint8 image with each channel's code of zero.

    Attributes:
        amount: rows and columns added on either side, ``(vertical, horizontal)``.
        values: one code a channel; the mean pixel, rounded.
        mean: the mean pixel, which is what zero means in the float model.
    """

    output: str
    input: str
    amount: tuple[int, int]
    values: tuple[int, ...]
    mean: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Conv:
    """``sum(input * weight * sign * multiple) + bias`` in int32, then a per-channel multiplier onto the next grid.

    Attributes:
        path: of the module; ``level`` of the pyramid where it is shared, else "".
        weight: ``(O, C / groups, kH, kW)`` int16, the codes as trained.
        weight_bits: of the weight's quantizer.
        sign: ``(O,)`` int8: -1 where batch norm has a negative multiplier, 0 where the output is constant.
        multiple: ``(O,)`` int16: the integer convolution runs with ``weight * sign * multiple``, whose finer unit
            makes the bias's rounding as many times smaller.
        scale: ``(O,)`` float32, positive: one unit of those weights, batch norm's multiplier included.
        bias: ``(O,)`` int32, in units of ``input scale * scale``.
        grid: of the output; None for a prediction, whose output is float32: the int32 sum times its unit.
    """

    output: str
    input: str
    path: str
    level: str
    weight: NDArray[np.int16]
    weight_bits: int
    sign: NDArray[np.int8]
    multiple: NDArray[np.int16]
    scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    grid: Grid | None

    @property
    def integer_weight(self) -> NDArray[np.int32]:
        """The weights that convolve the codes, ``weight * sign * multiple``."""
        factor = self.sign.astype(np.int32) * self.multiple
        return self.weight.astype(np.int32) * factor.reshape(-1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Requantize:
    """Codes onto another grid; a ReLU too where that grid starts at zero."""

    output: str
    input: str
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Add:
    """The sum of two values on a grid, ``round((a * multipliers[0] + b * multipliers[1]) / 2**shift)``.

    Attributes:
        multipliers, shift: see :func:`~aqdet.export.sums.choose_sum_scales`; no pair of codes is a rounding tie.
    """

    output: str
    inputs: tuple[str, str]
    grid: Grid
    multipliers: tuple[int, int]
    shift: int


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """Maximum over windows; padding never wins."""

    output: str
    input: str
    kernel: int
    stride: int
    padding: int


@dataclasses.dataclass(frozen=True)
class Upsample:
    """Nearest neighbour, twice the height and width."""

    output: str
    input: str


Operation = PadImage | Conv | Requantize | Add | MaxPool | Upsample


@dataclasses.dataclass(frozen=True)
class Output:
    """Predictions of a pyramid level: names of values, and the level's stride in pixels.

    Attributes:
        centerness: of FCOS; "" for RetinaNet, and for an FCOS that has none.
    """

    level: str
    logits: str
    deltas: str
    stride: int
    centerness: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The values in the order of the head's outputs."""
        return (self.logits, self.deltas, *[self.centerness] * bool(self.centerness))


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in an order in which they can run.

    Attributes:
        image: grid of the uint8 image; the mean pixel is in the first convolution's bias.
        operations: see the classes above.
        outputs: one for each level, high to low resolution.
        size_divisibility: height and width of the image must be multiples of it.
    """

    image: Grid
    operations: tuple[Operation, ...]
    outputs: tuple[Output, ...]
    size_divisibility: int

    def grids(self) -> dict[str, Grid]:
        """Grid of every integer value by name."""
        grids = {IMAGE: self.image}
        for operation in self.operations:
            grid = grids[inputs_of(operation)[0]]
            if isinstance(operation, Conv | Requantize | Add):
                if operation.grid is None:
                    continue
                grid = operation.grid
            grids[operation.output] = grid
        return grids

    def convs(self) -> Iterator[Conv]:
        """Returns the convolutions in order."""
        return (operation for operation in self.operations if isinstance(operation, Conv))


def inputs_of(operation: Operation) -> tuple[str, ...]:
    """Returns the names of the values that an operation reads."""
    return operation.inputs if isinstance(operation, Add) else (operation.input,)


def largest_code(grid: Grid) -> int:
    """Returns the largest integer by which a value on ``grid`` enters a sum of products, stored as uint8 or centred."""
    return max(grid.quant_max + grid.zero_point, -grid.quant_min)
