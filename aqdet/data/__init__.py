"""Datasets: the embedded one, declared ones and their check, converters."""

from .embedded import register
from .embedded.scenes import SHAPE_CLASSES, make_shapes
from .formats.voc import convert_voc
from .mappers import build_mapper
from .registry import check_datasets, check_num_classes, complete_num_classes, register_declared

__all__ = [
    "SHAPE_CLASSES",
    "build_mapper",
    "register",
    "check_datasets",
    "check_num_classes",
    "complete_num_classes",
    "convert_voc",
    "make_shapes",
    "register_declared",
]
