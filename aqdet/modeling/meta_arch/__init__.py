"""Meta-architectures, registered with Detectron2."""

from .retinanet import QuantRetinaNet

__all__ = ["QuantRetinaNet"]
