"""What one quantizer is: method, bit width, signedness, granularity."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Description of one quantizer, checked when it is made.

    Attributes:
        quantizer: a name of :data:`aqdet.quantization.build.QUANTIZER_REGISTRY`.
        num_bits: 2 to 8.
        role: ``"weight"`` (read from a parameter) or ``"input"`` (an activation).
        signed: whether negative values are represented. Weights are always signed.
        per_channel: one scale for each output channel; weights only.

    Raises:
        ValueError: for a value outside these.
    """

    quantizer: str
    num_bits: int
    role: str
    signed: bool = True
    per_channel: bool = False

    def __post_init__(self) -> None:
        if self.role not in ("weight", "input"):
            raise ValueError(f"role must be 'weight' or 'input', got {self.role!r}")
        if type(self.num_bits) is not int or not MIN_BITS <= self.num_bits <= MAX_BITS:
            raise ValueError(f"NUM_BITS must be an integer from {MIN_BITS} to {MAX_BITS}, got {self.num_bits!r}")
        if self.role == "weight" and not self.signed:
            raise ValueError("weights are signed: signed=False is for role='input'")
        if self.role == "input" and self.per_channel:
            raise ValueError("per-channel scales are for weights: an integer convolution sums channels")


class IntegerTensor(NamedTuple):
    """A quantized tensor as integers: ``value = (codes - zero_point) * scale``, exactly.

    Attributes:
        codes: int32, any shape.
        scale: float32, 0-dim or broadcastable against ``codes``.
        zero_point: the code of zero.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int

    def dequantize(self) -> Tensor:
        """The float32 tensor that these integers stand for."""
        return (self.codes - self.zero_point).float() * self.scale
