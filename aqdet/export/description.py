"""The description of an exported detector: the content of ``detector.json``, and the same in the graph's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray

from ..data import register_declared
from ..modeling import QuantFCOS
from ..runtime.folder import FCOS, RETINANET
from .program import PadImage, Program

PREPROCESSING = (
    "resize the shorter edge to {min_size} (the longer to {max_size} at most) as Pillow's BILINEAR does, channels "
    "in the order {format}, pad at the right and the bottom with {pad_value} to multiples of {size_divisibility}; "
    "uint8, no mean, no division"
)


def pad_image(program: Program, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pads ``(3, H, W)`` with the code of zero below and to the right, up to multiples of the size divisibility."""
    bottom, right = (-side % program.size_divisibility for side in image.shape[1:])
    padded = [
        np.pad(channel, ((0, bottom), (0, right)), constant_values=value)
        for channel, value in zip(image, pad_values(program), strict=True)
    ]
    return np.stack(padded)


def pad_values(program: Program) -> tuple[int, ...]:
    """Returns the code of zero of each image channel."""
    return next(operation.values for operation in program.operations if isinstance(operation, PadImage))


def describe_detector(
    cfg: CfgNode, model: Any, program: Program, rows: list[dict[str, Any]], progress: Callable[[str], object]
) -> dict[str, Any]:
    """Returns the content of ``detector.json``, see :mod:`aqdet.runtime.folder`.

    Raises:
        ValueError: Naming the config key, for anchors that the runtime does not support.
    """
    strides = [output.stride for output in program.outputs]
    decode: dict[str, Any] = {
        "score_threshold": float(model.test_score_thresh),
        "topk_candidates": int(model.test_topk_candidates),
        "nms_threshold": float(model.test_nms_thresh),
        "max_detections": int(model.max_detections_per_image),
    }
    if isinstance(model, QuantFCOS):
        # One point at each location, which Detectron2 describes by a square as large as the stride.
        sizes, ratios, offset = (
            [[float(stride)] for stride in strides],
            [[1.0]] * len(strides),
            model.anchor_generator.offset,
        )
    else:
        anchors = cfg.MODEL.ANCHOR_GENERATOR
        if anchors.NAME != "DefaultAnchorGenerator":
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.NAME must be DefaultAnchorGenerator for export, got {anchors.NAME!r}"
            )
        sizes, ratios = (broadcast(values, len(strides)) for values in (anchors.SIZES, anchors.ASPECT_RATIOS))
        offset = anchors.OFFSET
        decode["box_weights"] = [float(weight) for weight in model.box2box_transform.weights]
        decode["scale_clamp"] = float(model.box2box_transform.scale_clamp)
    outputs = []
    for output in program.outputs:
        entry: dict[str, Any] = {"logits": output.logits, "deltas": output.deltas, "stride": output.stride}
        if output.centerness:
            entry["centerness"] = output.centerness
        outputs.append(entry)
    classes, ids = classes_of(cfg, model.num_classes, progress)
    return {
        "architecture": FCOS if isinstance(model, QuantFCOS) else RETINANET,
        "classes": classes,
        "category_ids": ids,
        "input": input_of(cfg, program),
        "anchors": {"sizes": sizes, "aspect_ratios": ratios, "strides": strides, "offset": float(offset)},
        "decode": decode,
        "outputs": outputs,
        "layers": rows,
    }


def input_of(cfg: CfgNode, program: Program) -> dict[str, Any]:
    """Returns how images are prepared."""
    return {
        "format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "size_divisibility": program.size_divisibility,
        "pad_value": list(pad_values(program)),
    }


def broadcast(values: Sequence[Sequence[float]], levels: int) -> list[list[float]]:
    """Returns a list for each level, of one for all or of as many."""
    lists = [[float(value) for value in row] for row in values]
    return lists * levels if len(lists) == 1 else lists


def classes_of(cfg: CfgNode, number: int, progress: Callable[[str], object]) -> tuple[list[str], list[int | None]]:
    """Returns the classes' names and ids from the training set or, if that is not available, from the test set."""
    reason = "DATASETS.TRAIN and TEST are empty"
    for datasets, train in ((cfg.DATASETS.TRAIN, True), (cfg.DATASETS.TEST, False)):
        if not datasets:
            continue
        try:
            register_declared(cfg, train=train)
        except ValueError as error:
            reason = str(error)
            continue
        metadata = MetadataCatalog.get(datasets[0])
        names = list(metadata.get("thing_classes") or [])
        ids = {index: key for key, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        if len(names) == number:
            return names, [ids.get(index) for index in range(number)]
        reason = f"{datasets[0]} names {len(names)} classes, the detector has {number}"
    progress(f"classes are called class_0 to class_{number - 1}: {reason}")
    return [f"class_{index}" for index in range(number)], [None] * number


def graph_metadata(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the graph's ``metadata_props``, for a program that has ``model.onnx`` alone; values are text or JSON.

    Args:
        content: The content of ``detector.json``, with ``source``.
    """
    keys = ("classes", "category_ids", "input", "anchors", "decode", "outputs")
    return {
        "aqdet_version": content["source"]["aqdet_version"],
        "architecture": content["architecture"],
        **{key: json.dumps(content[key]) for key in (*keys, "regions") if key in content},
        "strides": json.dumps(content["anchors"]["strides"]),
        "preprocessing": PREPROCESSING.format(**content["input"]),
        "source": json.dumps(content["source"]),
    }
