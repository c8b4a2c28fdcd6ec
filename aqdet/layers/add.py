"""Element-wise sums, and the tensors that several layers read, as modules of their own.

Inference is to be integer-only, so that a sum is a place where two grids meet: its operands and its result
are quantized to ``MODEL.QUANT.RESIDUAL_NUM_BITS`` during training, as they will be when shipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec, build_quantizer
from ..quantization.kernels import replaceable


@replaceable("relu_before")
def relu_before(quantizer: Quantizer | None, x: Tensor, inplace: bool = False) -> Tensor:
    """Applies the ReLU before a quantizer.

    Args:
        quantizer: the only reader of the result; None if it is read in float.
        x: any shape.
        inplace: whether ``x`` may be changed.
    """
    return torch.relu_(x) if inplace else torch.relu(x)


class StreamQuantizer(nn.Module):
    """ReLU (optional) and quantization of a tensor that more than one layer reads.

    Until :meth:`quantize` is called it only applies the ReLU.

    Args:
        relu: whether a ReLU comes before the quantizer.
        signed: whether the tensor can be negative after that.
    """

    quantizer: Quantizer | None

    def __init__(self, *, relu: bool, signed: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.signed = signed and not relu
        self.quantizer = None

    def quantize(self, quantizer: str, num_bits: int) -> None:
        """Adds an uncalibrated quantizer of the given method and bit width."""
        self.quantizer = build_quantizer(QuantSpec(quantizer, num_bits, "input", signed=self.signed))

    @replaceable("stream")
    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to the same."""
        if self.relu:
            x = relu_before(self.quantizer, x)
        return x if self.quantizer is None else self.quantizer(x)


class QuantAdd(nn.Module):
    """Sum ``x + y`` with quantized operands.

    Args:
        signed: for each operand, whether it can be negative; None if it comes from a
            :class:`StreamQuantizer` and is on a grid already.
    """

    def __init__(self, *, signed: tuple[bool | None, bool | None]) -> None:
        super().__init__()
        self.signed = signed
        self.x_quantizer: Quantizer | None = None
        self.y_quantizer: Quantizer | None = None

    def quantize(self, quantizer: str, num_bits: int) -> None:
        """Adds uncalibrated quantizers of the given method and bit width."""
        for key, signed in zip(("x_quantizer", "y_quantizer"), self.signed, strict=True):
            if signed is not None:
                setattr(self, key, build_quantizer(QuantSpec(quantizer, num_bits, "input", signed=signed)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds two tensors of one shape, before any activation."""
        if self.x_quantizer is not None:
            x = self.x_quantizer(x)
        if self.y_quantizer is not None:
            y = self.y_quantizer(y)
        return x + y
