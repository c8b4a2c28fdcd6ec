"""The integer program as QONNX (2206.07527), for hardware whose arithmetic has the bits of the training.

Every tensor holds integers, and a ``Quant`` node with scale 1 states its number of bits: the bits of the weights and
activations, not those of a byte. A multiplication before it puts a sum onto its grid. A tool that folds these
multiplications into thresholds, as FINN does, has integers alone.

All tensors are float32 for QONNX's own executor, which gives the reference's codes while a sum stays below 2**24.
Shapes are static, as its tools require. The file's description, :data:`DESCRIPTION`, says what they read and refuse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from .program import IMAGE, Add, Conv, Grid, PadImage, Program, Requantize
from .program_writer import ProgramWriter, geometry
from .reference import conv_multiplier

DOMAIN = "qonnx.custom_op.general"
OPSET, _IR_VERSION = 17, 8
DESCRIPTION = (
    "The network of an object detector on integers, as QONNX: Quant nodes of scale 1 have the bits of the training. "
    "What reads it, tried on whole detectors: qonnx 1.0 cleans it up and executes it; FINN's ConvertQONNXtoFINN "
    "(finn-plus 1.6.1) makes thresholds of every activation, without a change of a prediction. Tried on a stem, a "
    "residual block and an upsampled sum: hls4ml 1.3 parses it after qonnx's conversion to channels last, which had "
    "not ended after half an hour for a whole detector, and another cleanup. What is refused: hls4ml 1.3 then stops at "
    "the product of a convolution's output and a constant for each channel (axis remapping), and with NumPy 2.2 or "
    "newer at a Resize's empty region of interest."
)


def build_qonnx(program: Program, height: int, width: int) -> onnx.ModelProto:
    """Builds the program as a QONNX model.

    Args:
        program: The program.
        height, width: Size of the image in pixels, multiples of ``program.size_divisibility``.

    Returns:
        A model with input ``image``, float32 ``(1, 3, height, width)`` of whole numbers 0 to 255, and the outputs
        of :class:`~aqdet.export.program.Program`.

    Raises:
        ValueError: In one line, if the size does not fit.
    """
    step = program.size_divisibility
    if height < 1 or width < 1 or height % step or width % step:
        raise ValueError(f"a QONNX model's height and width must be multiples of {step}, got {height} and {width}")
    return _Builder(program).build(height, width)


class _Builder(ProgramWriter):
    def build(self, height: int, width: int) -> onnx.ModelProto:
        self.write_operations()
        channels = {conv.output: len(conv.weight) for conv in self.program.convs() if conv.grid is None}
        outputs = [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [1, channels[name], -(-height // level.stride), -(-width // level.stride)]
            )
            for level in self.program.outputs
            for name in level.names
        ]
        image = helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [1, 3, height, width])
        return self.make_model([image], outputs, {"": OPSET, DOMAIN: 1}, _IR_VERSION, DESCRIPTION)

    def no_region(self) -> str:
        """Returns the name of an empty region: hls4ml wants each input of a Resize to be there."""
        return self.constant("no_region", [])

    def per_channel(self, name: str, values: NDArray[Any]) -> str:
        return self.constant(name, values.reshape(1, -1, 1, 1))

    def quant(self, x: str, output: str, lowest: int, highest: int) -> str:
        """Adds rounding to the integers ``lowest`` to ``highest``: signed, narrow, unsigned, or with a zero point."""
        bits = (highest - lowest).bit_length()
        signed, narrow, zero = lowest < 0, 0, 0
        if signed and lowest == -highest and highest == 2 ** (bits - 1) - 1:
            narrow = 1
        elif signed and (lowest, highest) != (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1):
            signed, zero = False, -lowest
        parameters = [
            self.constant("one", 1.0),
            self.constant(f"zero_point_{zero}", float(zero)),
            self.constant(f"bits_{bits}", float(bits)),
        ]
        attributes = {"signed": int(signed), "narrow": narrow, "rounding_mode": "ROUND"}
        return self.node("Quant", [x, *parameters], output, domain=DOMAIN, **attributes)

    def onto(self, real: str, output: str) -> None:
        grid = self.grids[output]
        self.quant(real, output, grid.quant_min, grid.quant_max)

    # --- operations ---

    def pad_image(self, operation: PadImage) -> None:
        pixels = self.quant(operation.input, f"{operation.input}.pixels", 0, 255)
        vertical, horizontal = operation.amount
        pads = self.constant("image_pads", [0, 0, vertical, horizontal] * 2, np.int64)
        # Pad has one value for all channels, and hls4ml knows only zero: it pads by zero, between a subtraction and an
        # addition of whole numbers.
        codes = self.per_channel("pad_codes", np.array(operation.values))
        centred = self.node("Sub", [pixels, codes], f"{operation.output}.centred")
        padded = self.node("Pad", [centred, pads], f"{operation.output}.around_zero", mode="constant")
        real = self.node("Add", [padded, codes], f"{operation.output}.real")
        self.quant(real, operation.output, 0, 255)  # changes nothing: without it, tools take the sum for float

    def weight(self, conv: Conv) -> str:
        """Returns a weight behind a Quant of its own: FINN wants no Quant that several convolutions read.

        The levels of the pyramid share the constant before it.
        """
        bits = conv.weight_bits
        while conv.weight.min() < -(2 ** (bits - 1)) or conv.weight.max() > 2 ** (bits - 1) - 1:
            bits += 1  # odd codes, such as DoReFa's, mean half steps
        name = self.constant(f"{conv.output}.weight", conv.weight)
        return self.quant(name, f"{conv.output}.weight_codes", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def conv(self, operation: Conv) -> None:
        name = operation.output
        sums = self.node(
            "Conv",
            [operation.input, self.weight(operation)],
            f"{name}.products",
            **geometry(operation),
        )
        factor = operation.sign.astype(np.float32) * operation.multiple
        if (factor != 1).any():
            sums = self.node("Mul", [sums, self.per_channel(f"{name}.factor", factor)], f"{name}.scaled")
        sums = self.node("Add", [sums, self.per_channel(f"{name}.bias", operation.bias)], f"{name}.sums")
        multiplier = self.per_channel(f"{name}.multiplier", conv_multiplier(operation, self._scale(operation.input)))
        if operation.grid is None:
            self.node("Mul", [sums, multiplier], name)
        else:
            self.onto(self.node("Mul", [sums, multiplier], f"{name}.real"), name)

    def predict(self, operation: Conv) -> None:
        self.conv(operation)

    def requantize(self, operation: Requantize) -> None:
        source, name = self.grids[operation.input], operation.output
        ours, theirs = np.float32(source.scale), np.float32(operation.grid.scale)
        codes = np.arange(source.quant_min, source.quant_max + 1).astype(np.float32)
        ratio = ours / theirs
        if np.array_equal(np.rint(codes * ratio), np.rint(codes * ours / theirs)):
            real = self.node("Mul", [operation.input, self.constant(f"{name}.ratio", ratio)], f"{name}.real")
        else:
            real = self.node("Mul", [operation.input, self.constant(f"{name}.source", ours)], f"{name}.value")
            real = self.node("Div", [real, self.constant(f"{name}.step", theirs)], f"{name}.real")
        self.onto(real, name)

    def add(self, operation: Add) -> None:
        name = operation.output
        terms = [
            self.node("Mul", [x, self.constant(f"{name}.ratio_{i}", m / 2**operation.shift)], f"{name}.term_{i}")
            for i, (x, m) in enumerate(zip(operation.inputs, operation.multipliers, strict=True))
        ]
        self.onto(self.node("Add", terms, f"{name}.real"), name)

    def _scale(self, name: str) -> float:
        grid: Grid = self.grids[name]
        return grid.scale
