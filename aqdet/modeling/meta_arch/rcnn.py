"""Two-stage detectors with a low-precision trunk and heads and a scaffold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ...quantization import name_quantizers
from ..architecture import check_architecture
from ..config_requests import Requests
from ..policy import QuantPolicy
from ..roi_heads import QuantStandardROIHeads
from ..rpn import QuantRPN
from ..scaffold import AuxiliaryPath, Scaffold, Scaffolded, build_auxiliary
from ..scaffold.rcnn_head import AuxiliaryRCNNHead, build_auxiliary_rcnn_head, levels_read

PARTS = {
    ("PROPOSAL_GENERATOR", "NAME"): {"RPN": "QuantRPN"},
    ("RPN", "HEAD_NAME"): {"StandardRPNHead": "QuantRPNHead"},
    ("ROI_HEADS", "NAME"): {"StandardROIHeads": "QuantStandardROIHeads"},
    ("ROI_BOX_HEAD", "NAME"): {"FastRCNNConvFCHead": "QuantFastRCNNConvFCHead"},
    ("ROI_MASK_HEAD", "NAME"): {"MaskRCNNConvUpsampleHead": "QuantMaskRCNNConvUpsampleHead"},
    ("ROI_KEYPOINT_HEAD", "NAME"): {"KRCNNConvDeconvUpsampleHead": "QuantKRCNNConvDeconvUpsampleHead"},
}
"""Keys below ``MODEL`` that name a part, and the parts of Detectron2 that have a form that can be quantized."""


def with_our_parts(cfg: CfgNode) -> CfgNode:
    """Returns a copy of a config whose parts of Detectron2 are named by their forms that can be quantized.

    Raises:
        ValueError: in one line, for proposals or heads for regions that are not those of Faster and Mask R-CNN, naming
            the key and the choices.
    """
    cfg = cfg.clone()
    cfg.defrost()
    for (node, key), forms in PARTS.items():
        cfg.MODEL[node][key] = forms.get(cfg.MODEL[node][key], cfg.MODEL[node][key])
    for (node, key), registry, base in (
        (("PROPOSAL_GENERATOR", "NAME"), PROPOSAL_GENERATOR_REGISTRY, QuantRPN),
        (("ROI_HEADS", "NAME"), ROI_HEADS_REGISTRY, QuantStandardROIHeads),
    ):
        name = cfg.MODEL[node][key]
        if name not in registry or not issubclass(registry.get(name), base):
            choices = ", ".join(name for pair in PARTS[node, key].items() for name in pair)
            raise ValueError(
                f"MODEL.{node}.{key} must be one of {choices} for {cfg.MODEL.META_ARCHITECTURE}, got {name!r}"
            )
    return cfg


def check_two_stage(cfg: CfgNode) -> None:
    """Checks what a two-stage detector needs of a config, before anything is built.

    Raises:
        ValueError: in one line, naming the key and the value.
    """
    with_our_parts(cfg)
    model = cfg.MODEL
    if model.AUX.ENABLED and model.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES must be False with MODEL.AUX.ENABLED, which trains on the regions "
            "that the detector has sampled"
        )
    if model.EXTRA_LOSS.ENABLED:
        raise ValueError(f"MODEL.EXTRA_LOSS.ENABLED must be False: {model.META_ARCHITECTURE} has no extra head")
    for key in ("LOGIT_WEIGHT", "BOX_WEIGHT"):
        if model.DISTILL.ENABLED and model.DISTILL[key]:
            raise ValueError(
                f"MODEL.DISTILL.{key} must be 0 for {model.META_ARCHITECTURE}, of which features are distilled, got "
                f"{model.DISTILL[key]}"
            )


@META_ARCH_REGISTRY.register()
class QuantGeneralizedRCNN(Scaffolded, GeneralizedRCNN):
    """Faster, Mask and Keypoint R-CNN whose backbone, FPN, RPN and heads can be quantized.

    The auxiliary path, if there is one, has an RPN and heads of its own, which are trained on the anchors and regions
    that the detector has sampled. In evaluation, and when it is detached, nothing of it runs.

    Args:
        auxiliary: full-precision path whose head is an
            :class:`~aqdet.modeling.scaffold.rcnn_head.AuxiliaryRCNNHead`, or None.
        requests: keys that the config asks the training to act on; None without a config.
        kwargs: see :class:`detectron2.modeling.GeneralizedRCNN`.
    """

    @configurable
    def __init__(
        self, *, auxiliary: AuxiliaryPath | None = None, requests: Requests | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.scaffold = Scaffold(auxiliary)
        self.requests = requests
        name_quantizers(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds Detectron2's arguments with our forms of the parts that the config names, and the auxiliary path.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        check_architecture(cfg)
        check_two_stage(cfg)
        cfg = with_our_parts(cfg)
        arguments = super().from_config(cfg)
        parts = {name: arguments[name] for name in ("backbone", "proposal_generator", "roi_heads")}
        if cfg.MODEL.QUANT.ENABLED:
            policy = QuantPolicy.from_config(cfg)
            for name in ("proposal_generator", "roi_heads"):
                policy.apply(parts[name], f"{name}.")
            policy.check_rules(nn.ModuleDict(parts))
        auxiliary = None
        if cfg.MODEL.AUX.ENABLED:
            shapes = parts["backbone"].output_shape()
            head = build_auxiliary_rcnn_head(cfg, shapes)
            auxiliary = build_auxiliary(
                cfg,
                head=head,
                backbone=parts["backbone"],
                shapes={name: shapes[name] for name in head.levels},
                head_prefix="",
            )
        return {**arguments, "auxiliary": auxiliary, "requests": Requests.from_config(cfg)}

    @property
    def head_in_features(self) -> list[str]:
        """Names of the levels that the RPN or the heads read, high to low resolution."""
        return levels_read(self.backbone.output_shape(), self.proposal_generator, self.roi_heads)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See Detectron2's; losses of the scaffold are prefixed ``aux_`` and ``distill_``."""
        if self.requests is not None and self.training and torch.is_grad_enabled():
            self.requests.remind()
        if not self.training or (self.auxiliary is None and self.distillation is None):
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [image["instances"].to(self.device) for image in batched_inputs]
        path = self.auxiliary
        with contextlib.nullcontext() if path is None else path.tapping(self.backbone):
            features = self.backbone(images.tensor)
            with self.proposal_generator.keeping_samples() as anchors:
                proposals, rpn_losses = self.proposal_generator(images, features, targets)
            regions, losses = self.roi_heads(images, features, proposals, targets)
            losses.update(rpn_losses)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                self.visualize_training(batched_inputs, proposals)
            if path is not None:
                head = path.head
                assert isinstance(head, AuxiliaryRCNNHead)
                weight = path.weight_at(get_event_storage().iter)
                levels = path.read([features[name] for name in path.levels])
                auxiliary_losses = head.losses(levels, anchors[0], regions)
                losses.update({f"aux_{key}": weight * value for key, value in auxiliary_losses.items()})
        if self.distillation is not None:
            levels = [features[name] for name in self.head_in_features]
            losses.update(self.distillation.losses(images.tensor, levels, [], 1.0))
        return losses

    def layer_calls(self, features: dict[str, Tensor]) -> list[tuple[Callable[[], object], int]]:
        """Lists what runs behind the backbone for an image, as functions, and for how many regions each runs.

        The numbers of regions are the largest: proposals and detections of an image in evaluation and, for the
        auxiliary path, the regions sampled from an image in training.

        Args:
            features: the backbone's features of one image.
        """
        proposals = self.proposal_generator.post_nms_topk[False]
        detections = self.roi_heads.box_predictor.test_topk_per_image
        calls = _calls(self.proposal_generator, self.roi_heads, features, proposals, detections)
        path = self.auxiliary
        if path is not None:
            head = path.head
            assert isinstance(head, AuxiliaryRCNNHead)
            sampled = self.roi_heads.batch_size_per_image
            foreground = int(sampled * self.roi_heads.positive_fraction)
            read = path.read([features[name] for name in path.levels])
            own = dict(zip(path.levels, read, strict=True))
            calls += _calls(head.proposal_generator, head.roi_heads, own, sampled, foreground)
        return calls


def _calls(
    proposal_generator: Any, roi_heads: Any, features: dict[str, Tensor], num_proposals: int, num_detections: int
) -> list[tuple[Callable[[], object], int]]:
    calls: list[tuple[Callable[[], object], int]] = []
    if proposal_generator is not None:
        levels = [features[name] for name in proposal_generator.in_features]
        calls.append((lambda: proposal_generator.rpn_head(levels), 1))
    if roi_heads is None:
        return calls

    def region(kind: str) -> Tensor:
        level = features[getattr(roi_heads, f"{kind}_in_features")[0]]
        return level.new_zeros(1, level.shape[1], *getattr(roi_heads, f"{kind}_pooler").output_size)

    if roi_heads.box_on:
        calls.append((lambda: roi_heads.box_predictor(roi_heads.box_head(region("box"))), num_proposals))
    if roi_heads.mask_on:
        calls.append((lambda: roi_heads.mask_head.layers(region("mask")), num_detections))
    if roi_heads.keypoint_on:
        calls.append((lambda: roi_heads.keypoint_head.layers(region("keypoint")), num_detections))
    return calls
