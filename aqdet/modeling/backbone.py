"""ResNet and FPN whose convolutions, sums and shared tensors can be quantized, and their builders.

The classes are Detectron2's with the sums and ReLUs that matter for integer inference made modules; without
quantizers they compute the same to the bit, under the same parameter names. The builders are registered.

Shape legend: N batch, C channels, H and W height and width at the stride of a level.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor

from ..layers import RELU, QuantAdd, StreamQuantizer, declare_site, run_chain
from .architecture import check_architecture
from .blocks import QuantBasicBlock, QuantBottleneckBlock, QuantStem
from .policy import QuantPolicy
from .regnet import build_regnetx

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STAGES = ["res2", "res3", "res4", "res5"]
PYRAMID_OF_REGIONS = "build_quant_resnet_fpn_backbone"
PYRAMIDS = {"build_quant_retinanet_resnet_fpn_backbone": ("p6", "p7"), PYRAMID_OF_REGIONS: ("p6",)}
"""Backbones with a pyramid, and the levels of its top block."""


class QuantLastLevelP6P7(LastLevelP6P7):
    """P6 and P7 by strided convolutions, with the pyramid's norm and ReLU where it has them.

    Args:
        in_channels, out_channels: channels of ``in_feature`` and of the pyramid.
        in_feature: ``"res5"`` or ``"p5"``.
        norm: norm after both convolutions, ``""`` for none (Detectron2's form).
        relu: whether a ReLU follows both.
    """

    def __init__(self, *, in_channels: int, out_channels: int, in_feature: str, norm: str, relu: bool) -> None:
        super().__init__(in_channels, out_channels, in_feature)
        if norm:
            for key, channels in (("p6", in_channels), ("p7", out_channels)):
                norm_layer = get_norm(norm, out_channels)
                conv = Conv2d(channels, out_channels, 3, 2, 1, bias=False, norm=norm_layer)
                weight_init.c2_xavier_fill(conv)
                setattr(self, key, conv)
        declare_site(self.p6, signed=not (relu or in_feature.startswith("res")))
        declare_site(self.p7, signed=False)
        self.p6_stream = StreamQuantizer(relu=relu, signed=True)
        self.p7_stream = StreamQuantizer(relu=relu, signed=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps ``(N, C, H, W)`` to P6 and P7 at half and a quarter of its size."""
        p6 = run_chain([self.p6, self.p6_stream], x)
        p7 = run_chain([self.p7, self.p7_stream], F.relu(p6))
        return [p6, p7]


class QuantFPN(FPN):
    """Detectron2's FPN with the top-down sums and the levels as modules.

    Args:
        relu: whether a ReLU follows every convolution's norm, as in AQD; the levels are then unsigned.
        kwargs: see :class:`detectron2.modeling.FPN`; only ``fuse_type="sum"``.

    Raises:
        ValueError: for another ``fuse_type``.
    """

    def __init__(self, *, relu: bool, **kwargs: object) -> None:
        if kwargs.get("fuse_type", "sum") != "sum":
            raise ValueError(f"MODEL.FPN.FUSE_TYPE must be 'sum', got {kwargs['fuse_type']!r}")
        super().__init__(**kwargs)
        # FPN keeps its convolutions in plain lists too, which a conversion would not reach.
        del self.lateral_convs, self.output_convs
        strides = [self.bottom_up.output_shape()[f].stride for f in self.in_features]
        self._levels = [int(math.log2(stride)) for stride in strides]
        self._relu = relu
        for level in self._levels:
            lateral = getattr(self, f"fpn_lateral{level}")
            declare_site(lateral, signed=False)
            declare_site(getattr(self, f"fpn_output{level}"), signed=not relu)
            if level != self._levels[-1]:
                self.add_module(f"fpn_add{level}", QuantAdd(signed=(not relu, None)))
            self.add_module(f"fpn_sum{level}", StreamQuantizer(relu=False, signed=not relu))
            self.add_module(f"p{level}_stream", StreamQuantizer(relu=relu, signed=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps ``(N, 3, H, W)`` to ``{"p3": (N, C, H / 8, W / 8), ...}``, high to low resolution."""
        bottom_up = self.bottom_up(x)
        results: dict[str, Tensor] = {}
        previous: Tensor | None = None
        for level, feature in zip(reversed(self._levels), reversed(self.in_features), strict=True):
            layers = [getattr(self, f"fpn_lateral{level}")]
            if self._relu:
                layers.append(RELU)
            above = None
            if previous is not None:
                layers.append(getattr(self, f"fpn_add{level}"))
                above = functools.partial(F.interpolate, previous, scale_factor=2.0, mode="nearest")
            previous = run_chain([*layers, getattr(self, f"fpn_sum{level}")], bottom_up[feature], above)
            output = [getattr(self, part) for part in (f"fpn_output{level}", f"p{level}_stream")]
            results[f"p{level}"] = run_chain(output, previous)
        if self.top_block is not None:
            source = {**results, **bottom_up}[self.top_block.in_feature]
            for level, output in enumerate(self.top_block(source), self._levels[-1] + 1):
                results[f"p{level}"] = output
        return {name: results[name] for name in self._out_features}


def feature_names(cfg: CfgNode) -> list[str] | None:
    """Returns the names of the features of a config's backbone without building it; None if it is not one of ours.

    Raises:
        ValueError: in one line, for features that the ResNet, or the pyramid that reads it, cannot have.
    """
    name, known = cfg.MODEL.BACKBONE.NAME, ["stem", *STAGES]
    if name not in (builder.__name__ for builder in BUILDERS):
        return None
    given = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    if not given or not set(given) <= set(known):
        raise ValueError(f"MODEL.RESNETS.OUT_FEATURES must be of {', '.join(known)}, got {given}")
    if name not in PYRAMIDS:
        return given
    read = list(cfg.MODEL.FPN.IN_FEATURES)
    first = STAGES.index(read[0]) if read and read[0] in STAGES else 0
    if not read or not set(read) <= set(given) or read != STAGES[first : first + len(read)]:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be consecutive stages of MODEL.RESNETS.OUT_FEATURES {given}, got {read}"
        )
    if name == PYRAMID_OF_REGIONS and read[-1] != "res5":
        raise ValueError(f"MODEL.FPN.IN_FEATURES must end in 'res5' for {name}, whose P6 is P5 subsampled, got {read}")
    return [*(stage.replace("res", "p") for stage in read), *PYRAMIDS[name]]


def _build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet or RegNetX in float with declared sites, from ``MODEL.RESNETS``."""
    check_architecture(cfg)
    resnets = cfg.MODEL.RESNETS
    if resnets.REGNETX:
        return build_regnetx(
            resnets.REGNETX,
            in_channels=input_shape.channels,
            norm=resnets.NORM,
            out_features=resnets.OUT_FEATURES,
        )
    depth = resnets.DEPTH
    if depth not in BLOCKS_PER_STAGE:
        valid = ", ".join(map(str, BLOCKS_PER_STAGE))
        raise ValueError(f"MODEL.RESNETS.DEPTH must be one of {valid}, got {depth}")
    basic = depth < 50
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError("MODEL.RESNETS.DEFORM_ON_PER_STAGE: deformable convs cannot be quantized")
    if basic and not 1 <= resnets.RES2_OUT_CHANNELS <= 64:
        raise ValueError(
            "MODEL.RESNETS.RES2_OUT_CHANNELS must be 64, or fewer for a narrower network, for depth "
            f"{depth}, got {resnets.RES2_OUT_CHANNELS}"
        )
    if resnets.RES5_DILATION != 1:
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1, got {resnets.RES5_DILATION}")
    stem = QuantStem(in_channels=input_shape.channels, out_channels=resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    stages = []
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    bottleneck_channels = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
    for index, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
        block_args: dict[str, object] = {}
        if not basic:
            block_args = {
                "bottleneck_channels": bottleneck_channels << index,
                "stride_in_1x1": resnets.STRIDE_IN_1X1,
                "num_groups": resnets.NUM_GROUPS,
            }
        stages.append(
            ResNet.make_stage(
                block_class=QuantBasicBlock if basic else QuantBottleneckBlock,
                num_blocks=num_blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels << index,
                norm=resnets.NORM,
                **block_args,
            )
        )
        in_channels = out_channels << index
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES)


def _quantize_and_freeze(cfg: CfgNode, backbone: Backbone, bottom_up: ResNet) -> None:
    """Quantizes a backbone by ``MODEL.QUANT`` if enabled, then freezes its first stages, quantizers included."""
    if cfg.MODEL.QUANT.ENABLED:
        QuantPolicy.from_config(cfg).apply(backbone, "backbone.")
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_quant_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet-18/34/50/101, quantized by ``MODEL.QUANT`` if enabled; Detectron2's keys otherwise."""
    backbone = _build_resnet(cfg, input_shape)
    _quantize_and_freeze(cfg, backbone, backbone)
    return backbone


class BottomUp(Backbone):
    """A trunk without a pyramid, under the name that it has in a detector: ``backbone.bottom_up``.

    Args:
        bottom_up: a ResNet, or an aggregation of its taps.
    """

    def __init__(self, bottom_up: Backbone) -> None:
        super().__init__()
        self.bottom_up = bottom_up

    def forward(self, x: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Maps the input of ``bottom_up`` to its features by name, ``(N, C, H, W)`` each."""
        return self.bottom_up(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns the output shape of ``bottom_up``."""
        return self.bottom_up.output_shape()


@BACKBONE_REGISTRY.register()
def build_quant_classifier_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BottomUp:
    """Builds the ResNet-18/34/50/101 of an image classifier, quantized by ``MODEL.QUANT`` if enabled.

    Its layers have the names that they have in a detector, for rules and for checkpoints.
    """
    bottom_up = _build_resnet(cfg, input_shape)
    backbone = BottomUp(bottom_up)
    _quantize_and_freeze(cfg, backbone, bottom_up)
    return backbone


@BACKBONE_REGISTRY.register()
def build_quant_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> QuantFPN:
    """Builds a ResNet with FPN and P6, P7, quantized by ``MODEL.QUANT`` if enabled.

    Raises:
        ValueError: for a config value that it does not support, naming the key.
    """
    bottom_up = _build_resnet(cfg, input_shape)
    backbone = build_fpn(cfg, bottom_up, norm=cfg.MODEL.FPN.NORM)
    _quantize_and_freeze(cfg, backbone, bottom_up)
    return backbone


@BACKBONE_REGISTRY.register()
def build_quant_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> QuantFPN:
    """Builds a ResNet with FPN and P6 by subsampling of P5, for two-stage detectors; quantized as the others are.

    Raises:
        ValueError: for a config value that it does not support, naming the key.
    """
    return build_quant_retinanet_resnet_fpn_backbone(cfg, input_shape)


def build_fpn(cfg: CfgNode, bottom_up: Backbone, *, norm: str) -> QuantFPN:
    """Builds an FPN in float by ``MODEL.FPN``, except for its norm, with the top block of ``MODEL.BACKBONE.NAME``.

    Raises:
        ValueError: for a config value that it does not support, naming the key.
    """
    fpn = cfg.MODEL.FPN
    subsampled = cfg.MODEL.BACKBONE.NAME == PYRAMID_OF_REGIONS
    return QuantFPN(
        relu=fpn.RELU,
        bottom_up=bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=norm,
        top_block=LastLevelMaxPool() if subsampled else _build_p6_p7(cfg, bottom_up, norm),
        fuse_type=fpn.FUSE_TYPE,
    )


def _build_p6_p7(cfg: CfgNode, bottom_up: Backbone, norm: str) -> QuantLastLevelP6P7:
    fpn = cfg.MODEL.FPN
    in_feature = fpn.TOP_BLOCK_IN_FEATURE
    if in_feature not in ("res5", "p5"):
        raise ValueError(f"MODEL.FPN.TOP_BLOCK_IN_FEATURE must be 'res5' or 'p5', got {in_feature!r}")
    key = "RESNETS.OUT_FEATURES" if in_feature == "res5" else "FPN.IN_FEATURES"
    features = cfg.MODEL.RESNETS.OUT_FEATURES if in_feature == "res5" else fpn.IN_FEATURES
    if "res5" not in features:
        raise ValueError(f"MODEL.{key} must have 'res5', which P6 is computed from, got {features}")
    return QuantLastLevelP6P7(
        in_channels=bottom_up.output_shape()["res5"].channels if in_feature == "res5" else fpn.OUT_CHANNELS,
        out_channels=fpn.OUT_CHANNELS,
        in_feature=in_feature,
        norm=norm if fpn.RELU else "",
        relu=fpn.RELU,
    )


BUILDERS = (
    build_quant_resnet_backbone,
    build_quant_classifier_backbone,
    build_quant_resnet_fpn_backbone,
    build_quant_retinanet_resnet_fpn_backbone,
)
