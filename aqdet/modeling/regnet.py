"""RegNetX ("Designing Network Design Spaces", 2003.13678): a small trunk of plain and grouped convolutions.

Its block is a bottleneck block whose width stays the same and whose 3x3 convolution has groups, so that it is built
as Detectron2's ResNet of such blocks. All code that reads a ResNet reads it, too: the auxiliary path, the integer form
and the programs. Parameters have a ResNet's names (``res2.0.conv1.weight``), not those of Detectron2's ``RegNet``;
``tools/convert_torchvision.py`` renames torchvision's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from detectron2.modeling.backbone.resnet import ResNet

from .blocks import QuantBottleneckBlock, QuantSimpleStem

STEM_CHANNELS = 32


@dataclasses.dataclass(frozen=True)
class _Size:
    """A member of the family: blocks and channels of each stage, and the channels of a group."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_width: int


SIZES = {
    "200MF": _Size((1, 1, 4, 7), (24, 56, 152, 368), 8),
    # As torchvision's, whose weights are to be had; the paper's last stage has 384 channels.
    "400MF": _Size((1, 2, 7, 12), (32, 64, 160, 400), 16),
    "600MF": _Size((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "800MF": _Size((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "1.6GF": _Size((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "3.2GF": _Size((2, 6, 15, 2), (96, 192, 432, 1008), 48),
}
"""The members by their multiply-adds for an image of 224x224."""


def build_regnetx(size: str, *, in_channels: int, norm: str, out_features: Sequence[str]) -> ResNet:
    """Builds a RegNetX in float with declared sites; ``res2`` to ``res5`` have strides 4 to 32.

    Args:
        size: a key of :data:`SIZES`.
        in_channels: channels of the image.
        norm: see :func:`detectron2.layers.get_norm`.
        out_features: some of ``stem``, ``res2`` to ``res5``.

    Raises:
        ValueError: for an unknown size, naming the key.
    """
    if size not in SIZES:
        valid = ", ".join(SIZES)
        raise ValueError(f"MODEL.RESNETS.REGNETX must be one of {valid}, or '' for a ResNet, got {size!r}")
    chosen = SIZES[size]
    stages, channels = [], STEM_CHANNELS
    for width, depth in zip(chosen.widths, chosen.depths, strict=True):
        stages.append(
            ResNet.make_stage(
                block_class=QuantBottleneckBlock,
                num_blocks=depth,
                stride_per_block=[2] + [1] * (depth - 1),
                in_channels=channels,
                out_channels=width,
                bottleneck_channels=width,
                num_groups=width // chosen.group_width,
                stride_in_1x1=False,
                norm=norm,
            )
        )
        channels = width
    stem = QuantSimpleStem(in_channels, STEM_CHANNELS, norm)
    return ResNet(stem, stages, out_features=list(out_features))
