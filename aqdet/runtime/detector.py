"""The exported detector in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from .decode import Detections, decode
from .folder import DESCRIPTION, MODEL, Description, read_description
from .image import read_image
from .preprocess import make_batch

Image = np.ndarray | str | os.PathLike[str]
LevelOutputs = list[tuple[np.ndarray, ...]]


class Detector:
    """Image in, boxes out.

    Args:
        folder: written by ``tools/export_model.py``. Every file in it is checked first.
        threads: that the network runs on; None leaves the number to ONNX Runtime.
        provider: of ONNX Runtime.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: in one line, if it is damaged or mixed from two exports, does not fit this version, or
            an argument is not valid.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ValueError(f"provider must be one of {', '.join(available)}, got {provider!r}")
        self.description: Description = read_description(folder)
        path = Path(folder) / MODEL
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's own classes have no public base
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {reason}") from error
        self._check_graph(path)

    def _check_graph(self, path: Path) -> None:
        """That the graph has the input and the outputs of the description."""
        channels = {output.name: output.shape[1] for output in self._session.get_outputs()}
        for level in self.description.levels:
            for name, per_anchor in zip(level.outputs, (len(self.description.classes), 4, 1), strict=False):
                if channels.get(name) != len(level.anchors) * per_anchor:
                    raise ValueError(
                        f"{path}: output {name!r} should have {len(level.anchors) * per_anchor} channels by "
                        f"{DESCRIPTION}, has {channels.get(name)}: export the model again"
                    )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; ``Detections.classes`` are indices into them."""
        return self.description.classes

    def __call__(self, image: Image) -> Detections:
        """Detections of one image, a file or an ``(H, W, 3)`` uint8 array in BGR order."""
        return self.detect([image])[0]

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Detections of several images, run as one batch, padded to the largest.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read, or an array is not an image.
        """
        if not images:
            return []
        pixels = [image if isinstance(image, np.ndarray) else read_image(image) for image in images]
        batch, sizes = make_batch(pixels, self.description)
        outputs = self.run(batch)
        return [
            decode([[output[i] for output in level] for level in outputs], size, image.shape[:2], self.description)
            for i, (size, image) in enumerate(zip(sizes, pixels, strict=True))
        ]

    def run(self, batch: np.ndarray) -> LevelOutputs:
        """The network alone.

        Args:
            batch: ``(N, 3, H, W)`` uint8, channels in the order of ``description.channels``.

        Returns:
            For each level, float32: logits ``(N, A * K, h, w)``, deltas ``(N, A * 4, h, w)`` and, for FCOS, centerness
            ``(N, 1, h, w)``.
        """
        levels = [level.outputs for level in self.description.levels]
        names = [name for level in levels for name in level]
        values = iter(self._session.run(names, {self._session.get_inputs()[0].name: batch}))
        return [tuple(next(values) for _ in level) for level in levels]
