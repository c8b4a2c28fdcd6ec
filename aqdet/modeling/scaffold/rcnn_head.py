"""The heads of the auxiliary path of a two-stage detector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..roi_heads import ROI_PARTS, QuantStandardROIHeads
from ..rpn import QuantRPN, SampledAnchors


def levels_read(names: Iterable[str], proposal_generator: QuantRPN | None, roi_heads: Any) -> list[str]:
    """Returns those of the names whose levels an RPN or heads for regions read, in their order; None reads nothing."""
    read = set() if proposal_generator is None else set(proposal_generator.in_features)
    for part in ROI_PARTS:
        if roi_heads is not None and getattr(roi_heads, f"{part}_on"):
            read |= set(getattr(roi_heads, f"{part}_in_features"))
    return [name for name in names if name in read]


NORMED_HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
"""Nodes of heads whose convolutions can have a norm."""


class AuxiliaryRCNNHead(nn.Module):
    """Full-precision RPN and heads for regions, trained on what the detector has sampled.

    Nothing is sampled, and no proposals are made, here: anchors and regions are the detector's own. Regions are
    pooled from the path's levels.

    Args:
        proposal_generator: RPN in float, or None.
        roi_heads: heads for regions in float, or None.
        levels: names of the levels that they read.
    """

    def __init__(
        self, *, proposal_generator: QuantRPN | None, roi_heads: QuantStandardROIHeads | None, levels: list[str]
    ) -> None:
        super().__init__()
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.levels = levels

    def losses(self, levels: list[Tensor], anchors: SampledAnchors, regions: list[Instances]) -> dict[str, Tensor]:
        """Computes the losses of Detectron2's two-stage detectors on the path's levels.

        Detectron2's other scalars, such as the accuracy, are logged under ``aux/``.

        Args:
            levels: ``(N, C, H, W)`` each, in the order of the names given.
            anchors: sampled by the detector's RPN.
            regions: sampled and matched by the detector's heads.
        """
        features = dict(zip(self.levels, levels, strict=True))
        losses: dict[str, Tensor] = {}
        with get_event_storage().name_scope("aux"):
            if self.roi_heads is not None:
                losses.update(self.roi_heads.losses_on(features, regions))
            if self.proposal_generator is not None:
                losses.update(self.proposal_generator.losses_on(features, anchors))
        return losses


def build_auxiliary_rcnn_head(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> AuxiliaryRCNNHead:
    """Builds the heads that ``MODEL.AUX.RPN`` and ``MODEL.AUX.ROI_HEADS`` choose.

    A head for regions whose convolutions have a norm in the detector has ``MODEL.AUX.NORM`` here.

    Args:
        cfg: config that names heads of ours.
        shapes: the features of the backbone, by name.

    Raises:
        ValueError: in one line, for a head that does not exist or that the detector does not have, or none at all.
    """
    aux, model = cfg.MODEL.AUX, cfg.MODEL
    parts = list(aux.ROI_HEADS)
    unknown = [part for part in parts if part not in ROI_PARTS]
    if unknown:
        raise ValueError(f"MODEL.AUX.ROI_HEADS must be of {', '.join(ROI_PARTS)}, got {parts}")
    has = {"box": True, "mask": model.MASK_ON, "keypoint": model.KEYPOINT_ON}
    parts = [part for part in parts if has[part]]
    if not parts and not aux.RPN:
        raise ValueError(
            f"MODEL.AUX.ENABLED is True, but MODEL.AUX.RPN is False and MODEL.AUX.ROI_HEADS {list(aux.ROI_HEADS)} "
            f"has none of the detector's heads, which are {', '.join(part for part in ROI_PARTS if has[part])}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.VIS_PERIOD = 0
    for name in NORMED_HEADS:
        if cfg.MODEL[name].NORM:
            cfg.MODEL[name].NORM = aux.NORM
    roi_heads = None
    if parts:
        roi_heads = QuantStandardROIHeads(cfg, shapes)
        roi_heads.keep(parts)
    proposal_generator = QuantRPN(cfg, shapes) if aux.RPN else None
    return AuxiliaryRCNNHead(
        proposal_generator=proposal_generator,
        roi_heads=roi_heads,
        levels=levels_read(shapes, proposal_generator, roi_heads),
    )
