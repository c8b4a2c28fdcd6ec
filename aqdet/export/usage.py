"""Measurement of how much of each quantizer's range a detector uses on images, and conclusions from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .agreement import runtime_session, runtime_values
from .onnx_graph import build_onnx
from .program import Add, Conv, Grid, Program, Requantize

# Trained detectors use at least two thirds of every range. If less than the first share of a range of many codes is
# used, its scale is many times too large; below the second share there is a warning.
LEAST_USED, USUALLY_USED = 1 / 16, 0.15
LEAST_CODES = 31
# Share of the nonzero codes that may be clipped: a scale that is many times too small clips nearly all.
MOST_CLIPPED = 0.9
# Images are unlike those of the calibration if the clipped share is this many times, and this much, larger.
_FACTOR, _MARGIN = 3.0, 0.02


@dataclasses.dataclass(frozen=True)
class Usage:
    """The codes of one quantizer over images, for all levels of the pyramid together.

    Attributes:
        name: The name of the quantizer.
        codes: The number of codes on the larger side of its range, without zero: 15 for 4 unsigned bits.
        used: The largest magnitude among the codes, as a share of ``codes``.
        clipped: The share of the nonzero codes that are the largest or the smallest of the range.
    """

    name: str
    codes: int
    used: float
    clipped: float

    @property
    def fault(self) -> str:
        """The fault of the quantizer's scale, in words; "" if there is none."""
        if self.used == 0:
            return f"layer {self.name}: every code is 0, its scale is too large"
        if self.codes >= LEAST_CODES and self.used < LEAST_USED:
            largest = round(self.used * self.codes)
            return f"layer {self.name}: no code above {largest} of {self.codes} is used, its scale is too large"
        if self.codes > 1 and self.clipped > MOST_CLIPPED:
            return f"layer {self.name}: {self.clipped:.0%} of its codes are clipped, its scale is too small"
        return ""

    @property
    def is_hardly_used(self) -> bool:
        """Whether little of a range of at least 4 bits is used: fewer bits are enough, or the scale is wrong."""
        return self.codes >= 7 and self.used < USUALLY_USED


def measure_usage(
    program: Program,
    images: Sequence[NDArray[np.uint8]],
    progress: Callable[[str], object] = lambda _: None,
) -> list[Usage]:
    """Runs a program on images, as it ships, and counts the codes of every quantizer.

    Args:
        program: The program.
        images: Images ``(3, H, W)``, whose sides are multiples of ``program.size_divisibility``.
        progress: A function that is called with a line of text for each image.
    """
    session = runtime_session(build_onnx(program, extra_outputs=True), optimize=True)
    grids = program.grids()
    writers = [o for o in program.operations if isinstance(o, Conv | Requantize | Add) and o.grid is not None]
    counts: dict[str, tuple[Grid, NDArray[np.int64]]] = {}
    for number, image in enumerate(images, 1):
        progress(f"ranges on image {number} of {len(images)}")
        values = runtime_values(session, program, np.ascontiguousarray(image)[None])
        for operation in writers:
            grid, name = grids[operation.output], operation.output.split("@")[0]
            histogram = np.bincount(values[operation.output].reshape(-1) - grid.quant_min, minlength=_size(grid))
            known = counts.get(name, (grid, np.zeros(_size(grid), np.int64)))[1]
            counts[name] = grid, known + histogram
    return [_usage(name, grid, histogram) for name, (grid, histogram) in counts.items()]


def _size(grid: Grid) -> int:
    return grid.quant_max - grid.quant_min + 1


def _usage(name: str, grid: Grid, histogram: NDArray[np.int64]) -> Usage:
    codes = np.arange(grid.quant_min, grid.quant_max + 1)
    magnitudes = np.abs(codes[histogram > 0])
    limit = max(-grid.quant_min, grid.quant_max)
    others = int(histogram[codes != 0].sum())
    ends = int(histogram[-1]) * (grid.quant_max > 0) + int(histogram[0]) * (grid.quant_min < 0)
    return Usage(name, limit, float(magnitudes.max(initial=0) / limit), ends / max(others, 1))


def other_domain(calibration: Sequence[Usage], given: Sequence[Usage]) -> list[str]:
    """Returns the names of quantizers that clip far more on the given images than on the calibration's."""
    before = {usage.name: usage.clipped for usage in calibration}
    return [u.name for u in given if u.clipped > _FACTOR * before.get(u.name, 1.0) + _MARGIN]
