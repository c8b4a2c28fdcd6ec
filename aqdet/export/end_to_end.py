"""One ONNX file from pixels to detections, for programs without a decoder of their own.

Standard operations surround the network: padding comes before it; scores, boxes and class-wise non-maximum suppression
come after it. The detections are those of :mod:`aqdet.runtime`, in the same order; scores and boxes are equal up to the
last bits of the exponential. The program has to resize images itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime import Description
from ..runtime.folder import FCOS, Level
from .program import IMAGE

PIXELS, BOXES, SCORES, CLASSES, INDICES = "images", "boxes", "scores", "classes", "image_indices"
ABOUT = (
    "An object detector: N images of one size to the detections of all of them, those of the first image first, the "
    "surest of an image first. Class c is the c-th of metadata_props' classes; boxes are (x1, y1, x2, y2) in pixels."
)
# Score of candidates in the rows of other classes, which is below any score.
_NO_SCORE = -1.0


def build_end_to_end(network: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    """Puts padding before and decoding after a network.

    Args:
        network: The result of :func:`~aqdet.export.onnx_graph.build_onnx`.
        description: The description of the detector.

    Returns:
        A checked model. Its input is ``images``, uint8 ``(N, H, W, 3)`` RGB of any H and W, resized for the network.
        Its outputs over all images are ``boxes`` float32 ``(R, 4)``, ``scores`` float32 ``(R,)``, ``classes`` int64
        ``(R,)`` and ``image_indices`` int64 ``(R,)``, the image that each detection belongs to.
    """
    builder = _Builder(description)
    builder.pad()
    before, builder.nodes = builder.nodes, []
    builder.detect()
    info = helper.make_tensor_value_info
    outputs = [
        info(BOXES, TensorProto.FLOAT, ["R", 4], "x1, y1, x2, y2 in pixels of the image"),
        info(SCORES, TensorProto.FLOAT, ["R"], f"above {description.score_threshold:g}"),
        info(CLASSES, TensorProto.INT64, ["R"], "see metadata_props"),
        info(INDICES, TensorProto.INT64, ["R"], "0 to N - 1"),
    ]
    graph = helper.make_graph(
        [*before, *network.graph.node, *builder.nodes],
        "aqdet_end_to_end",
        [info(PIXELS, TensorProto.UINT8, ["N", "H", "W", 3], "RGB, 0 to 255, of the size that the network is to see")],
        outputs,
        [*network.graph.initializer, *builder.constants.values()],
        doc_string=ABOUT,
    )
    model = helper.make_model(
        graph,
        opset_imports=list(network.opset_import),
        ir_version=network.ir_version,
        producer_name=network.producer_name,
        producer_version=network.producer_version,
        doc_string=ABOUT,
    )
    helper.set_model_props(model, {entry.key: entry.value for entry in network.metadata_props})
    onnx.checker.check_model(model, full_check=True)
    return model


def largest_float32_below(threshold: float) -> float:
    """Returns the largest float32 that is not above ``threshold``, so that no float32 lies between the two."""
    value = np.float32(threshold)
    return float(value if float(value) <= threshold else np.nextafter(value, np.float32(-np.inf)))


class _Builder:
    """Nodes and constants; the names of all of them start with ``detections/``."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[bytes, str, tuple[int, ...]], TensorProto] = {}
        self._count = 0

    def constant(self, value: Any, dtype: Any) -> str:
        array = np.array(value, dtype)
        key = (array.tobytes(), str(array.dtype), array.shape)
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"detections/constant_{len(self.constants)}")
        return self.constants[key].name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def scalar(self, value: int) -> str:
        return self.constant(value, np.int64)

    def floats(self, value: Any) -> str:
        return self.constant(value, np.float32)

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        return self.ops(kind, *inputs, outputs=(output,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: Sequence[str] = ("", ""), **attributes: Any) -> list[str]:
        self._count += 1
        name = f"detections/{self._count}_{kind}"
        names = [output or f"{name}_{index}" for index, output in enumerate(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def part(self, x: str, axis: int, start: int, stop: int) -> str:
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    def size_of(self, x: str, axis: int) -> str:
        """Returns the size of an axis as a tensor: ``(1,)``."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    # --- before the network ---

    def pad(self) -> None:
        """Adds the padding of ``images`` to the network's input."""
        description = self.description
        self.sides = self.op("Shape", PIXELS, start=1, end=3)
        rest = self.op("Mod", self.op("Neg", self.sides), self.ints(description.size_divisibility))
        pads = self.op("Concat", self.ints(0, 0, 0, 0, 0, 0), rest, axis=0)
        pixels = self.op("Transpose", PIXELS, perm=[0, 3, 1, 2])
        if description.channels == "BGR":
            pixels = self.op("Gather", pixels, self.ints(2, 1, 0), axis=1)
        channels = self.ops("Split", pixels, outputs=("", "", ""), axis=1, num_outputs=3)
        padded = [
            self.op("Pad", channel, pads, self.constant(value, np.uint8))
            for channel, value in zip(channels, description.pad_value, strict=True)
        ]
        self.op("Concat", *padded, output=IMAGE, axis=1)

    # --- after it ---

    def detect(self) -> None:
        """Adds the decoding of the network's outputs to detections."""
        levels = [self.level(level) for level in self.description.levels]
        boxes, scores, classes = (self.op("Concat", *parts, axis=1) for parts in zip(*levels, strict=True))
        flat = self.suppress(boxes, scores, classes)
        count = self.size_of(flat, 0)
        per_image = self.size_of(scores, 1)
        flat_scores = self.op("Reshape", scores, self.ints(-1))
        # Sorted by score, equal scores by place; then, keeping that order, by image.
        flat = self.ops("TopK", flat, count, axis=0, largest=0)[0]
        order = self.ops("TopK", self.op("Gather", flat_scores, flat), count, axis=0)[1]
        flat = self.op("Gather", flat, order)
        number = self.op("Squeeze", count)
        ranks = self.op("Range", self.scalar(0), number, self.scalar(1))
        key = self.op("Add", self.op("Mul", self.op("Div", flat, per_image), count), ranks)
        flat = self.op("Gather", flat, self.ops("TopK", key, count, axis=0, largest=0)[1])
        images = self.op("Div", flat, per_image)
        boxes = self.op("Gather", self.op("Reshape", boxes, self.ints(-1, 4)), flat)
        width_height = self.op("Gather", self.sides, self.ints(1, 0, 1, 0))
        most = self.op("Cast", width_height, to=TensorProto.FLOAT)
        boxes = self.op("Max", self.op("Min", boxes, most), self.floats(0))
        sides = self.op("Sub", self.part(boxes, 1, 2, 4), self.part(boxes, 1, 0, 2))
        whole = self.op("Greater", self.op("ReduceMin", sides, self.ints(1), keepdims=0), self.floats(0))
        keep = self.op("And", whole, self.among_the_first(images))
        classes = self.op("Gather", self.op("Reshape", classes, self.ints(-1)), flat)
        scores = self.op("Gather", flat_scores, flat)
        for name, value in ((BOXES, boxes), (SCORES, scores), (CLASSES, classes), (INDICES, images)):
            self.op("Compress", value, keep, output=name, axis=0)

    def suppress(self, boxes: str, scores: str, classes: str) -> str:
        """Returns the places of the kept candidates, ``image * R + candidate``, int64 in any order."""
        description = self.description
        own_class = self.op(
            "Equal",
            self.op("Unsqueeze", classes, self.ints(1)),
            self.constant(np.arange(len(description.classes)).reshape(1, -1, 1), np.int64),
        )
        by_class = self.op("Where", own_class, self.op("Unsqueeze", scores, self.ints(1)), self.floats(_NO_SCORE))
        lowest = max(float(np.float32(description.score_threshold)), _NO_SCORE / 2)
        chosen = self.op(
            "NonMaxSuppression",
            boxes,
            by_class,
            self.ints(description.max_detections),
            self.floats([largest_float32_below(description.nms_threshold)]),
            self.floats([lowest]),
        )
        image, candidate = (self.op("Gather", chosen, self.scalar(column), axis=1) for column in (0, 2))
        return self.op("Add", self.op("Mul", image, self.size_of(scores, 1)), candidate)

    def among_the_first(self, images: str) -> str:
        """Returns whether each detection is among the best ones of its image, which are kept; they are in order."""
        batch = self.op("Squeeze", self.size_of(PIXELS, 0))
        numbers = self.op("Range", self.scalar(0), batch, self.scalar(1))
        own = self.op("Equal", self.op("Unsqueeze", images, self.ints(1)), numbers)
        own = self.op("Cast", own, to=TensorProto.INT64)
        counted = self.op("Mul", self.op("CumSum", own, self.scalar(0)), own)
        place = self.op("ReduceSum", counted, self.ints(1), keepdims=0)
        return self.op("LessOrEqual", place, self.scalar(self.description.max_detections))

    def level(self, level: Level) -> tuple[str, str, str]:
        """Returns the best candidates of a level: boxes ``(N, k, 4)``, scores ``(N, k)``, classes ``(N, k)``."""
        description = self.description
        anchors, classes = len(level.anchors), len(description.classes)
        width = self.op("Squeeze", self.size_of(level.logits, 3))
        scores = self.sigmoid(self.by_location(level.logits, anchors, classes))
        if level.centerness:
            centerness = self.sigmoid(self.by_location(level.centerness, 1, 1))
            scores = self.op("Sqrt", self.op("Mul", scores, centerness))
        scores = self.op("Reshape", scores, self.ints(0, -1))
        count = self.op("Min", self.size_of(scores, 1), self.ints(description.topk_candidates))
        best, index = self.ops("TopK", scores, count, axis=1)
        chosen, place = self.op("Mod", index, self.scalar(classes)), self.op("Div", index, self.scalar(classes))
        anchor, location = self.op("Mod", place, self.scalar(anchors)), self.op("Div", place, self.scalar(anchors))
        deltas = self.op("Reshape", self.by_location(level.deltas, anchors, 4), self.ints(0, -1, 4))
        deltas = self.op("GatherND", deltas, self.op("Unsqueeze", place, self.ints(2)), batch_dims=1)
        x, y = self.op("Mod", location, width), self.op("Div", location, width)
        decode = self.apply_distances if description.architecture == FCOS else self.apply_deltas
        return decode(deltas, self.anchors(level, anchor, x, y)), best, chosen

    def sigmoid(self, x: str) -> str:
        """Returns ``1 / (1 + exp(-x))``; ONNX Runtime's Sigmoid is an approximation, a hundred times less precise."""
        one = self.floats(1)
        return self.op("Div", one, self.op("Add", one, self.op("Exp", self.op("Neg", x))))

    def by_location(self, predictions: str, anchors: int, values: int) -> str:
        """Returns ``(N, anchors * values, h, w)`` as ``(N, h * w, anchors, values)``, the order of the candidates."""
        apart = self.op("Reshape", predictions, self.ints(0, anchors, values, -1))
        return self.op("Transpose", apart, perm=[0, 3, 1, 2])

    def anchors(self, level: Level, anchor: str, x: str, y: str) -> str:
        """Returns the boxes of anchors at locations, ``(N, k, 4)``."""
        half = np.array(level.anchors) / 2
        cells = self.floats(np.concatenate([-half, half], axis=1))
        corners = self.op("Concat", *(self.op("Unsqueeze", v, self.ints(2)) for v in (x, y, x, y)), axis=2)
        shift = self.op("Cast", corners, to=TensorProto.DOUBLE)
        shift = self.op("Mul", shift, self.constant(level.stride, np.float64))
        offset = self.description.anchor_offset * level.stride
        shift = self.op("Cast", self.op("Add", shift, self.constant(offset, np.float64)), to=TensorProto.FLOAT)
        return self.op("Add", shift, self.op("Gather", cells, anchor))

    def apply_deltas(self, deltas: str, anchors: str) -> str:
        """See :func:`aqdet.runtime.decode`; the same operations in the same order."""
        description = self.description
        low, high = self.part(anchors, 2, 0, 2), self.part(anchors, 2, 2, 4)
        size = self.op("Sub", high, low)
        centre = self.op("Add", low, self.op("Mul", self.floats(0.5), size))
        deltas = self.op("Div", deltas, self.floats(description.box_weights))
        centre = self.op("Add", self.op("Mul", self.part(deltas, 2, 0, 2), size), centre)
        growth = self.op("Min", self.part(deltas, 2, 2, 4), self.floats(description.scale_clamp))
        half = self.op("Mul", self.floats(0.5), self.op("Mul", self.op("Exp", growth), size))
        return self.op("Concat", self.op("Sub", centre, half), self.op("Add", centre, half), axis=2)

    def apply_distances(self, distances: str, anchors: str) -> str:
        """See :func:`aqdet.runtime.decode`; the same operations in the same order."""
        low, high = self.part(anchors, 2, 0, 2), self.part(anchors, 2, 2, 4)
        stride = self.op("Sub", self.part(anchors, 2, 2, 3), self.part(anchors, 2, 0, 1))
        distances = self.op("Mul", self.op("Max", distances, self.floats(0)), stride)
        centre = self.op("Mul", self.floats(0.5), self.op("Add", low, high))
        left_top = self.op("Sub", centre, self.part(distances, 2, 0, 2))
        right_bottom = self.op("Add", centre, self.part(distances, 2, 2, 4))
        return self.op("Concat", left_top, right_bottom, axis=2)
