"""Evaluation."""

from .classification import TopKEvaluator
from .coco import COCOEvaluator

__all__ = ["COCOEvaluator", "TopKEvaluator"]
