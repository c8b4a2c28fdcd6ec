"""aqdet: object detectors at 4 bits and below, on Detectron2.

Importing the package registers its backbones, meta-architectures and embedded dataset with Detectron2.
"""

from . import data, modeling
from .config import add_aqdet_config, load_config

__version__ = "0.1.0"

__all__ = ["add_aqdet_config", "data", "load_config", "modeling"]
