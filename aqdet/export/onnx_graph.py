"""The integer program as an ONNX graph of QuantizeLinear / DequantizeLinear pairs.

The graph is written for ONNX Runtime on x86, which runs it on integers alone:

- activations are uint8 (signed codes with a zero point, as a rule 128), weights int8 with a scale for each
  channel, biases int32; a convolution between DequantizeLinear and QuantizeLinear becomes a ``QLinearConv``;
- a first convolution with stride 2 reads the image in blocks of 2x2 pixels, see :mod:`~aqdet.export.image_conv`;
- x86 without VNNI adds two products of uint8 and int8 in int16; where they might exceed it, the weights are a sum of
  smaller ones, and the input is read once for each;
- a range of fewer than 8 bits is a Clip of the uint8 tensor after QuantizeLinear. A Clip in float before it would
  leave the convolution in float;
- a change of grid is a LeakyRelu of slope 1, the identity, which becomes a table of 256 bytes
  (``QLinearLeakyRelu``); a bare DequantizeLinear / QuantizeLinear pair would compute in float;
- weights are packed into the bits that they were trained with, see :mod:`~aqdet.export.packed_weights`;
- a sum (``QLinearAdd``) is computed in codes of its result, with ratios that no machine rounds differently;
- pooling, upsampling and padding work on the uint8 tensor itself;
- a prediction keeps the precision of its int32 sums; only their unit is float. It is a MatMulInteger over the
  patches that its kernel covers: ONNX Runtime's ConvInteger is several times slower where there is VNNI.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .image_conv import BLOCK, of_blocks, reads_blocks
from .int8_weights import int8_parts
from .packed_weights import packed_bits, write_weight
from .program import IMAGE, Add, Conv, Grid, PadImage, Program, Requantize
from .program_writer import ProgramWriter, geometry

CHANNELS_TOGETHER = 4
"""ONNX Runtime's fastest integer convolution reads so many at once, or a multiple: 8 take less time than 6."""
OPSET = 21
"""The first version of ONNX's operators with INT4 tensors."""
_IR_VERSION = 10
DESCRIPTION = (
    "The network of an object detector on integers: a uint8 image to predictions at each level of a pyramid. Decoding, "
    "thresholds and non-maximum suppression are not in it; metadata_props say how, and aqdet.runtime does it."
)


def build_onnx(
    program: Program, *, extra_outputs: bool = False, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Builds the program as an ONNX model.

    Args:
        program: The program.
        extra_outputs: Whether every integer value becomes an output, to compare layer by layer.
        metadata: ONNX's ``metadata_props`` of the file, by key.

    Returns:
        A checked model. Its input is ``image``, uint8 ``(N, 3, H, W)``; its outputs are float32, see :class:`Program`.
    """
    return GraphBuilder(program).build(extra_outputs, metadata)


class GraphBuilder(ProgramWriter):
    """Writes a program node by node, in pairs of QuantizeLinear and DequantizeLinear.

    Args:
        program: The program.
    """

    value_type = TensorProto.UINT8
    """ONNX's type of the integer values."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.written_weights: dict[tuple[str, bytes, bytes], str] = {}
        self._places: dict[tuple[Any, ...], str] = {}

    def build(self, extra_outputs: bool, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """Builds the model; see :func:`build_onnx`."""
        self.write_operations()
        return self.model(extra_outputs, metadata or {})

    # --- parts ---

    def zero_point(self, grid: Grid) -> str:
        """Returns the name of the initializer with a grid's zero point."""
        return self.constant(f"zero_point_{grid.zero_point}", grid.zero_point, np.uint8)

    def dequantized(self, name: str, reader: str, scale: float | None = None) -> str:
        """Adds a DequantizeLinear for one reader: to the real values of ``name``, or to its codes times ``scale``."""
        grid = self.grids[name]
        own = f"{name}.scale" if scale is None else f"{reader}/{name}.ratio"
        inputs = [name, self.constant(own, grid.scale if scale is None else scale, np.float32), self.zero_point(grid)]
        return self.node("DequantizeLinear", inputs, f"{reader}/{name}.dequantized")

    def quantized(self, real: str, output: str, scale: float | None = None) -> None:
        """Quantizes real values onto the grid of ``output``, with a Clip where the grid has fewer than 256 codes.

        Args:
            real: The name of the values.
            output: The name of the codes.
            scale: The value of a code in ``real``; by default the grid's scale.
        """
        grid = self.grids[output]
        low, high = grid.quant_min + grid.zero_point, grid.quant_max + grid.zero_point
        full = (low, high) == (0, 255)
        name = output if full else f"{output}.unclipped"
        step = self.constant(f"{output}.step", grid.scale if scale is None else scale, np.float32)
        self.node("QuantizeLinear", [real, step, self.zero_point(grid)], name)
        if not full:
            bounds = [self.constant(f"code_{code}", code, np.uint8) for code in (low, high)]
            self.node("Clip", [name, *bounds], output)

    def copies(self, operation: Conv) -> tuple[str, str]:
        """Returns input and int8 weight of a convolution, repeated along the channels for several int8 parts."""
        parts = int8_parts(operation, self.grids[operation.input])
        if len(parts) == 1:
            return operation.input, write_weight(self, operation)
        source = f"{operation.output}.copies"
        inputs, weight = [operation.input] * len(parts), np.concatenate(parts, 1)
        rest = -weight.shape[1] % CHANNELS_TOGETHER
        if rest:  # of the image: some of its channels once more, for weights of zero
            bounds = [self.constant(f"slice_{value}", [value], np.int64) for value in (0, rest, 1)]
            inputs.append(self.node("Slice", [operation.input, *bounds], f"{source}_rest"))
            weight = np.pad(weight, ((0, 0), (0, rest), (0, 0), (0, 0)))
        self.node("Concat", inputs, source, axis=1)
        self.grids[source] = self.grids[operation.input]
        return source, self.constant(self.weight_name(operation), weight, np.int8)

    def real_constant(self, name: str, integers: str, scale: NDArray[np.float32], dtype: Any) -> str:
        """Adds integers with a scale for each slice of their first axis, and zero points, which other tools need."""
        zeros = self.constant(f"zeros_{len(scale)}_{np.dtype(dtype)}", np.zeros(len(scale)), dtype)
        inputs = [integers, self.constant(f"{name}_scale", scale, np.float32), zeros]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    # --- operations ---

    def pad_image(self, operation: PadImage) -> None:
        """Adds the image's padding: each channel by the code of its mean."""
        vertical, horizontal = operation.amount
        pads = self.constant("image_pads", [0, 0, vertical, horizontal] * 2, np.int64)
        if len(set(operation.values)) == 1:
            value = self.constant(f"code_{operation.values[0]}", operation.values[0], np.uint8)
            self.node("Pad", [operation.input, pads, value], operation.output, mode="constant")
            return
        # Pad has one value for all channels.
        names = [f"{operation.input}_channel{c}" for c in range(len(operation.values))]
        self.nodes.append(self._split(operation.input, names, axis=1))
        padded = []
        for name, code in zip(names, operation.values, strict=True):
            value = self.constant(f"code_{code}", code, np.uint8)
            padded.append(self.node("Pad", [name, pads, value], f"{name}_padded", mode="constant"))
        self.node("Concat", padded, operation.output, axis=1)

    def _split(self, source: str, names: list[str], axis: int) -> onnx.NodeProto:
        return helper.make_node("Split", [source], names, name=f"{source}_split", axis=axis, num_outputs=len(names))

    @staticmethod
    def weight_name(operation: Conv) -> str:
        """Returns the name of a convolution's weight; the name of a level's own weight contains the output's."""
        return f"{operation.name}.weight{f'@{operation.output}' * bool(operation.level)}"

    def conv(self, operation: Conv) -> None:
        """Adds a convolution whose output is quantized."""
        name = operation.output
        if reads_blocks(operation, self.program):
            blocks = self.node("SpaceToDepth", [operation.input], f"{name}.blocks", blocksize=BLOCK)
            self.grids[blocks] = self.grids[operation.input]
            operation = of_blocks(operation, blocks)
        source, weight = self.copies(operation)
        unit = np.float32(self.grids[source].scale) * operation.scale
        bias = self.constant(f"{name}.bias", operation.bias, np.int32)
        inputs = [
            self.dequantized(source, name),
            self.real_constant(f"{name}.weight", weight, operation.scale, np.int8),
            self.real_constant(f"{name}.real_bias", bias, unit, np.int32),
        ]
        self.node("Conv", inputs, f"{name}.real", **geometry(operation))
        self.quantized(f"{name}.real", name)

    def predict(self, operation: Conv) -> None:
        """Adds a prediction layer, whose integer sums are scaled to real values."""
        name, grid = operation.output, self.grids[operation.input]
        parts = int8_parts(operation, grid)
        if len(parts) == 1 and packed_bits(operation) < 8:
            columns_of = f"{name}.columns"
            self.node("Transpose", [write_weight(self, operation)], f"{columns_of}_first", perm=[2, 3, 1, 0])
            shape = self.constant(f"{columns_of}_shape", [-1, len(operation.weight)], np.int64)
            weight = self.node("Reshape", [f"{columns_of}_first", shape], columns_of)
        else:
            # The parts are columns of one product, so that the patches are read once.
            columns = [part.transpose(2, 3, 1, 0).reshape(-1, len(part)) for part in parts]
            weight = self.constant(self.weight_name(operation), np.concatenate(columns, 1), np.int8)
        rows = self.patches(operation, grid.zero_point)
        sums = self.node("MatMulInteger", [rows, weight, self.zero_point(grid)], f"{name}.products")
        if len(parts) > 1:
            names = [f"{name}.products_{number}" for number in range(len(parts))]
            self.nodes.append(self._split(sums, names, axis=3))
            sums = names[0]
            for number, other in enumerate(names[1:], 1):
                sums = self.node("Add", [sums, other], f"{name}.products_to_{number}")
        bias = self.constant(f"{name}.bias", operation.bias, np.int32)
        self.node("Add", [sums, bias], f"{name}.sums")
        self.node("Cast", [f"{name}.sums"], f"{name}.float_sums", to=TensorProto.FLOAT)
        unit = self.constant(f"{name}.unit", np.float32(grid.scale) * operation.scale, np.float32)
        real = self.node("Mul", [f"{name}.float_sums", unit], f"{name}.channels_last")
        self.node("Transpose", [real], name, perm=[0, 3, 1, 2])

    def patches(self, operation: Conv, padding_code: int) -> str:
        """Adds ``(N, H, W, kh kw C)``, the values under the kernel at each place, in the order ``(kh, kw, C)``.

        Raises:
            ValueError: If the convolution is grouped.
        """
        if operation.groups > 1:
            raise ValueError(f"layer {operation.name}: a prediction with groups has no integer form")
        name = operation.output
        rows = self.node("Transpose", [operation.input], f"{name}.rows", perm=[0, 2, 3, 1])
        if any(operation.padding):
            pads = self.constant(f"{name}.pads", [0, *operation.padding, 0] * 2, np.int64)
            code = self.constant(f"code_{padding_code}", padding_code, np.uint8)
            rows = self.node("Pad", [rows, pads, code], f"{name}.padded", mode="constant")
        if operation.weight.shape[2:] == operation.stride == (1, 1):
            return rows
        # One copy; nine slices of them and their concatenation would be two, in smaller pieces.
        shape = self.constant(f"{name}.flat_shape", [0, -1, operation.weight.shape[1]], np.int64)
        flat = self.node("Reshape", [rows, shape], f"{name}.flat")
        gathered = self.node("Gather", [flat, self.places(operation, rows)], f"{name}.gathered", axis=1)
        shape = self.constant("patches_shape", [0, 0, 0, -1], np.int64)
        return self.node("Reshape", [gathered, shape], f"{name}.patches")

    def places(self, operation: Conv, rows: str) -> str:
        """Adds ``(H, W, kh, kw)``, places in the flattened ``rows`` of what lies under a kernel, once for a level."""
        kernel, level = operation.weight.shape[2:], operation.level or operation.input
        key = (level, kernel, operation.stride, operation.padding, operation.dilation)
        if key in self._places:
            return self._places[key]
        name, sums, width = f"{operation.output}.places", [], ""
        for axis, what in enumerate(("row", "column")):
            width = self.node("Shape", [rows], f"{name}_{what}s", start=1 + axis, end=2 + axis)
            end = self.node("Squeeze", [width], f"{name}_{what}_count")
            offsets = np.arange(kernel[axis]) * operation.dilation[axis]
            reach = self.constant(f"{name}_{what}_reach", offsets[-1], np.int64)
            end = self.node("Sub", [end, reach], f"{name}_{what}_end")
            start, step = (self.constant(f"index_{v}", v, np.int64) for v in (0, operation.stride[axis]))
            first = self.node("Range", [start, end, step], f"{name}_{what}_first")
            shape = self.constant(f"{what}_shape", [-1 if i == axis else 1 for i in range(4)], np.int64)
            first = self.node("Reshape", [first, shape], f"{name}_{what}_firsts")
            taps = self.constant(
                f"{what}_offsets", offsets.reshape([-1 if i == 2 + axis else 1 for i in range(4)]), np.int64
            )
            sums.append(self.node("Add", [first, taps], f"{name}_{what}_all"))
        lines = self.node("Mul", [sums[0], width], f"{name}_lines")
        self._places[key] = self.node("Add", [lines, sums[1]], name)
        return self._places[key]

    def requantize(self, operation: Requantize) -> None:
        """Adds the step from one grid to another."""
        real = self.dequantized(operation.input, operation.output)
        same = self.node("LeakyRelu", [real], f"{operation.output}.real", alpha=1.0)
        self.quantized(same, operation.output)

    def add(self, operation: Add) -> None:
        """Adds the sum of two tensors, on a grid of its own."""
        # In codes of the sum, with ratios that are exact in float32: see aqdet/export/sums.py.
        inputs = [
            self.dequantized(name, operation.output, multiplier / 2**operation.shift)
            for name, multiplier in zip(operation.inputs, operation.multipliers, strict=True)
        ]
        self.node("Add", inputs, f"{operation.output}.real")
        self.quantized(f"{operation.output}.real", operation.output, 1.0)

    # --- model ---

    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Returns the inputs: the image or, for regions, their codes."""
        about = f"pixels of N images as they are, 0 to 255; H and W multiples of {self.program.size_divisibility}"
        if self.program.channels != 3:
            about = "codes of N pooled regions"
        shape: list[str | int] = ["N", self.program.channels, "H", "W"]
        return [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, shape, about)]

    def model(self, extra_outputs: bool, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """Makes a model of the nodes and checks it; see :func:`build_onnx`."""
        channels = {conv.output: len(conv.weight) for conv in self.program.convs() if conv.grid is None}
        outputs = []
        for output in self.program.outputs:
            for name, about in zip(output.names, ("logits", "box deltas", "centerness logits"), strict=False):
                about += f" of level {output.level}, a location every {output.stride} pixels" * (output.stride > 0)
                shape: list[str | int] = ["N", channels[name], f"h_{output.level}", f"w_{output.level}"]
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape, about))
        for name in self.program.pyramid:
            about = f"codes of the pyramid: (code - {self.grids[name].zero_point}) * {self.grids[name].scale!r}"
            outputs.append(helper.make_tensor_value_info(name, self.value_type, [None] * 4, about))
        if extra_outputs:
            known = {info.name for info in outputs}
            written = {name for node in self.nodes for name in node.output}
            outputs += [
                helper.make_tensor_value_info(operation.output, self.value_type, [None] * 4)
                for operation in self.program.operations
                if operation.output in written - known
            ]
        model = self.make_model(self.inputs(), outputs, {"": OPSET}, _IR_VERSION, DESCRIPTION)
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model
