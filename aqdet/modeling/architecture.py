"""The meta-architectures that can be quantized, and what a config asks of another one."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

COUNTERPARTS = {
    "build_resnet_backbone": "build_quant_resnet_backbone",
    "build_resnet_fpn_backbone": "build_quant_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_quant_retinanet_resnet_fpn_backbone",
}
"""Detectron2's backbones that can be quantized under another name."""


def our_architectures() -> list[str]:
    """Lists the names for ``MODEL.META_ARCHITECTURE`` that can be quantized."""
    return sorted(name for name, _ in META_ARCH_REGISTRY if name.startswith("Quant"))


def check_architecture(cfg: CfgNode) -> None:
    """Checks that a config that asks for quantization or an auxiliary path names a meta-architecture with it.

    Called wherever a detector is built with a backbone of ours, whoever builds it: Detectron2's ``RetinaNet`` over a
    quantized backbone would train with its head in float.

    Raises:
        ValueError: in one line, naming the key and the choices.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        return  # built by hand, or refused by Detectron2
    bases = getattr(META_ARCH_REGISTRY.get(name), "__mro__", ())
    if not any(base.__module__.startswith("aqdet.") for base in bases):
        for key in ("QUANT", "AUX", "EXTRA_LOSS", "DISTILL"):
            if cfg.MODEL[key].ENABLED:
                raise ValueError(
                    f"MODEL.{key}.ENABLED is True, but MODEL.META_ARCHITECTURE {name!r} is Detectron2's and would "
                    f"leave its head in float: use one of {', '.join(our_architectures())}"
                )
    backbone = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.QUANT.ENABLED and backbone in COUNTERPARTS:
        raise ValueError(
            f"MODEL.QUANT.ENABLED is True, but MODEL.BACKBONE.NAME {backbone!r} is Detectron2's and would stay in "
            f"float: use {COUNTERPARTS[backbone]}"
        )
