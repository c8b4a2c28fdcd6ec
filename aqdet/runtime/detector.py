"""The exported detector in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .decode import Detections, decode
from .folder import BOX_MODEL, DESCRIPTION, MASK_MODEL, MODEL, Description, read_description
from .image import read_image
from .preprocess import make_batch
from .regions import RegionHeads

Image = np.ndarray | str | os.PathLike[str]
LevelOutputs = list[tuple[np.ndarray, ...]]


class Detector:
    """An exported detector, which is called with an image and returns boxes.

    Args:
        folder: The folder that ``tools/export_model.py`` has written. The files that ``detector.json`` names are
            checked first; all but the graphs that are run may be missing.
        threads: The number of threads of the network; None leaves it to ONNX Runtime.
        provider: The name of ONNX Runtime's execution provider.
        score_threshold: The lowest score of a detection. None, here and below, takes the folder's own value.
        nms_threshold: Intersection over union with a better box of its class above which a box is left out.
        max_detections: The largest number of detections of an image.
        size: Length in pixels that the shorter edge of an image is resized to, with the limit of the longer edge in
            proportion, or a pair of both. 0 leaves images as they are.

    Raises:
        FileNotFoundError: If the folder or a file that it needs is missing.
        ValueError: In one line, if the folder is damaged or mixed from two exports or does not fit this version, or if
            an argument is not valid.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        provider: str = "CPUExecutionProvider",
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ValueError(f"provider must be one of {', '.join(available)}, got {provider!r}")
        self.description: Description = _override(
            read_description(folder), score_threshold, nms_threshold, max_detections, size
        )
        self._path = Path(folder) / MODEL
        self._provider = provider
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or 0
        self._session = self._load(str(self._path))
        self._check_graph(self._path)
        self._heads: RegionHeads | None = None
        regions = self.description.regions
        if regions is not None:
            box, mask = (self._path.with_name(name) for name in (BOX_MODEL, MASK_MODEL))
            self._heads = RegionHeads(
                self.description, self._load(str(box)), self._load(str(mask)) if regions.mask_logits else None
            )

    def _load(self, model: str | bytes) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(model, self._options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's own classes have no public base
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self._path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {reason}"
            ) from error

    def _check_graph(self, path: Path) -> None:
        """Checks that the graph has the outputs of the description."""
        channels = {output.name: output.shape[1] for output in self._session.get_outputs()}
        for level in self.description.levels:
            for name, per_anchor in zip(level.outputs, (self.description.level_classes, 4, 1), strict=False):
                if channels.get(name) != len(level.anchors) * per_anchor:
                    raise ValueError(
                        f"{path}: output {name!r} should have {len(level.anchors) * per_anchor} channels by "
                        f"{DESCRIPTION}, has {channels.get(name)}: export the model again"
                    )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; ``Detections.classes`` are indices into them."""
        return self.description.classes

    def __call__(self, image: Image) -> Detections:
        """Detects objects in one image, a file or an ``(H, W, 3)`` uint8 array in BGR order."""
        return self.detect([image])[0]

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Detects objects in several images, which run as one batch, padded to the largest.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file cannot be read, or an array is not an image.
        """
        if not images:
            return []
        pixels = [image if isinstance(image, np.ndarray) else read_image(image) for image in images]
        batch, sizes = make_batch(pixels, self.description)
        if self._heads is not None:
            return self._detect_regions(self._heads, batch, sizes, pixels)
        outputs = self.run(batch)
        return [
            decode([[output[i] for output in level] for level in outputs], size, image.shape[:2], self.description)
            for i, (size, image) in enumerate(zip(sizes, pixels, strict=True))
        ]

    def _detect_regions(
        self, heads: RegionHeads, batch: np.ndarray, sizes: Sequence[tuple[int, int]], pixels: Sequence[np.ndarray]
    ) -> list[Detections]:
        assert self.description.regions is not None
        names = [name for level in self.description.levels for name in level.outputs]
        pyramid = [level.output for level in self.description.regions.pyramid]
        values = self._session.run([*names, *pyramid], {self._session.get_inputs()[0].name: batch})
        found = []
        for index, (size, image) in enumerate(zip(sizes, pixels, strict=True)):
            of_image = [value[index] for value in values]
            predictions = list(zip(of_image[: len(names) : 2], of_image[1 : len(names) : 2], strict=True))
            found.append(heads.detect(predictions, of_image[len(names) :], size, image.shape[:2]))
        return found

    def run(self, batch: np.ndarray) -> LevelOutputs:
        """Runs the network alone; of a two-stage detector the first stage's.

        Args:
            batch: ``(N, 3, H, W)`` uint8, with channels in the order of ``description.channels``; H and W are multiples
                of ``description.size_divisibility``.

        Returns:
            The float32 outputs of each level: logits ``(N, A * K, h, w)``, deltas ``(N, A * 4, h, w)`` and, if there
            is one, centerness ``(N, 1, h, w)``.

        Raises:
            ValueError: In one line, if the batch has another shape or type.
        """
        step = self.description.size_divisibility
        fits = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[1] == 3
        if not fits or batch.shape[2] % step or batch.shape[3] % step:
            raise ValueError(
                f"a batch must be uint8 (N, 3, H, W) with H and W multiples of {step}, got {batch.dtype} {batch.shape}"
            )
        levels = [level.outputs for level in self.description.levels]
        names = [name for level in levels for name in level]
        values = iter(self._session.run(names, {self._session.get_inputs()[0].name: batch}))
        return [tuple(next(values) for _ in level) for level in levels]

    def tensors(self, names: Sequence[str], batch: np.ndarray) -> list[np.ndarray]:
        """Returns tensors inside the network, to compare machines; the graph is loaded again for them.

        Args:
            names: Names of tensors of ``model.onnx``.
            batch: The input, as for :meth:`run`.

        Raises:
            ValueError: If the graph has no such tensor.
        """
        session = self._load(_with_outputs(self._path.read_bytes(), names))
        return list(session.run(list(names), {session.get_inputs()[0].name: batch}))


def _override(
    description: Description,
    score_threshold: float | None,
    nms_threshold: float | None,
    max_detections: int | None,
    size: int | tuple[int, int] | None,
) -> Description:
    """Returns the description with the values that the caller asks for."""
    changes: dict[str, Any] = {}
    for name, value in (("score_threshold", score_threshold), ("nms_threshold", nms_threshold)):
        if value is not None:
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
            changes[name] = float(value)
    if max_detections is not None:
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        changes["max_detections"] = int(max_detections)
    if size is not None:
        if isinstance(size, int):
            scale = size / description.min_size if description.min_size else 0
            shorter, longer = size, round(description.max_size * scale) if scale else description.max_size
        else:
            shorter, longer = size
        if shorter < 0 or longer < shorter:
            raise ValueError(f"size must be at least 0, or a pair of a shorter and a longer edge, got {size}")
        changes |= {"min_size": int(shorter), "max_size": int(longer)}
    return dataclasses.replace(description, **changes)


def _with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """Returns a serialized graph with tensors added to its outputs.

    Protocol Buffers merges serialized messages that follow each other: the appended ``ModelProto`` sets
    ``graph.output[].name`` and nothing else.
    """
    return model + _field(7, b"".join(_field(12, _field(1, name.encode())) for name in names))


def _field(number: int, content: bytes) -> bytes:
    """Returns a field of bytes of a Protocol Buffers message: its tag, the length as a varint, and the content."""
    length, size = bytearray(), len(content)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2, *length]) + content
