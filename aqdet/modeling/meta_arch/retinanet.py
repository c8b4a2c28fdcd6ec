"""RetinaNet with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..auxiliary import AuxiliaryPath, build_auxiliary
from ..heads import QuantRetinaNetHead
from ..policy import QuantPolicy


@META_ARCH_REGISTRY.register()
class QuantRetinaNet(RetinaNet):
    """RetinaNet (1708.02002) whose backbone, FPN and head can be quantized.

    In training the auxiliary path, if there is one, reads the pyramid levels; its predictions get the losses
    of the main head, on the same matched anchors and with the same normalizer, which moves once an iteration.
    In evaluation it does not run.

    Args:
        auxiliary: the path, or None.
        kwargs: see :class:`detectron2.modeling.RetinaNet`.
    """

    auxiliary: AuxiliaryPath | None

    @configurable
    def __init__(self, *, auxiliary: AuxiliaryPath | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.auxiliary = auxiliary
        self._normalizer_held = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Detectron2's arguments with our head and the auxiliary path.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        levels = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        head = QuantRetinaNetHead(cfg, levels)
        arguments["head"] = head
        if cfg.MODEL.QUANT.ENABLED:
            policy = QuantPolicy.from_config(cfg)
            policy.apply(head, "head.")
            policy.check_rules(nn.ModuleDict({key: arguments[key] for key in ("backbone", "head")}))
        arguments["auxiliary"] = cls._build_auxiliary(cfg, levels)
        return arguments

    @classmethod
    def _build_auxiliary(cls, cfg: CfgNode, levels: list[ShapeSpec]) -> AuxiliaryPath | None:
        if not cfg.MODEL.AUX.ENABLED:
            return None
        head_cfg = cfg.clone()
        head_cfg.defrost()
        head_cfg.MODEL.RETINANET.NORM = cfg.MODEL.AUX.NORM
        head = RetinaNetHead(head_cfg, levels)
        return build_auxiliary(cfg, head=head, channels=[level.channels for level in levels])

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Losses of the main head and, prefixed ``aux_``, of the auxiliary head.

        Args:
            images: the batch.
            features: one ``(N, C, H, W)`` for each level.
            predictions: of the main head.
            gt_instances: N ground truths.
        """
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)

        def losses_of(outputs: list[list[Tensor]]) -> dict[str, Tensor]:
            logits, deltas = self._transpose_dense_predictions(outputs, [self.num_classes, 4])
            return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)

        losses = losses_of(predictions)
        if self.auxiliary is not None:
            weight = self.auxiliary.weight_at(get_event_storage().iter)
            with self._hold_normalizer():
                auxiliary_losses = losses_of(self.auxiliary(features))
            losses.update({f"aux_{key}": weight * v for key, v in auxiliary_losses.items()})
        return losses

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
