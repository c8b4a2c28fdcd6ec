"""A check of configs for what would keep a detector that is trained with them from being exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ..layers import Site
from ..quantization.spec import MAX_BITS
from .backbone import BLOCKS_PER_STAGE, STAGES
from .meta_arch.classifier import QuantClassifier
from .meta_arch.dense import LowPrecisionDense
from .meta_arch.rcnn import QuantGeneralizedRCNN
from .policy import QuantPolicy
from .regnet import SIZES

NOT_UNIFORM = ("lqnet", "n2uq")
"""Methods whose codes are no multiples of one step: they train and evaluate, and have no integer form."""
NOT_FOLDED = ("GN", "LN")
"""Norms that depend on the image in evaluation too, and so do not fold into a convolution's integers."""


def export_obstacles(cfg: CfgNode) -> list[str]:
    """Lists what the export would refuse after a training, from the config alone.

    With quantization disabled only what a quantized training takes over from the float detector counts.

    Args:
        cfg: valid; of a meta-architecture that is not aqdet's there is nothing to say.

    Returns:
        One line for each obstacle, with its key and the way out.

    Raises:
        ValueError: in one line, for a malformed rule of ``MODEL.QUANT.RULES``.
    """
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    quantized = cfg.MODEL.QUANT.ENABLED
    if issubclass(architecture, QuantClassifier):
        return [f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: image classifiers have no export"] * quantized
    if issubclass(architecture, QuantGeneralizedRCNN):
        nodes = ["RESNETS", "FPN", "ROI_BOX_HEAD", *["ROI_MASK_HEAD"] * cfg.MODEL.MASK_ON]
        found = [*_input(cfg), *_norms(cfg, nodes)]
        return [*found, *_methods(cfg), *_groups(cfg), *_anchors(cfg), *_regions(cfg)] if quantized else found
    if not issubclass(architecture, LowPrecisionDense):
        return []
    found = [*_input(cfg), *_norms(cfg, ["RESNETS", "FPN", architecture.node])]
    if quantized:
        found += [*_methods(cfg), *_groups(cfg), *(_anchors(cfg) if architecture.node == "RETINANET" else ())]
    return found


def _input(cfg: CfgNode) -> Iterator[str]:
    deviations = [float(value) for value in cfg.MODEL.PIXEL_STD]
    if len(set(deviations)) > 1:
        mean = round(sum(deviations) / len(deviations), 3)
        yield (
            f"MODEL.PIXEL_STD {deviations} differs by channel, and a uint8 image has one scale: use one value for all, "
            f"as {[mean] * len(deviations)}, from the full-precision start on"
        )


def _norms(cfg: CfgNode, nodes: Sequence[str]) -> Iterator[str]:
    for name in nodes:
        if cfg.MODEL[name].NORM in NOT_FOLDED:
            yield f"MODEL.{name}.NORM {cfg.MODEL[name].NORM} does not fold into integers: use BN, SyncBN or FrozenBN"


def _methods(cfg: CfgNode) -> Iterator[str]:
    quant = cfg.MODEL.QUANT
    methods = {
        "WEIGHT.QUANTIZER": quant.WEIGHT.QUANTIZER,
        "INPUT.QUANTIZER": quant.INPUT.QUANTIZER,
        "RESIDUAL_QUANTIZER": quant.RESIDUAL_QUANTIZER,
    }
    for index, rule in enumerate(QuantPolicy.from_config(cfg).rules):
        name = f"RULES[{index}] {rule.pattern.pattern!r}"
        if rule.overrides.get("ENABLED") is False:
            yield f"MODEL.QUANT.{name} leaves layers in float: an exported detector runs on integers alone"
        for key in ("WEIGHT.QUANTIZER", "INPUT.QUANTIZER"):
            if key in rule.overrides:
                methods[f"{name}: {key}"] = rule.overrides[key]
    for key, method in methods.items():
        if method in NOT_UNIFORM:
            yield f"MODEL.QUANT.{key} {method} has no integer form: it trains and evaluates; use lsq, pact or dorefa"


def _groups(cfg: CfgNode) -> Iterator[str]:
    """Yields the problem of grouped convolutions at 8 bits, whose sums x86 without VNNI does not compute exactly.

    It adds two products in 16 bits. The export splits the weights of other convolutions so that these sums fit.
    """
    resnets = cfg.MODEL.RESNETS
    blocks: Sequence[int] = ()
    if resnets.REGNETX in SIZES:
        blocks = SIZES[resnets.REGNETX].depths
    elif resnets.DEPTH >= 50 and resnets.NUM_GROUPS > 1:
        blocks = BLOCKS_PER_STAGE.get(resnets.DEPTH, ())
    policy, names = QuantPolicy.from_config(cfg), []
    for stage, number in zip(STAGES, blocks, strict=False):
        for name in (f"backbone.bottom_up.{stage}.{index}.conv2" for index in range(number)):
            specs = policy.specs(name, Site(signed=False))
            if specs is not None and all(spec is not None and spec.num_bits == MAX_BITS for spec in specs):
                names.append(name)
    if names:
        others = f" and {len(names) - 1} more have" if len(names) > 1 else " has"
        yield (
            f"layer {names[0]}{others} groups, and weights and inputs of {MAX_BITS} bits, which "
            "are not exact on every x86: use 7 bits there, as MODEL.QUANT.RULES [['bottom_up.res.*conv2', "
            "{'WEIGHT.NUM_BITS': 7}]]"
        )


def _anchors(cfg: CfgNode) -> Iterator[str]:
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    if name != "DefaultAnchorGenerator":
        yield f"MODEL.ANCHOR_GENERATOR.NAME {name}: the export knows DefaultAnchorGenerator"


def _regions(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.KEYPOINT_ON:
        yield "MODEL.KEYPOINT_ON True: keypoints have no integer form here, boxes and masks have"
    for node in ["ROI_BOX_HEAD", *["ROI_MASK_HEAD"] * cfg.MODEL.MASK_ON]:
        if cfg.MODEL[node].POOLER_TYPE != "ROIAlignV2":
            yield f"MODEL.{node}.POOLER_TYPE {cfg.MODEL[node].POOLER_TYPE}: the export knows ROIAlignV2"
