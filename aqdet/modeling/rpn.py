"""Region proposal network whose head can be quantized.

Shape legend: N images, R anchors of all levels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes
from torch import Tensor, nn

from ..layers import declare_site, shared_weights
from .heads import ReadsPyramid


class SampledAnchors(NamedTuple):
    """The anchors of a training step and what they are trained on.

    Attributes:
        anchors: one ``Boxes`` for each level.
        labels: one ``(R,)`` for each image: 1 object, 0 background, -1 not sampled.
        boxes: the matched boxes, one ``(R, 4)`` for each image.
    """

    anchors: list[Boxes]
    labels: list[Tensor]
    boxes: list[Tensor]


@RPN_HEAD_REGISTRY.register()
class QuantRPNHead(ReadsPyramid, StandardRPNHead):
    """Detectron2's RPN head with a declared site at every convolution.

    Args:
        signed_input: whether the pyramid levels can be negative.
        kwargs: see :class:`detectron2.modeling.proposal_generator.rpn.StandardRPNHead`.
    """

    @configurable
    def __init__(self, *, signed_input: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        signed = signed_input
        for layer in self.conv.modules():
            if isinstance(layer, nn.Conv2d):
                declare_site(layer, signed=signed)
                signed = False
        for layer in (self.objectness_logits, self.anchor_deltas):
            declare_site(layer, signed=False, role="prediction")

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See Detectron2's; the weights, shared over the levels, are quantized once."""
        with shared_weights(self):
            return super().forward(features)


@PROPOSAL_GENERATOR_REGISTRY.register()
class QuantRPN(RPN):
    """Detectron2's RPN, which can hand on the anchors that it sampled, and compute losses on given ones.

    Args:
        kwargs: see :class:`detectron2.modeling.proposal_generator.RPN`.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._kept: list[SampledAnchors] | None = None  # inside keeping_samples()

    @contextlib.contextmanager
    def keeping_samples(self) -> Iterator[list[SampledAnchors]]:
        """Lists what the training forward passes inside the context have sampled."""
        self._kept = []
        try:
            yield self._kept
        finally:
            self._kept = None

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See Detectron2's."""
        if self._kept is not None:
            self._kept.append(SampledAnchors(anchors, gt_labels, gt_boxes))
        return super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)

    def losses_on(self, features: Mapping[str, Tensor], sampled: SampledAnchors) -> dict[str, Tensor]:
        """Computes the losses of this network's own predictions on anchors that another one has sampled.

        Args:
            features: levels by name, ``(N, C, H, W)`` each.
            sampled: anchors of levels of these sizes.
        """
        logits, deltas = self.rpn_head([features[name] for name in self.in_features])
        box_dim = self.anchor_generator.box_dim
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas]
        return self.losses(sampled.anchors, logits, sampled.labels, deltas, sampled.boxes)
