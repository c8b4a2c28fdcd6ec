"""Stems and residual blocks whose convolutions, sums and shared tensors can be quantized.

The classes are Detectron2's with the sums and ReLUs that matter for integer inference made modules; without
quantizers they compute the same to the bit, under the same parameter names.

Shape legend: N batch, C channels, H and W height and width at the stride of a level.
"""

from __future__ import annotations

from typing import Any

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, CNNBlockBase
from torch import Tensor, nn

from ..layers import RELU, QuantAdd, StreamQuantizer, declare_site, max_pool2d, run_chain
from ..quantization import quantizers


class _FreezesQuantizers(CNNBlockBase):
    """A block whose quantizers stay as they are calibrated once it is frozen, as its weights and norms do."""

    def freeze(self) -> Any:
        """Freezes the block; see Detectron2's. Its quantizers are still calibrated where they are not yet."""
        for _, quantizer in quantizers(self):
            quantizer.frozen = True
        return super().freeze()


class QuantStem(_FreezesQuantizers, BasicStem):
    """7x7 conv, max pool, ReLU; reads the uint8 image and puts the residual stream on its grid.

    ReLU and quantizer come after the pooling, which gives the same values as before it (the maximum of
    quantized values is the quantized maximum) for a quarter of the work, and a tap point like a block's.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        declare_site(self.conv1, signed=True, role="stem")
        self.output_stream = StreamQuantizer(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, 3, H, W)`` to ``(N, C, H / 4, W / 4)``."""
        x = max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)
        return self.output_stream(x)


class QuantSimpleStem(_FreezesQuantizers):
    """3x3 conv of stride 2, norm and ReLU, without a pooling: RegNet's stem. It reads the uint8 image.

    Args:
        in_channels, out_channels: channels of the convolution.
        norm: see :func:`detectron2.layers.get_norm`.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, 2)
        norm_layer = get_norm(norm, out_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False, norm=norm_layer)
        weight_init.c2_msra_fill(self.conv1)
        declare_site(self.conv1, signed=True, role="stem")
        self.output_stream = StreamQuantizer(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, 3, H, W)`` to ``(N, C, H / 2, W / 2)``."""
        return self.output_stream(self.conv1(x))


class _ResidualMixin(nn.Module):
    """The end of a residual block: sum, then ReLU and shared stream, whose input is the tap point."""

    shortcut: nn.Conv2d | None

    def _add_residual(self) -> None:
        self.residual_add = QuantAdd(signed=(True, None if self.shortcut is None else True))
        self.output_stream = StreamQuantizer(relu=True)
        if self.shortcut is not None:
            declare_site(self.shortcut, signed=False)

    def _run(self, convs: list[nn.Conv2d], x: Tensor) -> Tensor:
        """Applies convolutions with ReLUs between, adds the shortcut, and ends in the stream."""
        layers = [layer for conv in convs for layer in (conv, RELU)][:-1]
        shortcut = self.shortcut
        return run_chain(
            [*layers, self.residual_add, self.output_stream], x, lambda: x if shortcut is None else shortcut(x)
        )


class QuantBasicBlock(_FreezesQuantizers, BasicBlock, _ResidualMixin):
    """ResNet-18/34 block. Its tap point is the sum before ReLU and quantization."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, **kwargs: object) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        declare_site(self.conv1, signed=False)
        declare_site(self.conv2, signed=False)
        self._add_residual()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)``, on the grid of the stream, to ``(N, C', H / stride, W / stride)``."""
        return self._run([self.conv1, self.conv2], x)


class QuantBottleneckBlock(_FreezesQuantizers, BottleneckBlock, _ResidualMixin):
    """Block of a ResNet-50/101 or a RegNetX. Its tap point is the sum before ReLU and quantization.

    A block that strides without a change of channels has a projection too, as in a RegNetX; in Detectron2's it would
    have none, and fail.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, **kwargs: object) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        if self.shortcut is None and self.stride != 1:
            norm = get_norm(str(kwargs.get("norm", "BN")), out_channels)
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride=self.stride, bias=False, norm=norm)
            weight_init.c2_msra_fill(self.shortcut)
        for conv in (self.conv1, self.conv2, self.conv3):
            declare_site(conv, signed=False)
        self._add_residual()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)``, on the grid of the stream, to ``(N, C', H / stride, W / stride)``."""
        return self._run([self.conv1, self.conv2, self.conv3], x)
