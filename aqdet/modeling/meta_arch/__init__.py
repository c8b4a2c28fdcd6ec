"""Meta-architectures, registered with Detectron2."""

from .classifier import QuantClassifier
from .fcos import QuantFCOS
from .rcnn import QuantGeneralizedRCNN
from .retinanet import QuantRetinaNet

__all__ = ["QuantClassifier", "QuantFCOS", "QuantGeneralizedRCNN", "QuantRetinaNet"]
