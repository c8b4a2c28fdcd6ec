"""Meta-architectures, registered with Detectron2."""

from .fcos import QuantFCOS
from .retinanet import QuantRetinaNet

__all__ = ["QuantFCOS", "QuantRetinaNet"]
