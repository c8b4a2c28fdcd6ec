"""The common part of dense detectors with a low-precision trunk and head and a scaffold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...quantization import name_quantizers
from ..config_requests import Requests
from ..policy import quantize_head
from ..scaffold import AuxiliaryPath, Scaffold, Scaffolded, build_auxiliary, build_extra_head


class LowPrecisionDense(Scaffolded, DenseDetector):
    """Mixin before a dense detector of Detectron2's.

    In training the auxiliary path, if there is one, reads the trunk; its predictions get the losses of the main
    head, on the same matched targets and with the same normalizer, which moves once an iteration. So do those of
    an extra head, and a teacher adds losses of its own. In evaluation, and when they are detached, nothing of them
    runs.

    Args:
        auxiliary, extra_head, extra_loss_weight: see :class:`~aqdet.modeling.scaffold.Scaffold`.
        requests: keys that the config asks the training to act on; None without a config.
        kwargs: arguments of the detector.

    Attributes:
        normalizer_moves: False while the losses of a further head are computed, which are divided by the same moving
            average as those of the detector's head.
    """

    head_class: type[nn.Module]
    """Its constructor takes a config and a list of ``ShapeSpec``; its convolutions have declared sites."""
    node: str
    """Name of the detector's node under ``MODEL``, which has ``NORM`` and ``IN_FEATURES``."""

    def __init__(
        self,
        *,
        auxiliary: AuxiliaryPath | None = None,
        extra_head: nn.Module | None = None,
        extra_loss_weight: float = 1.0,
        requests: Requests | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalizer_moves = True
        self.scaffold = Scaffold(auxiliary, extra_head, extra_loss_weight)
        self.requests = requests
        name_quantizers(self)

    @classmethod
    def build_heads(cls, cfg: CfgNode, backbone: Backbone) -> dict[str, Any]:
        """Builds the arguments ``head`` and ``extra_head``, quantized if ``MODEL.QUANT`` is enabled, and ``auxiliary``.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        shapes = {name: backbone.output_shape()[name] for name in cfg.MODEL[cls.node].IN_FEATURES}
        levels = list(shapes.values())
        head = cls.head_class(cfg, levels)
        quantize_head(cfg, head, backbone)
        auxiliary = None
        if cfg.MODEL.AUX.ENABLED:
            head_cfg = cfg.clone()
            head_cfg.defrost()
            head_cfg.MODEL[cls.node].NORM = cfg.MODEL.AUX.NORM
            auxiliary_head = cls.head_class(head_cfg, levels)
            auxiliary = build_auxiliary(cfg, head=auxiliary_head, backbone=backbone, shapes=shapes)
        extra_head = None
        if cfg.MODEL.EXTRA_LOSS.ENABLED:
            extra_head = build_extra_head(cfg, cls.head_class(cfg, levels))
        return {
            "head": head,
            "auxiliary": auxiliary,
            "extra_head": extra_head,
            "extra_loss_weight": cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT,
            "requests": Requests.from_config(cfg),
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See Detectron2's."""
        if self.requests is not None and self.training and torch.is_grad_enabled():
            self.requests.remind()
        if self.auxiliary is None or not self.training:
            return super().forward(batched_inputs)
        with self.auxiliary.tapping(self.backbone):
            return super().forward(batched_inputs)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Computes the losses of the main head and, prefixed ``aux_``, ``extra_`` and ``distill_``, of the scaffold.

        Args:
            images: the batch.
            features: one ``(N, C, H, W)`` for each level.
            predictions: predictions of the main head: class logits, box deltas and, of some FCOS, centerness.
            gt_instances: N ground truths.
        """
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)

        scaffold = self.scaffold
        heads, factors = {"": predictions}, {"": 1.0}
        if scaffold.auxiliary is not None:
            heads["aux_"] = scaffold.auxiliary(features)
            factors["aux_"] = scaffold.auxiliary.weight_at(get_event_storage().iter)
        if scaffold.extra_head is not None:
            heads["extra_"] = scaffold.extra_head(features)
            factors["extra_"] = scaffold.extra_loss_weight
        outputs = [self.by_anchor(head) for head in heads.values()]
        if len(outputs) == 1:
            logits, deltas, *rest = outputs[0]
            all_losses = [self.losses(anchors, logits, gt_labels, deltas, gt_boxes, *rest)]
        else:
            all_losses = self.losses_of_heads(anchors, gt_labels, gt_boxes, outputs)
        losses: dict[str, Tensor] = {}
        for prefix, found in zip(heads, all_losses, strict=True):
            losses.update({prefix + key: factors[prefix] * value if prefix else value for key, value in found.items()})
        if scaffold.distillation is not None:
            normalizer = self.loss_normalizer / comm.get_world_size()
            losses.update(scaffold.distillation.losses(images.tensor, features, outputs[0], normalizer))
        return losses

    def by_anchor(self, predictions: list[list[Tensor]]) -> list[list[Tensor]]:
        """Lays out the predictions of a head, ``(N, A K, H, W)`` for each level, as ``(N, H W A, K)``."""
        sizes = [self.num_classes, 4, 1][: len(predictions)]
        return self._transpose_dense_predictions(predictions, sizes)

    def losses_of_heads(
        self, anchors: list[Boxes], gt_labels: list[Tensor], gt_boxes: list[Any], heads: Sequence[list[list[Tensor]]]
    ) -> list[dict[str, Tensor]]:
        """Computes Detectron2's ``losses`` for each of several heads, with one normalizer, which moves once.

        Args:
            anchors: boxes of each level.
            gt_labels, gt_boxes: the results of Detectron2's ``label_anchors``, for each image.
            heads: predictions of each head, see :meth:`by_anchor`.
        """
        losses: list[dict[str, Tensor]] = []
        for logits, deltas, *rest in heads:
            self.normalizer_moves = not losses
            try:
                losses.append(self.losses(anchors, logits, gt_labels, deltas, gt_boxes, *rest))
            finally:
                self.normalizer_moves = True
        return losses

    def has_own(self, losses: Callable[..., Any]) -> bool:
        """Returns whether ``losses`` is this detector's method of that name, and not one that somebody put over it."""
        return getattr(self.losses, "__func__", None) is losses

    def normalizer(self, num_positive: int, num_images: int, initial: float) -> float:
        """Moves the moving average of the loss normalizer by a batch, and returns it.

        Args:
            num_positive: anchors with an object in this process's images.
            num_images: this process's images.
            initial: where Detectron2's detector has its average start.
        """
        get_event_storage().put_scalar("num_pos_anchors", num_positive / num_images)
        return self._ema_update("loss_normalizer", max(num_positive, 1), initial)

    def _ema_update(self, name: str, value: float, *args: Any, **kwargs: Any) -> float:
        """Moves the moving average by the whole batch's value; returns each process's share of it.

        Deviation: in Detectron2 each process averages its own value, from its own start, and a batch that is
        spread over processes has other gradients than in one. Here they are the same, if each process has a
        positive anchor. Without gradients, as in calibration, processes do not wait for each other.
        """
        world_size = comm.get_world_size()
        if self.normalizer_moves:
            if world_size > 1 and torch.is_grad_enabled():
                total = torch.tensor(float(value), device=self.device)
                dist.all_reduce(total)
                value = total.item()
            super()._ema_update(name, value, *args, **kwargs)
        return getattr(self, name) / world_size
