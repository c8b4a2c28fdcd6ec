"""What dense detectors with a low-precision trunk and head and an auxiliary path share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...layers import forget_sites
from ...quantization import name_quantizers
from ..backbone import tapped_sums
from ..policy import QuantPolicy
from ..scaffold.auxiliary import AuxiliaryPath, build_auxiliary
from ..scaffold.distillation import Distillation


class LowPrecisionDense(DenseDetector):
    """Mixin before a dense detector of Detectron2's.

    In training the auxiliary path, if there is one, reads the trunk; its predictions get the losses of the main
    head, on the same matched targets and with the same normalizer, which moves once an iteration. So do those of
    an extra head, and a teacher adds losses of its own. In evaluation, and when they are detached, nothing of them
    runs.

    Args:
        auxiliary: the path, or None.
        extra_head: the extra head, or None.
        extra_loss_weight: factor of its losses.
        kwargs: of the detector.

    Attributes:
        distillation: the teacher, which who trains attaches; None until then.
    """

    head_class: type[nn.Module]
    """Its constructor takes a config and a list of ``ShapeSpec``; its convolutions have declared sites."""
    node: str
    """Name of the detector's node under ``MODEL``, which has ``NORM`` and ``IN_FEATURES``."""

    auxiliary: AuxiliaryPath | None
    extra_head: nn.Module | None
    distillation: Distillation | None

    def __init__(
        self,
        *,
        auxiliary: AuxiliaryPath | None = None,
        extra_head: nn.Module | None = None,
        extra_loss_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.auxiliary = auxiliary
        self.extra_head = extra_head
        self.extra_loss_weight = extra_loss_weight
        self.distillation = None
        name_quantizers(self)
        self._normalizer_held = False
        self._sums: list[Tensor] = []  # of a forward in progress, which hands forward_training the features only

    @classmethod
    def build_heads(cls, cfg: CfgNode, backbone: Backbone) -> dict[str, Any]:
        """The arguments ``head`` and ``extra_head``, quantized if ``MODEL.QUANT`` is enabled, and ``auxiliary``.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        shapes = {name: backbone.output_shape()[name] for name in cfg.MODEL[cls.node].IN_FEATURES}
        levels = list(shapes.values())
        head = cls.head_class(cfg, levels)
        if cfg.MODEL.QUANT.ENABLED:
            policy = QuantPolicy.from_config(cfg)
            policy.apply(head, "head.")
            policy.check_rules(nn.ModuleDict({"backbone": backbone, "head": head}))
        auxiliary = None
        if cfg.MODEL.AUX.ENABLED:
            head_cfg = cfg.clone()
            head_cfg.defrost()
            head_cfg.MODEL[cls.node].NORM = cfg.MODEL.AUX.NORM
            auxiliary_head = cls.head_class(head_cfg, levels)
            auxiliary = build_auxiliary(cfg, head=auxiliary_head, backbone=backbone, shapes=shapes)
        extra_head = None
        if cfg.MODEL.EXTRA_LOSS.ENABLED:
            extra_head = _build_extra_head(cfg, cls.head_class(cfg, levels))
        return {
            "head": head,
            "auxiliary": auxiliary,
            "extra_head": extra_head,
            "extra_loss_weight": cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See Detectron2's."""
        path = self.auxiliary
        if path is None or not path.reads_sums or not self.training:
            return super().forward(batched_inputs)
        with tapped_sums(self.backbone.bottom_up) as self._sums:
            try:
                return super().forward(batched_inputs)
            finally:
                self._sums = []

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Losses of the main head and, prefixed ``aux_``, ``extra_`` and ``distill_``, of what training has beside it.

        Args:
            images: the batch.
            features: one ``(N, C, H, W)`` for each level.
            predictions: of the main head: class logits, box deltas and, for FCOS, centerness.
            gt_instances: N ground truths.
        """
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)

        def losses_of(outputs: list[list[Tensor]]) -> dict[str, Tensor]:
            logits, deltas, *rest = self.by_anchor(outputs)
            return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, *rest)

        losses = losses_of(predictions)
        if self.auxiliary is not None:
            weight = self.auxiliary.weight_at(get_event_storage().iter)
            with self._hold_normalizer():
                auxiliary_losses = losses_of(self.auxiliary(features, self._sums))
            losses.update({f"aux_{key}": weight * v for key, v in auxiliary_losses.items()})
        if self.extra_head is not None:
            with self._hold_normalizer():
                extra_losses = losses_of(self.extra_head(features))
            losses.update({f"extra_{key}": self.extra_loss_weight * v for key, v in extra_losses.items()})
        if self.distillation is not None:
            normalizer = self.loss_normalizer / comm.get_world_size()
            by_anchor = self.by_anchor(predictions)
            losses.update(self.distillation.losses(images.tensor, features, by_anchor, normalizer))
        return losses

    def by_anchor(self, predictions: list[list[Tensor]]) -> list[list[Tensor]]:
        """Predictions of a head, ``(N, A K, H, W)`` for each level, as ``(N, H W A, K)``."""
        sizes = [self.num_classes, 4, 1][: len(predictions)]
        return self._transpose_dense_predictions(predictions, sizes)

    @contextlib.contextmanager
    def _hold_normalizer(self) -> Iterator[None]:
        """Keeps the moving average of the loss normalizer where it is."""
        self._normalizer_held = True
        try:
            yield
        finally:
            self._normalizer_held = False

    def _ema_update(self, name: str, value: float, *args: Any, **kwargs: Any) -> float:
        """The moving average of the whole batch's value, as each process's share.

        Deviation: in Detectron2 each process averages its own value, from its own start, and a batch that is
        spread over processes has other gradients than in one. Here they are the same, if each process has a
        positive anchor. Without gradients, as in calibration, processes do not wait for each other.
        """
        world_size = comm.get_world_size()
        if not self._normalizer_held:
            if world_size > 1 and torch.is_grad_enabled():
                total = torch.tensor(float(value), device=self.device)
                dist.all_reduce(total)
                value = total.item()
            super()._ema_update(name, value, *args, **kwargs)
        return getattr(self, name) / world_size


def _build_extra_head(cfg: CfgNode, head: nn.Module) -> nn.Module:
    """Makes a fresh head the extra one of ``MODEL.EXTRA_LOSS``, with the quantizers of the detector's own.

    All of it is quantized as the detector's head is: an extra loss with a full-precision head would be an auxiliary
    path without adaptors, and leave open whether the loss helps or the precision. It keeps its random weights.

    Raises:
        ValueError: for a negative ``LOSS_WEIGHT``.
    """
    if not cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT >= 0:
        raise ValueError(f"MODEL.EXTRA_LOSS.LOSS_WEIGHT must not be negative, got {cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT}")
    if cfg.MODEL.QUANT.ENABLED:
        QuantPolicy.from_config(cfg).apply(head, "head.")  # its rules are those of the detector's head
    forget_sites(head)
    return head
