"""Evaluators by dataset, of a model and through an exported folder."""

from .build import build_evaluator, check_evaluator
from .classification import TopKEvaluator
from .coco import COCOEvaluator, check_coco_eval, fill_in
from .lvis import LVISEvaluator

__all__ = [
    "COCOEvaluator",
    "LVISEvaluator",
    "TopKEvaluator",
    "build_evaluator",
    "check_coco_eval",
    "check_evaluator",
    "fill_in",
]
