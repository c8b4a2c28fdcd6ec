"""The integer program: a shipped detector as a list of small operations on integers.

All forms come from this one description: the integer reference executes it, and graphs, C sources and reports are
written from it.

Every value between the image and the predictions is a tensor of integer codes, shape ``(N, C, H, W)``, that
stands for ``codes * grid.scale``. There is no ReLU: the grid after it starts at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The integers ``quant_min`` to ``quant_max``, each of which means itself times ``scale``, a float32 value."""

    scale: float
    quant_min: int
    quant_max: int

    @property
    def zero_point(self) -> int:
        """The code of zero where codes are stored as uint8.

        It is 0 for unsigned codes and 128 for signed ones, or the number of negative codes if 128 leaves no room, as
        with LSQ+'s offset at 8 bits.
        """
        if self.quant_min >= 0:
            return 0
        return 128 if -128 <= self.quant_min and self.quant_max < 128 else -self.quant_min

    @property
    def signed(self) -> bool:
        """Whether the grid has negative codes."""
        return self.quant_min < 0

    @property
    def num_bits(self) -> int:
        """The number of bits that the codes need."""
        return (self.quant_max - self.quant_min).bit_length()


@dataclasses.dataclass(frozen=True)
class PadImage:
    """Surrounds the uint8 image with each channel's code of zero.

    Attributes:
        amount: Rows and columns added on each side, ``(vertical, horizontal)``.
        values: One code for each channel, the rounded mean pixel.
        mean: The mean pixel, which is zero in the float model.
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
        name: The name of the module.
        level: The pyramid level if levels share the module, else "".
        weight: ``(O, C / groups, kH, kW)`` int16, the trained codes.
        weight_bits: The number of bits of the weight's quantizer.
        sign: ``(O,)`` int8, -1 where batch norm has a negative multiplier, 0 where the output is constant.
        multiple: ``(O,)`` int16. The integer convolution runs with ``weight * sign * multiple``, whose finer unit
            makes the bias's rounding smaller by this factor.
        scale: ``(O,)`` float32, positive, the value of one unit of those weights with batch norm's multiplier.
        bias: ``(O,)`` int32, in units of ``input scale * scale``.
        grid: The grid of the output; None for a prediction, whose output is float32, the int32 sum times its unit.
    """

    output: str
    input: str
    name: str
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
    """A change of codes to another grid; it is a ReLU, too, if that grid starts at zero."""

    output: str
    input: str
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Add:
    """The sum of two values on a grid, ``round((a * multipliers[0] + b * multipliers[1]) / 2**shift)``.

    Attributes:
        multipliers, shift: See :func:`~aqdet.export.sums.choose_sum_scales`; no pair of codes is a rounding tie.
    """

    output: str
    inputs: tuple[str, str]
    grid: Grid
    multipliers: tuple[int, int]
    shift: int


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The maximum over windows; padding is never the maximum."""

    output: str
    input: str
    kernel: int
    stride: int
    padding: int


@dataclasses.dataclass(frozen=True)
class Upsample:
    """Upsampling by nearest neighbour to twice the height and width."""

    output: str
    input: str


@dataclasses.dataclass(frozen=True)
class DepthToSpace:
    """Spreads ``block**2`` channels over squares of that side: ``(N, 4 C, H, W)`` to ``(N, C, 2 H, 2 W)``.

    Channel ``4 c + 2 i + j`` is row ``i`` and column ``j`` of channel ``c``'s square. Behind a 1x1 convolution it is a
    2x2 deconvolution with stride 2.
    """

    output: str
    input: str
    block: int = 2


Operation = PadImage | Conv | Requantize | Add | MaxPool | Upsample | DepthToSpace


@dataclasses.dataclass(frozen=True)
class Output:
    """The predictions of a pyramid level, or for a region: names of values, and the level's stride in pixels.

    Attributes:
        deltas: The name of the box deltas; "" for masks, which have none.
        stride: The level's stride; 0 for a region.
        centerness: The name of FCOS's centerness; "" for the others, and for an FCOS without it.
    """

    level: str
    logits: str
    deltas: str
    stride: int
    centerness: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The values in the order of the head's outputs."""
        return tuple(name for name in (self.logits, self.deltas, self.centerness) if name)


@dataclasses.dataclass(frozen=True)
class Program:
    """A list of operations in an order in which they can run.

    Attributes:
        image: The grid of the input: of the uint8 image, whose mean pixel is in the first convolution's bias, or of the
            codes of regions.
        operations: The operations, see the classes above.
        outputs: The predictions of each level, from high to low resolution.
        size_divisibility: Height and width of the image must be multiples of it.
        channels: The number of channels of the input.
        pyramid: The values that are outputs as codes, which regions are pooled from; none for a dense detector.
    """

    image: Grid
    operations: tuple[Operation, ...]
    outputs: tuple[Output, ...]
    size_divisibility: int
    channels: int = 3
    pyramid: tuple[str, ...] = ()

    def grids(self) -> dict[str, Grid]:
        """Returns the grid of every integer value by name."""
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
    """Returns the largest magnitude of a value on ``grid`` in a sum of products, stored as uint8 or centred."""
    return max(grid.quant_max + grid.zero_point, -grid.quant_min)
