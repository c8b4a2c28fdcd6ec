"""Top-1 and top-5 accuracy."""

from __future__ import annotations

import os
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..utils.files import write_json


class TopKEvaluator(DatasetEvaluator):
    """Computes top-1 and top-5 accuracy in percent, and writes them to ``metrics.json``.

    Args:
        output_dir: folder of the file.
    """

    def __init__(self, *, output_dir: str) -> None:
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._images = 0
        self._hits = {"top1": 0, "top5": 0}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Counts images: inputs with ``label``, outputs with ``scores`` ``(K,)``."""
        for given, output in zip(inputs, outputs, strict=True):
            scores = output["scores"]
            best = scores.topk(min(5, len(scores))).indices.tolist()
            self._images += 1
            self._hits["top1"] += given["label"] == best[0]
            self._hits["top5"] += given["label"] in best

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Returns ``{"classification": {"top1": ..., "top5": ...}}`` on the main process, ``{}`` on the others."""
        parts = comm.gather((self._images, self._hits))
        if not comm.is_main_process():
            return {}
        images = sum(count for count, _ in parts)
        values = {key: 100 * sum(hits[key] for _, hits in parts) / images for key in self._hits}
        write_json(os.path.join(self._output_dir, "metrics.json"), values)
        return {"classification": values}
