"""The taps of a trunk, and their aggregation in full precision.

Symbols of the paper (1903.11236): o_i the sum of residual block i before ReLU and quantizer, A_i its adaptor, h_i the
aggregated full-precision feature, D what carries it to the next block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from ...layers import run_chain
from .adaptor import Adaptor

EARLY_SHARE = 0.5
"""Size at which a stage's blocks before its last one start in the aggregation, relative to the trunk's.

Ours: what they carry is not what the trunk carries to the end of the stage, and the copied pyramid was trained on
that. With a trained ResNet-18 RetinaNet (BCCD) the path's losses start 2.5 % above the detector's, 10 % at 1.0.
"""


@contextlib.contextmanager
def tapped_sums(bottom_up: ResNet) -> Iterator[list[Tensor]]:
    """Lists the sums of the stem and every block of a forward pass inside the context, before ReLU and quantizer.

    A block's sum is that of its operands on their grids, see :class:`aqdet.layers.QuantAdd`.

    The list fills in the order of the forward pass with the tensors themselves, ``(N, C, H, W)`` each. The hooks
    that fill it are gone when the context ends.
    """
    sums: list[Tensor] = []
    streams = [m for name, m in bottom_up.named_modules() if name.endswith(".output_stream")]
    handles = [stream.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0])) for stream in streams]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class AggregationBlock(nn.Module):
    """One step of the aggregation: ``h_i = ReLU(D(h_{i-1}) + A_i(o_i))``.

    Args:
        in_channels, out_channels, stride: geometry of the trunk's block. ``D`` is the identity where they change
            nothing, a strided 1x1 convolution and norm otherwise.
        norm: norm of ``D`` and ``A``, see :func:`detectron2.layers.get_norm`.
        share: see :class:`Adaptor`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str, share: float) -> None:
        super().__init__()
        self.shortcut: Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            norm_layer = get_norm(norm, out_channels)
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride=stride, bias=not norm, norm=norm_layer)
            nn.init.kaiming_normal_(self.shortcut.weight, mode="fan_out", nonlinearity="relu")
        self.adaptor = Adaptor(out_channels, norm, share)

    @torch.no_grad()
    def scale_shortcut(self) -> None:
        """Brings a copy of the trunk's projection to the size that the adaptor's ``share`` asks for."""
        if self.shortcut is not None:
            norm = self.shortcut.norm
            affine = norm if isinstance(getattr(norm, "weight", None), nn.Parameter) else self.shortcut
            for parameter in affine.parameters(recurse=False):
                parameter.mul_(self.adaptor.share)

    def forward(self, carried: Tensor, x: Tensor) -> Tensor:
        """Maps ``h_{i-1}`` and ``o_i``, ``(N, C, H, W)``, to ``h_i``, of the shape of ``o_i``."""
        return self.adaptor(x, carried if self.shortcut is None else run_chain([self.shortcut], carried))


class Aggregation(Backbone):
    """Aggregates the taps at the stem and every block in full precision: a ResNet trunk of adaptors.

    Its modules are named as the trunk's, so that ``D`` can start as a copy of the trunk's own projection.

    Args:
        bottom_up: trunk whose taps it reads; not kept.
        norm: norm of all its convolutions.
    """

    def __init__(self, bottom_up: ResNet, *, norm: str) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self.stem = Adaptor(bottom_up.stem.out_channels, norm)
        self._stages = list(bottom_up.stage_names)
        for name in self._stages:
            blocks = list(getattr(bottom_up, name))
            shares = [EARLY_SHARE] * (len(blocks) - 1) + [1.0]
            self.add_module(
                name,
                nn.ModuleList(
                    AggregationBlock(block.in_channels, block.out_channels, block.stride, norm, share)
                    for block, share in zip(blocks, shares, strict=True)
                ),
            )

    def forward(self, sums: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Maps the sums of :func:`tapped_sums` to ``{"res3": (N, C, H / 8, W / 8), ...}``.

        It empties the list, so that a sum which backward does not need is gone when it has been read.
        """
        x = self.stem(sums.pop(0))
        outputs = {"stem": x}
        for name in self._stages:
            stage = cast(nn.ModuleList, getattr(self, name))
            for block in stage:
                x = block(x, sums.pop(0))
            outputs[name] = x
        return {name: outputs[name] for name in self._out_features}
