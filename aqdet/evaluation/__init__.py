"""COCO AP, of a model and through an exported folder."""

from .classification import TopKEvaluator
from .coco import COCOEvaluator, check_coco_eval, fill_in

__all__ = ["COCOEvaluator", "TopKEvaluator", "check_coco_eval", "fill_in"]
