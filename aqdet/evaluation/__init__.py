"""Evaluation."""

from .classification import TopKEvaluator
from .coco import COCOEvaluator, fill_in

__all__ = ["COCOEvaluator", "TopKEvaluator", "fill_in"]
