"""Image classifier with a low-precision trunk and a full-precision auxiliary path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...layers import declare_site
from ...quantization import name_quantizers
from ..config_requests import Requests
from ..policy import quantize_head
from ..scaffold import AuxiliaryPath, Scaffold, Scaffolded, build_auxiliary

FEATURE = "res5"


class ClassifierHead(nn.Module):
    """Global average pooling and a fully connected layer with a declared site.

    Args:
        channels: channels of the feature.
        num_classes: number of logits.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        declare_site(self.linear, signed=False, role="prediction")

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps one ``(N, C, H, W)`` to logits ``(N, K)``."""
        (feature,) = features
        return self.linear(feature.mean(dim=(2, 3)))


@META_ARCH_REGISTRY.register()
class QuantClassifier(Scaffolded, nn.Module):
    """Image classifier whose trunk and head can be quantized, as in the paper of the auxiliary path.

    The auxiliary path aggregates the blocks' sums and ends in pooling and a classifier of its own. In
    evaluation, and when it is detached, nothing of it runs.

    Args:
        backbone: trunk with a ResNet in ``bottom_up``.
        head: maps the list of features to logits.
        auxiliary: full-precision path, or None.
        pixel_mean, pixel_std: means and standard deviations of the channels.
        requests: keys that the config asks the training to act on; None without a config.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        auxiliary: AuxiliaryPath | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        requests: Requests | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.scaffold = Scaffold(auxiliary)
        self.head_in_features = [FEATURE]
        self.requests = requests
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        name_quantizers(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds the arguments from ``MODEL.CLASSIFIER``.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        if FEATURE not in cfg.MODEL.RESNETS.OUT_FEATURES:
            raise ValueError(
                f"MODEL.RESNETS.OUT_FEATURES must have {FEATURE!r}, which is classified, got "
                f"{cfg.MODEL.RESNETS.OUT_FEATURES}"
            )
        backbone = build_backbone(cfg)
        shape = backbone.output_shape()[FEATURE]
        num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
        head = ClassifierHead(shape.channels, num_classes)
        quantize_head(cfg, head, backbone)
        auxiliary = None
        if cfg.MODEL.AUX.ENABLED:
            auxiliary_head = ClassifierHead(shape.channels, num_classes)
            auxiliary = build_auxiliary(cfg, head=auxiliary_head, backbone=backbone, shapes={FEATURE: shape})
        return {
            "backbone": backbone,
            "head": head,
            "auxiliary": auxiliary,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "requests": Requests.from_config(cfg),
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Computes losses in training, class probabilities in evaluation.

        Args:
            batched_inputs: for each image ``image``, uint8 ``(3, H, W)``, all of one size, and in training
                ``label``, an int.

        Returns:
            ``{"loss_cls": ..., "aux_loss_cls": ...}``, or for each image ``{"scores": (K,)}``.
        """
        if self.requests is not None and self.training and torch.is_grad_enabled():
            self.requests.remind()
        device = self.pixel_mean.device
        images = torch.stack([x["image"].to(device) for x in batched_inputs])
        images = (images - self.pixel_mean) / self.pixel_std
        path = self.auxiliary
        if not self.training:
            return [{"scores": scores} for scores in self.head([self.backbone(images)[FEATURE]]).softmax(dim=1)]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=device)
        if path is None:
            return {"loss_cls": F.cross_entropy(self.head([self.backbone(images)[FEATURE]]), labels)}
        weight = path.weight_at(get_event_storage().iter)
        with path.tapping(self.backbone):
            features = [self.backbone(images)[FEATURE]]
            return {
                "loss_cls": F.cross_entropy(self.head(features), labels),
                "aux_loss_cls": weight * F.cross_entropy(path(features), labels),
            }
