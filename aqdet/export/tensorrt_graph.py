"""The integer program as an ONNX graph for TensorRT, whose 8-bit tensors are signed and have zero point 0.

It differs from :mod:`~aqdet.export.onnx_graph` in these points:

- every tensor between QuantizeLinear and DequantizeLinear is int8, which limits codes to 127;
- the image is int8, too, since 128 is subtracted from its uint8 values; the stem's bias compensates for that;
- biases are float32 constants, which TensorRT adds to the int32 sums after scaling them;
- a range of fewer than 8 bits is a Clip in float before QuantizeLinear, since TensorRT clips no integers;
- pooling and upsampling stand between DequantizeLinear and QuantizeLinear; TensorRT moves them out;
- a prediction is a Conv whose output is not quantized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from .int8_weights import INT8_LIMIT
from .onnx_graph import GraphBuilder
from .program import Conv, Grid, MaxPool, PadImage, Program, Requantize
from .program_writer import geometry

INT8_MIN, INT8_MAX = -128, 127
_IMAGE_SHIFT = 128


def build_tensorrt(program: Program, *, extra_outputs: bool = False) -> onnx.ModelProto:
    """Builds an ONNX model for TensorRT; input, outputs and arguments are those of :func:`build_onnx`.

    Raises:
        ValueError: In one line that names the layer, if the program does not fit into signed 8 bits.
    """
    check_signed(program)
    return _TensorRTBuilder(program).build(extra_outputs)


def check_signed(program: Program) -> None:
    """Checks that every code after the image is an int8, and that every weight is from -127 to 127.

    Raises:
        ValueError: In one line, naming the first layer that does not fit, and the number of others.
    """
    grids = program.grids()
    wide: dict[str, Grid] = {}
    for operation in program.operations:
        grid = grids.get(operation.output)
        if grid is None or isinstance(operation, PadImage):
            continue
        if grid.quant_min < INT8_MIN or grid.quant_max > INT8_MAX:
            wide.setdefault(operation.output.split("@")[0], grid)
    if wide:
        name, grid = next(iter(wide.items()))
        more = f" (and {len(wide) - 1} more)" * (len(wide) > 1)
        raise ValueError(
            f"layer {name}{more}: codes from {grid.quant_min} to {grid.quant_max}, but TensorRT's 8-bit tensors are "
            f"signed with zero point 0 and hold {INT8_MIN} to {INT8_MAX}: train it with 7 bits "
            "(MODEL.QUANT.RESIDUAL_NUM_BITS, BOUNDARY_NUM_BITS, INPUT.NUM_BITS)"
        )
    for conv in program.convs():
        codes = conv.integer_weight
        if np.abs(codes).max(initial=0) > INT8_LIMIT:
            raise ValueError(
                f"layer {conv.name}: weight codes from {codes.min()} to {codes.max()}, but TensorRT's are -127 "
                "to 127: train it with 7 bits (MODEL.QUANT.BOUNDARY_NUM_BITS, WEIGHT.NUM_BITS)"
            )


class _TensorRTBuilder(GraphBuilder):
    value_type = TensorProto.INT8

    def zero_point(self, grid: Grid) -> str:
        return self.constant("zero_point", 0, np.int8)

    def quantized(self, real: str, output: str, scale: float | None = None) -> None:
        grid = self.grids[output]
        step = grid.scale if scale is None else scale
        if (grid.quant_min, grid.quant_max) != (INT8_MIN, INT8_MAX):
            codes = (grid.quant_min, grid.quant_max)
            bounds = [self.constant(f"{output}.bound_{code}", code * step, np.float32) for code in codes]
            real = self.node("Clip", [real, *bounds], f"{output}.clipped")
        self.requantized(real, output, step)

    def requantized(self, real: str, output: str, step: float | None = None) -> None:
        """Adds the quantization of real values, which are within the grid of ``output``, to this grid."""
        own = self.grids[output].scale if step is None else step
        scale = self.constant(f"{output}.step", own, np.float32)
        self.node("QuantizeLinear", [real, scale, self.zero_point(self.grids[output])], output)

    def pad_image(self, operation: PadImage) -> None:
        grid = self.grids[operation.input]
        name = f"{operation.output}.signed"
        self.grids[name] = Grid(grid.scale, INT8_MIN, INT8_MAX)
        # All values are integers in float32 up to the last multiplication, and so exact.
        zero = np.array(operation.values, np.float32).reshape(1, -1, 1, 1)
        self.node("Cast", [operation.input], f"{name}.pixels", to=TensorProto.FLOAT)
        self.node("Sub", [f"{name}.pixels", self.constant("image_zero", zero, np.float32)], f"{name}.centred")
        vertical, horizontal = operation.amount
        pads = self.constant("image_pads", [0, 0, vertical, horizontal] * 2, np.int64)
        self.node("Pad", [f"{name}.centred", pads], f"{name}.padded", mode="constant")
        back = self.constant("image_shift", zero - _IMAGE_SHIFT, np.float32)
        self.node("Add", [f"{name}.padded", back], f"{name}.codes")
        self.node("Mul", [f"{name}.codes", self.constant(f"{name}.scale", grid.scale, np.float32)], f"{name}.real")
        self.requantized(f"{name}.real", name)

    def convolved(self, operation: Conv, output: str) -> str:
        """Returns the real output of a convolution."""
        source, sums = operation.input, operation.bias.astype(np.int64)
        weight = operation.integer_weight
        if f"{source}.signed" in self.grids:
            assert operation.padding == (0, 0), operation.name
            source, sums = f"{source}.signed", sums + _IMAGE_SHIFT * weight.sum((1, 2, 3), dtype=np.int64)
        codes = self.constant(self.weight_name(operation), weight, np.int8)
        real_weight = self.real_constant(f"{operation.output}.weight", codes, operation.scale, np.int8)
        unit: NDArray[Any] = operation.scale.astype(np.float64) * self.grids[source].scale
        bias = self.constant(f"{operation.output}.bias", sums * unit, np.float32)
        inputs = [self.dequantized(source, operation.output), real_weight, bias]
        return self.node("Conv", inputs, output, **geometry(operation))

    def conv(self, operation: Conv) -> None:
        self.quantized(self.convolved(operation, f"{operation.output}.real"), operation.output)

    def predict(self, operation: Conv) -> None:
        self.convolved(operation, operation.output)

    def requantize(self, operation: Requantize) -> None:
        self.quantized(self.dequantized(operation.input, operation.output), operation.output)

    def max_pool(self, operation: MaxPool) -> None:
        real = self.dequantized(operation.input, operation.output)
        self.requantized(self.pool_node(operation, real, f"{operation.output}.real"), operation.output)

    def upsample(self, source: str, output: str) -> None:
        real = self.dequantized(source, output)
        self.requantized(self.resize_node(real, f"{output}.real"), output)
