"""The graph of a head for regions: RoiAlign, the one declared step in float, and the head's integer program behind it.

Inputs are the codes of the pyramid's levels and each level's regions. A region is pooled from the values behind the
codes, as Detectron2's ``ROIAlignV2`` does, and rounded onto the grid that the head reads; from there on all is integer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from .onnx_graph import GraphBuilder
from .program import IMAGE, Grid, Program

FLOAT_ISLAND = (r"^regions[./]", rf"^{IMAGE}$", rf"^{IMAGE}\.unclipped$")
"""Names of what is in float, or leaves it."""


@dataclasses.dataclass(frozen=True)
class PooledLevel:
    """A level of the pyramid that regions are pooled from.

    Attributes:
        name: The level's name, as ``p2``; the graph's inputs are ``codes_p2``, ``rois_p2`` and ``image_of_p2``.
        grid: The grid of its codes.
        stride: The stride in pixels.
        channels: The number of channels.
    """

    name: str
    grid: Grid
    stride: int
    channels: int


def build_region_graph(
    program: Program,
    levels: Sequence[PooledLevel],
    *,
    resolution: int,
    sampling_ratio: int,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Builds the graph of a head behind RoiAlign.

    Args:
        program: The head's program.
        levels: The levels, from high to low resolution.
        resolution: The side of a pooled region.
        sampling_ratio: The number of samples of a bin along each side; 0 for as many as it has pixels, rounded up.
        metadata: The metadata of the file.

    Returns:
        A checked model. For each level, its inputs are the codes ``(N, C, h, w)`` uint8, regions ``(R, 4)`` float32 in
        pixels and, int64, the index of each region's image. Outputs have the regions of the levels one after the other.
    """
    return _RegionGraph(program, levels, resolution, sampling_ratio).build(False, metadata)


class _RegionGraph(GraphBuilder):
    def __init__(self, program: Program, levels: Sequence[PooledLevel], resolution: int, sampling_ratio: int) -> None:
        super().__init__(program)
        self.levels = levels
        pooled = []
        for level in levels:
            codes, name = f"codes_{level.name}", f"regions.{level.name}"
            self.grids[codes] = level.grid
            values = self.dequantized(codes, "regions")
            pooled.append(
                self.node(
                    "RoiAlign",
                    [values, f"rois_{level.name}", f"image_of_{level.name}"],
                    name,
                    mode="avg",
                    coordinate_transformation_mode="half_pixel",
                    output_height=resolution,
                    output_width=resolution,
                    sampling_ratio=sampling_ratio,
                    spatial_scale=1 / level.stride,
                )
            )
        self.quantized(self.node("Concat", pooled, "regions.real", axis=0), IMAGE)

    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Returns the codes, regions and images of each level."""
        found = []
        for level in self.levels:
            shape: list[str | int] = ["N", level.channels, f"h_{level.name}", f"w_{level.name}"]
            about = f"codes of level {level.name}, as {IMAGE}'s network gives them"
            found.append(helper.make_tensor_value_info(f"codes_{level.name}", TensorProto.UINT8, shape, about))
            regions, image = f"rois_{level.name}", f"image_of_{level.name}"
            about = "regions that are pooled from the level: x1, y1, x2, y2 in pixels of the network's input"
            rows = f"R_{level.name}"
            found.append(helper.make_tensor_value_info(regions, TensorProto.FLOAT, [rows, 4], about))
            found.append(helper.make_tensor_value_info(image, TensorProto.INT64, [rows], "index of each one's image"))
        return found
