"""Element-wise sums, and the tensors that several layers read, as modules of their own.

Inference is to be integer-only, so that a sum is a place where two grids meet: its operands and its result
are quantized to ``MODEL.QUANT.RESIDUAL_NUM_BITS`` during training, as they will be when shipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization import Quantizer, QuantSpec, build_quantizer


def relu_before(quantizer: Quantizer | None, x: Tensor, inplace: bool = False) -> Tensor:
    """ReLU of a tensor that only ``quantizer`` reads; one that clips at zero is the ReLU itself."""
    if quantizer is not None and quantizer.is_relu:
        return x
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

    def quantize(self, name: str, num_bits: int, path: str) -> None:
        """Adds an uncalibrated quantizer of the given method and bit width."""
        spec = QuantSpec(name, num_bits, "input", signed=self.signed)
        self.quantizer = build_quantizer(spec)
        self.quantizer.path = f"{path}.quantizer"
        self.quantizer.note_codes = True

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same. The quantizer of a ReLU's output clips at zero, which is the ReLU."""
        if self.relu:
            x = relu_before(self.quantizer, x)
        return x if self.quantizer is None else self.quantizer(x)


class QuantAdd(nn.Module):
    """``x + y`` with quantized operands.

    Args:
        signed: for each operand, whether it can be negative; None if it comes from a
            :class:`StreamQuantizer` and is on a grid already.
    """

    def __init__(self, *, signed: tuple[bool | None, bool | None]) -> None:
        super().__init__()
        self.signed = signed
        self.x_quantizer: Quantizer | None = None
        self.y_quantizer: Quantizer | None = None

    def quantize(self, name: str, num_bits: int, path: str) -> None:
        """Adds uncalibrated quantizers of the given method and bit width."""
        for key, signed in zip(("x_quantizer", "y_quantizer"), self.signed, strict=True):
            if signed is not None:
                quantizer = build_quantizer(QuantSpec(name, num_bits, "input", signed=signed))
                quantizer.path = f"{path}.{key}"
                setattr(self, key, quantizer)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two tensors of one shape to their sum, before any activation."""
        if self.x_quantizer is not None:
            x = self.x_quantizer(x)
        if self.y_quantizer is not None:
            y = self.y_quantizer(y)
        return x + y
