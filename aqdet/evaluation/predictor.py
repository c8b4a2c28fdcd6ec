"""A detector on one image at a time."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor

from ..checkpoint import load_detector


class Predictor(DefaultPredictor):
    """Detectron2's predictor with a detector that is loaded safely, strictly and without its auxiliary path.

    Calling it with an image ``(H, W, 3)`` uint8 in BGR order gives what the detector's forward gives for it, such as
    ``{"instances": Instances}``.

    Args:
        cfg: config of the detector.
        weights: checkpoint.

    Raises:
        FileNotFoundError, ValueError: as :func:`aqdet.checkpoint.load_detector`.
    """

    def __init__(self, cfg: CfgNode, weights: str) -> None:
        # Not DefaultPredictor's, which loads MODEL.WEIGHTS with a checkpointer of its own.
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR, got {cfg.INPUT.FORMAT!r}")
        self.cfg = cfg.clone()
        self.model = load_detector(cfg, weights)
        self.aug = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT
