"""A sum as it ships, in the trained model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import QuantAdd


class ScaledAdd(QuantAdd):
    """A quantized sum whose operands are multiplied by constants near 1 after their quantizers.

    Args:
        add: the sum, whose quantizers it takes over.
        gains: the constants of the two operands.
    """

    def __init__(self, add: nn.Module, gains: Sequence[float]) -> None:
        assert isinstance(add, QuantAdd)
        super().__init__(signed=add.signed)
        self.x_quantizer, self.y_quantizer, self.gains = add.x_quantizer, add.y_quantizer, gains

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the sum of two tensors of one shape."""
        x = x if self.x_quantizer is None else self.x_quantizer(x)
        y = y if self.y_quantizer is None else self.y_quantizer(y)
        return x * self.gains[0] + y * self.gains[1]
