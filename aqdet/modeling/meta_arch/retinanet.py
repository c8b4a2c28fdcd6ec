"""RetinaNet with a low-precision trunk and head and a full-precision auxiliary path."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from ..heads import QuantRetinaNetHead
from .dense import LowPrecisionDense


@META_ARCH_REGISTRY.register()
class QuantRetinaNet(LowPrecisionDense, RetinaNet):
    """RetinaNet (1708.02002) whose backbone, FPN and head can be quantized.

    Args:
        kwargs: see :class:`LowPrecisionDense` and :class:`detectron2.modeling.RetinaNet`.
    """

    head_class = QuantRetinaNetHead
    node = "RETINANET"

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Builds Detectron2's arguments, with our head and the scaffold.

        Raises:
            ValueError: in one line, for a config value that is not valid, naming its key.
        """
        theirs = cfg.clone()
        if cfg.MODEL.RETINANET.NORM == "GN":  # which the head that is built here, and replaced, does not take
            theirs.defrost()
            theirs.MODEL.RETINANET.NORM = ""
        arguments = super().from_config(theirs)
        return {**arguments, **cls.build_heads(cfg, arguments["backbone"])}
