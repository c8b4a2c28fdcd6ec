"""Heads whose convolutions can be quantized."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Tensor, nn

from ..layers import LevelNorms, declare_site, run_chains, shared_weights


def _declare_sites(head: RetinaNetHead, signed_input: bool, *predictions: nn.Conv2d) -> None:
    for tower in (head.cls_subnet, head.bbox_subnet):
        signed = signed_input
        for layer in tower:
            if isinstance(layer, nn.Conv2d):
                declare_site(layer, signed=signed)
                signed = False
    for layer in predictions:
        declare_site(layer, signed=False, role="prediction")  # behind the last ReLU of its tower


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, 1) if channels == 1 else get_norm("GN", channels)


def _head_norm(norm: Any, levels: int, level_affine: bool) -> Any:
    """Returns the ``norm`` for Detectron2's heads, which try it with one channel, which 32 groups do not divide."""
    if level_affine and norm in ("BN", "SyncBN"):
        bn_class = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
        return lambda channels: LevelNorms(levels, bn_class, num_features=channels)
    return _group_norm if norm == "GN" else norm


class ReadsPyramid:
    """A head of Detectron2's that reads pyramid levels, or regions pooled from them, which may be negative or not."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        """Builds Detectron2's arguments and ``signed_input``; levels are unsigned where the FPN ends in ReLU."""
        arguments = super().from_config(cfg, input_shape)  # type: ignore[misc]
        return {**arguments, "signed_input": not cfg.MODEL.FPN.RELU}


class QuantRetinaNetHead(ReadsPyramid, RetinaNetHead):
    """Detectron2's RetinaNet head with a declared site at every convolution.

    Norm ``"BN"`` or ``"SyncBN"`` is one batch norm per pyramid level (AQD, 2007.06919), as in Detectron2.

    Args:
        signed_input: whether the pyramid levels can be negative.
        level_affine: whether each of those batch norms has an affine of its own, as in AQD, or all share one, as in
            Detectron2.
        kwargs: see :class:`detectron2.modeling.meta_arch.retinanet.RetinaNetHead`.
    """

    @configurable
    def __init__(self, *, signed_input: bool, level_affine: bool = False, **kwargs: Any) -> None:
        norm = _head_norm(kwargs.get("norm", ""), len(kwargs["input_shape"]), level_affine)
        super().__init__(**{**kwargs, "norm": norm})
        _declare_sites(self, signed_input, self.cls_score, self.bbox_pred)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Builds Detectron2's arguments, ``signed_input``, and ``level_affine`` from ``MODEL.HEAD_LEVEL_AFFINE``."""
        return {**super().from_config(cfg, input_shape), "level_affine": cfg.MODEL.HEAD_LEVEL_AFFINE}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See Detectron2's; the weights, shared over the levels, are quantized once."""
        with shared_weights(self):
            logits = run_chains([*self.cls_subnet, self.cls_score], features)
            return logits, run_chains([*self.bbox_subnet, self.bbox_pred], features)


class QuantFCOSHead(FCOSHead):
    """Detectron2's FCOS head with a declared site at every convolution; one BN per level as in RetinaNet's.

    Centerness is predicted beside the box, behind the box tower, as in Detectron2.

    Args:
        signed_input: whether the pyramid levels can be negative.
        centerness: whether there is one; without it the scores are the classes' alone.
        level_affine: see :class:`QuantRetinaNetHead`.
        kwargs: see :class:`detectron2.modeling.meta_arch.fcos.FCOSHead`.
    """

    @configurable
    def __init__(
        self, *, signed_input: bool, centerness: bool = True, level_affine: bool = False, **kwargs: Any
    ) -> None:
        norm = _head_norm(kwargs.get("norm", ""), len(kwargs["input_shape"]), level_affine)
        super().__init__(**{**kwargs, "norm": norm})
        self.has_centerness = centerness
        predictions = [self.cls_score, self.bbox_pred]
        if centerness:
            predictions.append(self.ctrness)
        else:
            del self.ctrness
        _declare_sites(self, signed_input, *predictions)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Computes class logits, box deltas and, if there is one, centerness, each ``(N, K, H, W)`` for each level."""
        with shared_weights(self):
            logits = run_chains([*self.cls_subnet, self.cls_score], features)
            if not self.has_centerness:
                return logits, run_chains([*self.bbox_subnet, self.bbox_pred], features)
            boxes = run_chains([*self.bbox_subnet], features)
            return logits, [self.bbox_pred(x) for x in boxes], [self.ctrness(x) for x in boxes]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Builds the arguments from ``MODEL.FCOS``; the levels are unsigned where the FPN ends in ReLU."""
        fcos = cfg.MODEL.FCOS
        return {
            "input_shape": input_shape,
            "num_classes": fcos.NUM_CLASSES,
            "conv_dims": [input_shape[0].channels] * fcos.NUM_CONVS,
            "prior_prob": fcos.PRIOR_PROB,
            "norm": fcos.NORM,
            "centerness": fcos.CLASS_LOSS == "focal",
            "level_affine": cfg.MODEL.HEAD_LEVEL_AFFINE,
            "signed_input": not cfg.MODEL.FPN.RELU,
        }
