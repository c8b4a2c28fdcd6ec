"""The low-precision detector: backbone, heads, policy, auxiliary path, meta-architectures."""

from .backbone import (
    QuantFPN,
    build_quant_classifier_backbone,
    build_quant_resnet_backbone,
    build_quant_resnet_fpn_backbone,
    build_quant_retinanet_resnet_fpn_backbone,
)
from .heads import QuantFCOSHead, QuantRetinaNetHead
from .meta_arch import QuantClassifier, QuantFCOS, QuantGeneralizedRCNN, QuantRetinaNet
from .policy import QuantPolicy, quantizable_layers
from .roi_heads import (
    QuantFastRCNNConvFCHead,
    QuantKRCNNConvDeconvUpsampleHead,
    QuantMaskRCNNConvUpsampleHead,
    QuantStandardROIHeads,
)
from .rpn import QuantRPN, QuantRPNHead
from .scaffold import AuxiliaryPath, strip, without_scaffold

__all__ = [
    "AuxiliaryPath",
    "QuantClassifier",
    "QuantFCOS",
    "QuantFCOSHead",
    "QuantFPN",
    "QuantGeneralizedRCNN",
    "QuantFastRCNNConvFCHead",
    "QuantKRCNNConvDeconvUpsampleHead",
    "QuantMaskRCNNConvUpsampleHead",
    "QuantPolicy",
    "QuantRetinaNet",
    "QuantRPN",
    "QuantRPNHead",
    "QuantRetinaNetHead",
    "QuantStandardROIHeads",
    "build_quant_classifier_backbone",
    "build_quant_resnet_backbone",
    "build_quant_resnet_fpn_backbone",
    "build_quant_retinanet_resnet_fpn_backbone",
    "without_scaffold",
    "quantizable_layers",
    "strip",
]
