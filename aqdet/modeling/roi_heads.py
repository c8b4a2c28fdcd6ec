"""Heads for regions whose layers can be quantized: boxes, masks, keypoints.

RoIAlign averages values, so that the inputs of these heads have the sign of the pyramid's levels.

Shape legend: R regions of all images, C channels, S side of a pooled region.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.roi_heads import (
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import LAYER_KINDS, declare_site
from ..quantization import quantizers
from .heads import ReadsPyramid

ROI_PARTS = ("box", "mask", "keypoint")
"""Values of ``MODEL.AUX.ROI_HEADS``."""


def _declare_sites(layers: Iterable[nn.Module], signed_input: bool, prediction: nn.Module | None = None) -> None:
    """Declares a site at every layer of a sequence that has a ReLU after each, in its order."""
    signed = signed_input
    for layer in layers:
        if isinstance(layer, tuple(LAYER_KINDS)):
            role = "prediction" if layer is prediction else "inner"
            declare_site(layer, signed=signed, role=role)  # type: ignore[arg-type]
            signed = False


def _count(of_images: Iterable[Sized]) -> int:
    return sum(len(of_image) for of_image in of_images)


@contextlib.contextmanager
def _norms_at_rest(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Lets batch norms pass a batch without regions, which has no statistics; a SyncBN waits for other processes'."""
    norms = []
    if x.shape[0] == 0:
        shared = (nn.SyncBatchNorm, NaiveSyncBatchNorm) if comm.get_world_size() > 1 else ()
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and not isinstance(m, shared)]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


@ROI_BOX_HEAD_REGISTRY.register()
class QuantFastRCNNConvFCHead(ReadsPyramid, FastRCNNConvFCHead):
    """Detectron2's box head, of convolutions with norm and fully connected layers, with a declared site at each.

    Args:
        input_shape: shape of a pooled region.
        signed_input: whether the pyramid levels can be negative.
        kwargs: see :class:`detectron2.modeling.roi_heads.FastRCNNConvFCHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, signed_input: bool, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        del self.conv_norm_relus, self.fcs  # plain lists, which a conversion would not reach
        _declare_sites(self, signed_input)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to ``(R, C')``, or to ``(R, C', S, S)`` without fully connected layers."""
        with _norms_at_rest(self, x):
            return super().forward(x)


@ROI_MASK_HEAD_REGISTRY.register()
class QuantMaskRCNNConvUpsampleHead(ReadsPyramid, MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with a declared site at every convolution and at the deconvolution.

    Args:
        input_shape: shape of a pooled region.
        signed_input: whether the pyramid levels can be negative.
        kwargs: see :class:`detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, signed_input: bool, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        del self.conv_norm_relus
        _declare_sites(self, signed_input, prediction=self.predictor)

    def layers(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to logits ``(R, K, 2 S, 2 S)``."""
        with _norms_at_rest(self, x):
            return super().layers(x)


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class QuantKRCNNConvDeconvUpsampleHead(ReadsPyramid, KRCNNConvDeconvUpsampleHead):
    """Detectron2's keypoint head with a declared site at every convolution and at the deconvolution.

    Args:
        input_shape: shape of a pooled region.
        signed_input: whether the pyramid levels can be negative.
        kwargs: see :class:`detectron2.modeling.roi_heads.KRCNNConvDeconvUpsampleHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, signed_input: bool, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        _declare_sites(self, signed_input, prediction=self.score_lowres)

    def layers(self, x: Tensor) -> Tensor:
        """Maps ``(R, C, S, S)`` to logits ``(R, K, 4 S, 4 S)``, of which Detectron2's loss takes views."""
        return super().layers(x).contiguous()  # quantized convolutions may have channels last


@ROI_HEADS_REGISTRY.register()
class QuantStandardROIHeads(StandardROIHeads):
    """Detectron2's heads for regions, whose box predictor has declared sites too.

    They can compute losses on given regions. In calibration, quantizers of the mask and keypoint heads that no
    foreground region of a batch reaches observe its ground-truth boxes, or its proposals where it has none.

    Args:
        kwargs: see :class:`detectron2.modeling.roi_heads.StandardROIHeads`.
    """

    mask_on: bool
    keypoint_on: bool

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.box_on = True

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        predictor = arguments["box_predictor"]
        for layer in (predictor.cls_score, predictor.bbox_pred):
            declare_site(layer, signed=False, role="prediction")
        return arguments

    def keep(self, parts: Sequence[str]) -> None:
        """Leaves out the heads that are not named, see :data:`ROI_PARTS`; only :meth:`losses_on` serves then."""
        if "box" not in parts:
            self.box_on = False
            del self.box_head, self.box_predictor
        if self.mask_on and "mask" not in parts:
            self.mask_on = False
            del self.mask_head
        if self.keypoint_on and "keypoint" not in parts:
            self.keypoint_on = False
            del self.keypoint_head

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See Detectron2's.

        Raises:
            ValueError: in one line, if masks or keypoints are trained and the data have none.
        """
        if not self.training:
            return super().forward(images, features, proposals, targets)
        for is_on, field, key, kind in (
            (self.mask_on, "gt_masks", "MASK_ON", "masks (segmentation)"),
            (self.keypoint_on, "gt_keypoints", "KEYPOINT_ON", "keypoints"),
        ):
            if is_on and any(len(t) and not t.has(field) for t in targets or ()):
                raise ValueError(f"MODEL.{key} is True, but the training images have objects without {kind}")
        sampled, losses = super().forward(images, features, proposals, targets)
        if not torch.is_grad_enabled():
            self._observe_without_foreground(features, sampled, targets or [])
        return sampled, losses

    def losses_on(self, features: dict[str, Tensor], sampled: list[Instances]) -> dict[str, Tensor]:
        """Computes the losses of these heads on regions that others have sampled and matched.

        Args:
            features: levels by name, ``(N, C, H, W)`` each.
            sampled: the regions that the training forward of other heads returned, with a ``StandardROIHeads``' fields.
        """
        losses: dict[str, Tensor] = {}
        if self.box_on:
            losses.update(self._forward_box(features, sampled))
        losses.update(self._forward_mask(features, sampled))
        losses.update(self._forward_keypoint(features, sampled))
        return losses

    @torch.no_grad()
    def _observe_without_foreground(
        self, features: Mapping[str, Tensor], sampled: list[Instances], targets: list[Instances]
    ) -> None:
        foreground, _ = select_foreground_proposals(sampled, self.num_classes)
        branches: list[tuple[Any, Any, list[str], list[Instances]]] = []
        if self.mask_on:
            branches.append((self.mask_head, self.mask_pooler, self.mask_in_features, foreground))
        if self.keypoint_on:
            seen = select_proposals_with_visible_keypoints(foreground) if _count(foreground) else foreground
            branches.append((self.keypoint_head, self.keypoint_pooler, self.keypoint_in_features, seen))
        for head, pooler, names, reached in branches:
            waits = any(not quantizer.is_calibrated for _, quantizer in quantizers(head))
            if not waits or _count(reached):
                continue
            boxes: list[Boxes] = [target.gt_boxes for target in targets]
            if not _count(boxes):
                boxes = [regions.proposal_boxes for regions in sampled]
            head.layers(pooler([features[name] for name in names], boxes))
