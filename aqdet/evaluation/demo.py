"""A trained detector on images and videos, drawn as Detectron2 draws."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer

from ..data import register_declared
from ..evaluation.predictor import Predictor
from ..runtime.media import Draw

logger = logging.getLogger(__name__)


class Demo:
    """A detector as :class:`aqdet.runtime.media.MediaLoop` takes it.

    Args:
        cfg: config; ``MODEL.WEIGHTS`` is what is run, without its auxiliary path.

    Raises:
        ValueError, FileNotFoundError: in one line, if the weights are missing, not safe or do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            raise ValueError("MODEL.WEIGHTS is empty: name the checkpoint to run, --opts MODEL.WEIGHTS model_final.pth")
        if cfg.MODEL.META_ARCHITECTURE == "QuantClassifier":
            raise ValueError("MODEL.META_ARCHITECTURE is QuantClassifier: the demo draws boxes, which it has none of")
        self._metadata = _metadata(cfg)
        self._predictor = Predictor(cfg, weights)

    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Returns the detections in images, each ``(H, W, 3)`` uint8 in BGR order, on the CPU."""
        return [self._predictor(image)["instances"].to("cpu") for image in images]

    def drawer(self, is_video: bool) -> Draw:
        """Returns a function that draws what was found into an image; in a video, colours follow the objects."""
        video = VideoVisualizer(self._metadata) if is_video else None

        def draw(image: np.ndarray, found: Instances) -> np.ndarray:
            rgb = image[:, :, ::-1]
            if video is not None:
                drawn = video.draw_instance_predictions(rgb, found)
            else:
                drawn = Visualizer(rgb, self._metadata).draw_instance_predictions(found)
            return drawn.get_image()[:, :, ::-1]

        return draw


def _metadata(cfg: CfgNode) -> Any:
    """Returns the metadata, with the names of classes, of the first test set; its data need not be on this machine."""
    try:
        register_declared(cfg, train=False)
    except ValueError as error:
        logger.warning("Class names are not known, their numbers are drawn: %s", error)
        return MetadataCatalog.get("__unused")
    return MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")
