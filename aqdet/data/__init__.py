"""Datasets: the embedded one, declared ones and their check, converters."""

from . import builtin
from .classification import build_mapper
from .declared import check_datasets, check_num_classes, complete_num_classes, register_declared
from .shapes import SHAPE_CLASSES, make_shapes
from .voc import convert_voc

__all__ = [
    "SHAPE_CLASSES",
    "build_mapper",
    "builtin",
    "check_datasets",
    "check_num_classes",
    "complete_num_classes",
    "convert_voc",
    "make_shapes",
    "register_declared",
]
