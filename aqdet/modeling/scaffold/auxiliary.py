"""The full-precision auxiliary path: adaptors that read the low-precision trunk, and a head of its own.

After "Training Quantized Neural Networks with a Full-precision Auxiliary Module" (CVPR 2020, 1903.11236). The
path is scaffolding: its losses reach the quantized weights by a route that skips later quantizers, and it is
absent from evaluation and from what is shipped. It lives in ``model.auxiliary``.

Symbols of the paper: o_i the sum of residual block i before ReLU and quantizer, A_i its adaptor, h_i the
aggregated full-precision feature, D what carries it to the next block.

Deviation: here the operands of a sum are quantized (``RESIDUAL_NUM_BITS``, 8), as in the integer addition that is
shipped, and o_i is the sum of the quantized ones, so that the path reads what the detector computes. The gradient
passes these quantizers straight through, but not where an operand is clipped; the paper's sums have none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn

from ...layers import forget_sites
from ..backbone import BottomUp, QuantFPN, build_fpn

TAPS = ("fpn", "backbone", "both")
SCHEDULES = ("constant", "linear", "cosine")
INITS = ("head", "random")
PREFIX = "auxiliary."
TRAINING_ONLY = (PREFIX, "extra_head.")
"""Prefixes of the keys that a shipped detector does not have."""
EARLY_SHARE = 0.5
"""Size at which a stage's blocks before its last one start in the aggregation, relative to the trunk's.

Ours: what they carry is not what the trunk carries to the end of the stage, and the copied pyramid was trained on
that. With a trained ResNet-18 RetinaNet (BCCD) the path's losses start 2.5 % above the detector's, 10 % at 1.0.
"""


class Adaptor(nn.Module):
    """Full-precision 1x1 convolution and norm, a sum, then ReLU: ``h = ReLU(carried + A(o))``.

    It starts as the identity convolution. Deviation from the paper's public code, which starts at random
    and pre-trains the path in full precision first.

    Args:
        channels: of input and output.
        norm: see :func:`detectron2.layers.get_norm`.
        share: how much of ``o`` the aligned sum is to be.

    Attributes:
        needs_alignment: whether the next forward pass of a calibration is to :meth:`align` it.
    """

    def __init__(self, channels: int, norm: str, share: float = 1.0) -> None:
        super().__init__()
        self.share = share
        norm_layer = get_norm(norm, channels)
        self.conv = Conv2d(channels, channels, 1, bias=not norm, norm=norm_layer)
        nn.init.dirac_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.needs_alignment = False

    def forward(self, x: Tensor, carried: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)``, and another to add or None, to the same."""
        if self.needs_alignment and self.training and not torch.is_grad_enabled():
            # The first calibration batch: in training mode, but training itself always has gradients.
            self.align(x, carried)
            self.needs_alignment = False
        adapted = self.conv(x)
        return torch.relu(adapted if carried is None else carried + adapted)

    @torch.no_grad()
    def align(self, x: Tensor, carried: Tensor | None = None) -> None:
        """Makes ``carried + A(x)`` as near to ``share * x`` as a gain and an offset for each channel can.

        By least squares; with nothing carried the adaptor then passes ``x`` unchanged. Without this a fresh norm
        would centre and scale the features, and what was copied from the detector would see something that it
        was not trained on. By this process's statistics: one that fails must not leave the others waiting for
        them. Who calibrates averages the adaptors over processes. A group norm mixes channels, and passes ``x``
        approximately.
        """
        other = torch.zeros_like(x) if carried is None else carried
        moments = torch.stack([t.mean(dim=(0, 2, 3)) for t in (x, x.square(), other, x * other)])
        mean, square, other_mean, product = moments
        variance = (square - mean.square()).clamp(min=0)
        covariance = product - mean * other_mean
        # Where x is constant, to the rounding of its moments, any gain fits as well: none is taken from the ratio.
        varies = variance > square * (16 * torch.finfo(x.dtype).eps)
        gain = self.share - torch.where(varies, covariance / variance, 0.0)
        norm = self.conv.norm
        if isinstance(getattr(norm, "weight", None), nn.Parameter):
            norm.bias.copy_(self.share * mean - other_mean)
            norm.weight.copy_(gain * variance.add(norm.eps).sqrt())
            return
        # No norm, or a frozen one, which passes x unchanged as it is.
        self.conv.weight.mul_(gain.view(-1, 1, 1, 1))
        if self.conv.bias is not None:
            self.conv.bias.copy_(self.share * mean - other_mean - gain * mean)


class AggregationBlock(nn.Module):
    """One step of the aggregation: ``h_i = ReLU(D(h_{i-1}) + A_i(o_i))``.

    Args:
        in_channels, out_channels, stride: of the trunk's block. ``D`` is the identity where they change
            nothing, a strided 1x1 convolution and norm otherwise.
        norm: of ``D`` and ``A``.
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
        """``h_{i-1}`` and ``o_i``, ``(N, C, H, W)``, to ``h_i``, of the shape of ``o_i``."""
        return self.adaptor(x, carried if self.shortcut is None else self.shortcut(carried))


class Aggregation(Backbone):
    """The taps at every block and the stem, aggregated in full precision: a ResNet trunk of adaptors.

    Its modules are named as the trunk's, so that ``D`` can start as a copy of the trunk's own projection.

    Args:
        bottom_up: trunk whose taps it reads; not kept.
        norm: of all its convolutions.
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

    def forward(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """:func:`aqdet.modeling.backbone.tapped_sums` to ``{"res3": (N, C, H / 8, W / 8), ...}``."""
        stem, *rest = sums
        x = self.stem(stem)
        outputs = {"stem": x}
        for name in self._stages:
            stage = cast(nn.ModuleList, getattr(self, name))
            for block in stage:
                x = block(x, rest.pop(0))
            outputs[name] = x
        return {name: outputs[name] for name in self._out_features}


class AuxiliaryPath(nn.Module):
    """Adaptors over the low-precision trunk and a full-precision head.

    ``TAPS: fpn`` adapts the pyramid levels, which the head reads. ``TAPS: backbone`` aggregates the blocks'
    sums and ends in a float pyramid of its own, which the head reads. ``TAPS: both`` has one head too: it reads
    the mean of the two, so that it sees features of the size that it was trained on, its losses weigh as much
    as those of either, and it costs little more than ``backbone`` (RetinaNet R18, 640x640: 55.6, 61.6 and 62.2 GMACs;
    with a head for each it would be 117). For classification, ``backbone`` without a pyramid.

    Args:
        adaptors: one for each level of ``features``; empty for ``backbone``.
        trunk: maps the sums to levels by name; None for ``fpn``.
        levels: names of the levels that the head reads.
        head: maps the list of levels to predictions, as the model's own head does.
        loss_weight: factor of its losses at the start of training.
        schedule: ``"constant"``, or ``"linear"`` or ``"cosine"`` down to 0 at ``max_iter``.
        max_iter: length of training in iterations.

    Raises:
        ValueError: for an unknown schedule or a negative weight.
    """

    def __init__(
        self,
        *,
        adaptors: Sequence[Adaptor] = (),
        trunk: nn.Module | None = None,
        levels: Sequence[str] = (),
        head: nn.Module,
        loss_weight: float,
        schedule: str,
        max_iter: int,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"MODEL.AUX.SCHEDULE must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not loss_weight >= 0:
            raise ValueError(f"MODEL.AUX.LOSS_WEIGHT must not be negative, got {loss_weight}")
        self.adaptors = nn.ModuleList(adaptors)
        self.trunk = trunk
        self.levels = list(levels)
        self.head = head
        self.loss_weight = loss_weight
        self.schedule = schedule
        self.max_iter = max_iter

    def forward(self, features: Sequence[Tensor], sums: Sequence[Tensor] = ()) -> Any:
        """Predictions of the head.

        Args:
            features: what the model's own head reads, ``(N, C, H, W)`` for each level.
            sums: :func:`aqdet.modeling.backbone.tapped_sums`, where :attr:`reads_sums`.
        """
        adapted = []
        if len(self.adaptors):
            adapted = [adaptor(feature) for adaptor, feature in zip(self.adaptors, features, strict=True)]
        if self.trunk is None:
            return self.head(adapted)
        own = self.trunk(sums)
        levels = [own[name] for name in self.levels]
        if adapted:
            levels = [(a + b) / 2 for a, b in zip(adapted, levels, strict=True)]
        return self.head(levels)

    @property
    def reads_sums(self) -> bool:
        """Whether it reads the backbone's blocks."""
        return self.trunk is not None

    @property
    def needs_alignment(self) -> bool:
        """Whether adaptors wait for a calibration batch."""
        return any(module.needs_alignment for module in self.modules() if isinstance(module, Adaptor))

    def weight_at(self, iteration: int) -> float:
        """Factor of the losses at an iteration, by the schedule."""
        progress = min(max(iteration / max(self.max_iter, 1), 0.0), 1.0)
        if self.schedule == "linear":
            return self.loss_weight * (1 - progress)
        if self.schedule == "cosine":
            return self.loss_weight * 0.5 * (1 + math.cos(math.pi * progress))
        return self.loss_weight

    def initialize_from(self, model: nn.Module, trained: Set[str] = frozenset()) -> list[str]:
        """Starts the path from a trained model: head, pyramid and the projections ``D`` as copies of its own.

        Quantizer state is left out. The adaptors align themselves at the next calibration, one after the other,
        so that each block's ``h`` starts as near to the trunk's own output as its adaptor can make it.

        Args:
            model: with ``backbone`` and ``head`` of the structure of this path's.
            trained: keys of this path's state dict that stay as they are, as of a path with other taps.

        Returns:
            The keys that the model has no counterpart for. If there are any, nothing is changed.
        """
        adaptors = {f"{name}." for name, module in self.named_modules() if isinstance(module, Adaptor)}
        state = model.state_dict()
        copies, missing = {}, []
        for key, value in self.state_dict().items():
            if key.startswith(tuple(adaptors)) or key in trained:
                continue
            theirs = state.get(key.replace("trunk.", "backbone.", 1) if key.startswith("trunk.") else key)
            if theirs is not None and theirs.shape == value.shape:
                copies[key] = theirs.clone()
            elif not key.endswith("num_batches_tracked"):  # FrozenBN has none
                missing.append(key)
        if not missing:
            self.load_state_dict(copies, strict=False)
            for name, module in self.named_modules():
                if isinstance(module, AggregationBlock) and f"{name}.shortcut.weight" not in trained:
                    module.scale_shortcut()
                elif isinstance(module, Adaptor) and f"{name}.conv.weight" not in trained:
                    module.needs_alignment = True
        return missing


def build_auxiliary(
    cfg: CfgNode, *, head: nn.Module, backbone: Backbone, shapes: Mapping[str, ShapeSpec]
) -> AuxiliaryPath:
    """The auxiliary path of a model by ``MODEL.AUX``.

    Args:
        cfg: config.
        head: full-precision head for the path, not yet part of a model.
        backbone: the trunk, with its ResNet in ``bottom_up``; its structure is read, nothing of it is kept.
        shapes: the features that the model's head reads, by name.

    Raises:
        ValueError: in one line, for an unknown value of a ``MODEL.AUX`` key, or taps that the backbone lacks.
    """
    aux = cfg.MODEL.AUX
    if aux.TAPS not in TAPS:
        raise ValueError(f"MODEL.AUX.TAPS must be one of {', '.join(TAPS)}, got {aux.TAPS!r}")
    if aux.INIT not in INITS:
        raise ValueError(f"MODEL.AUX.INIT must be one of {', '.join(INITS)}, got {aux.INIT!r}")
    adaptors: list[Adaptor] = []
    trunk: BottomUp | QuantFPN | None = None
    if isinstance(backbone, BottomUp) and aux.TAPS != "backbone":
        raise ValueError(f"MODEL.AUX.TAPS must be 'backbone' where there is no pyramid, got {aux.TAPS!r}")
    if aux.TAPS in ("fpn", "both"):
        adaptors = [Adaptor(shape.channels, aux.NORM) for shape in shapes.values()]
    if aux.TAPS in ("backbone", "both"):
        if not isinstance(backbone, (BottomUp, QuantFPN)):
            raise ValueError(
                f"MODEL.AUX.TAPS {aux.TAPS!r} reads the blocks of a build_quant_* backbone: MODEL.BACKBONE.NAME "
                f"must be one, got {cfg.MODEL.BACKBONE.NAME!r}"
            )
        aggregation = Aggregation(cast(ResNet, backbone.bottom_up), norm=aux.NORM)
        is_pyramid = isinstance(backbone, QuantFPN)
        trunk = build_fpn(cfg, aggregation, norm=aux.NORM) if is_pyramid else BottomUp(aggregation)
    path = AuxiliaryPath(
        adaptors=adaptors,
        trunk=trunk,
        levels=list(shapes),
        head=head,
        loss_weight=aux.LOSS_WEIGHT,
        schedule=aux.SCHEDULE,
        max_iter=cfg.SOLVER.MAX_ITER,
    )
    forget_sites(path)
    return path


def _owner(model: nn.Module) -> Any:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def detached_auxiliary(model: nn.Module) -> Iterator[nn.Module]:
    """Takes what only training has out of a model for the duration, and puts the same back.

    That is the auxiliary path, the extra head and the teacher. Inside, the model is the shipped detector: it has no
    auxiliary parameter. The optimizer keeps its references, so that training goes on afterwards as if nothing had
    happened.
    """
    owner = _owner(model)
    names = ("auxiliary", "extra_head", "distillation")
    parts = {name: part for name in names if (part := getattr(owner, name, None)) is not None}
    for name in parts:
        setattr(owner, name, None)
    try:
        yield model
    finally:
        for name, part in parts.items():
            setattr(owner, name, part)


def strip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what only training has."""
    return {key: value for key, value in state_dict.items() if not key.startswith(TRAINING_ONLY)}
