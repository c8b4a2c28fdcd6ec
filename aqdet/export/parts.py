"""The parts of an exported detector: its programs, graphs and description, one graph or, with two stages, three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from numpy.typing import NDArray

from ..modeling import QuantGeneralizedRCNN
from ..runtime.folder import BOX_MODEL, MASK_MODEL, MODEL, RCNN
from .agreement import Difference, compare
from .description import broadcast, classes_of, describe_detector, input_of, pad_image
from .extract import extract
from .extract_regions import BOX_OUTPUTS, MASK_OUTPUT, TwoStagePrograms, extract_two_stage
from .integer_graph import check_integer
from .onnx_graph import build_onnx
from .program import Program
from .region_graph import FLOAT_ISLAND, PooledLevel, build_region_graph
from .usage import Usage, measure_usage

REGIONS = 8
"""Regions of an image that ranges and the agreement of the heads are measured on."""
REFUSED = {
    "end_to_end": "--end-to-end: a two-stage detector's proposals and masks are made by aqdet.runtime, outside a graph",
    "qonnx": "--qonnx: QONNX is for dense detectors; a two-stage one is exported as model.onnx, box.onnx and mask.onnx",
    "c": "--c: detector.c is for dense detectors; a two-stage one is exported as model.onnx, box.onnx and mask.onnx",
    "tensorrt": "--tensorrt: it is for dense detectors; a two-stage one is exported as model.onnx, box.onnx, mask.onnx",
}
"""Forms that a two-stage detector is not written in, and what is said."""


def refuse_forms(asked: Mapping[str, object]) -> None:
    """Refuses what a two-stage detector is not exported to.

    Args:
        asked: Whether each of the keys of :data:`REFUSED` is asked for.

    Raises:
        ValueError: In one line.
    """
    for name, text in REFUSED.items():
        if asked.get(name):
            raise ValueError(text)


def describe_two_stage(
    cfg: CfgNode,
    model: Any,
    programs: TwoStagePrograms,
    rows: list[dict[str, Any]],
    progress: Callable[[str], object],
) -> dict[str, Any]:
    """Returns the content of ``detector.json``, see :mod:`aqdet.runtime.folder`.

    Raises:
        ValueError: Naming the config key, for anchors that the runtime does not know.
    """
    features, rpn, heads = programs.features, model.proposal_generator, model.roi_heads
    anchors, predictor = cfg.MODEL.ANCHOR_GENERATOR, heads.box_predictor
    if anchors.NAME != "DefaultAnchorGenerator":
        raise ValueError(f"MODEL.ANCHOR_GENERATOR.NAME must be DefaultAnchorGenerator for export, got {anchors.NAME!r}")
    strides = [output.stride for output in features.outputs]
    sizes, ratios = (broadcast(values, len(strides)) for values in (anchors.SIZES, anchors.ASPECT_RATIOS))
    classes, ids = classes_of(cfg, heads.num_classes, progress)
    pooler = heads.box_pooler
    return {
        "architecture": RCNN,
        "classes": classes,
        "category_ids": ids,
        "input": input_of(cfg, features),
        "anchors": {"sizes": sizes, "aspect_ratios": ratios, "strides": strides, "offset": float(anchors.OFFSET)},
        "decode": {
            "score_threshold": float(predictor.test_score_thresh),
            "topk_candidates": int(rpn.pre_nms_topk[False]),
            "nms_threshold": float(predictor.test_nms_thresh),
            "max_detections": int(predictor.test_topk_per_image),
            "box_weights": [float(weight) for weight in rpn.box2box_transform.weights],
            "scale_clamp": float(predictor.box2box_transform.scale_clamp),
        },
        "outputs": [{"logits": o.logits, "deltas": o.deltas, "stride": o.stride} for o in features.outputs],
        "regions": {
            "pyramid": [
                {"name": name, "output": output, "stride": model.backbone.output_shape()[name].stride}
                for name, output in zip(heads.box_in_features, features.pyramid, strict=True)
            ],
            "canonical_size": int(pooler.canonical_box_size),
            "canonical_level": int(pooler.canonical_level),
            "max_proposals": int(rpn.post_nms_topk[False]),
            "proposal_nms_threshold": float(rpn.nms_thresh),
            "min_box_size": float(rpn.min_box_size),
            "box_logits": BOX_OUTPUTS[0],
            "box_deltas": BOX_OUTPUTS[1],
            "box_weights": [float(weight) for weight in predictor.box2box_transform.weights],
            "class_agnostic_boxes": predictor.bbox_pred.out_features == 4,
            "mask_logits": MASK_OUTPUT if heads.mask_on else "",
        },
        "layers": rows,
    }


def region_graphs(model: Any, programs: TwoStagePrograms, metadata: Mapping[str, str]) -> dict[str, onnx.ModelProto]:
    """Returns the graphs of the heads by file."""
    heads, shapes, grids = model.roi_heads, model.backbone.output_shape(), programs.features.grids()
    levels = [
        PooledLevel(name, grids[output], int(shapes[name].stride), int(shapes[name].channels))
        for name, output in zip(heads.box_in_features, programs.features.pyramid, strict=True)
    ]
    poolers = {BOX_MODEL: (programs.box, heads.box_pooler)}
    if programs.mask is not None:
        poolers[MASK_MODEL] = (programs.mask, heads.mask_pooler)
    return {
        file: build_region_graph(
            program,
            levels,
            resolution=int(pooler.output_size[0]),
            sampling_ratio=int(pooler.level_poolers[0].sampling_ratio),
            metadata=metadata,
        )
        for file, (program, pooler) in poolers.items()
    }


def pooled_codes(
    model: Any, programs: TwoStagePrograms, image: NDArray[np.uint8]
) -> dict[str, list[NDArray[np.uint8]]]:
    """Returns codes of regions of an image as the heads' programs read them, by program.

    Args:
        model: The detector, in evaluation mode.
        programs: Its programs.
        image: The image, ``(3, H, W)``, sides multiples of the size divisibility.
    """
    heads = model.roi_heads
    x = (torch.from_numpy(np.ascontiguousarray(image)).float() - model.pixel_mean) / model.pixel_std
    images = ImageList(x[None], [(x.shape[1], x.shape[2])])
    with torch.no_grad():
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        boxes = [proposals[0].proposal_boxes[:REGIONS]]
        levels = [features[name] for name in heads.box_in_features]
        found = {"box": _codes(programs.box, heads.box_pooler(levels, boxes).numpy())}
        if programs.mask is not None:
            found["mask"] = _codes(programs.mask, heads.mask_pooler(levels, boxes).numpy())
    return found


def _codes(program: Program, regions: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
    grid = program.image
    codes = np.clip(np.rint(regions / np.float32(grid.scale)), grid.quant_min, grid.quant_max)
    return list((codes + grid.zero_point).astype(np.uint8))


class DenseParts:
    """A dense detector as it is exported.

    Args:
        model: The detector, in evaluation mode.

    Attributes:
        programs: The programs by name, in the order in which they run.
    """

    allow_float: tuple[str, ...] = ()
    """Regexes on the names of what its graphs declare to compute in float."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.programs: dict[str, Program] = {"": extract(model)}

    @property
    def first(self) -> Program:
        """The program that reads the image."""
        return next(iter(self.programs.values()))

    def describe(self, cfg: CfgNode, rows: list[dict[str, Any]], progress: Callable[[str], object]) -> dict[str, Any]:
        """Returns the content of ``detector.json``."""
        return describe_detector(cfg, self.model, self.first, rows, progress)

    def graphs(self, metadata: Mapping[str, str]) -> dict[str, onnx.ModelProto]:
        """Returns the graphs that are run, by file."""
        return {MODEL: build_onnx(self.first, metadata=metadata)}

    def inputs(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
        """Returns what each program reads of some images, each ``(3, H, W)``."""
        return {next(iter(self.programs)): [pad_image(self.first, image) for image in images]}

    def usage(self, images: Sequence[NDArray[np.uint8]], progress: Callable[[str], object]) -> list[Usage]:
        """Returns how much of each quantizer's range is used on some images."""
        read = self.inputs(images)
        return [u for name, part in self.programs.items() for u in measure_usage(part, read[name], progress)]

    def agreement(
        self, images: Sequence[NDArray[np.uint8]], progress: Callable[[str], object], *, tensorrt: bool = False
    ) -> list[Difference]:
        """Returns the comparison of every value of every program on some images."""
        read = self.inputs(images)
        return [
            difference
            for name, part in self.programs.items()
            for difference in compare(self.model, part, read[name], progress, tensorrt=tensorrt)
        ]

    def executed(self, graphs: Mapping[str, onnx.ModelProto], allow_float: Sequence[str]) -> dict[str, int]:
        """Counts the operators that ONNX Runtime executes, see :func:`~aqdet.export.integer_graph.check_integer`."""
        counts = [check_integer(graph, (*allow_float, *self.allow_float)) for graph in graphs.values()]
        return {kind: sum(count.get(kind, 0) for count in counts) for kind in sorted({k for c in counts for k in c})}


class RegionParts(DenseParts):
    """A two-stage detector as it is exported.

    Args:
        model: The detector, in evaluation mode.
    """

    allow_float = FLOAT_ISLAND

    def __init__(self, model: Any) -> None:
        self.model = model
        self._extracted = extract_two_stage(model)
        self.programs = self._extracted.by_name()

    def describe(self, cfg: CfgNode, rows: list[dict[str, Any]], progress: Callable[[str], object]) -> dict[str, Any]:
        """Returns the content of ``detector.json``."""
        return describe_two_stage(cfg, self.model, self._extracted, rows, progress)

    def graphs(self, metadata: Mapping[str, str]) -> dict[str, onnx.ModelProto]:
        """Returns the graphs that are run, by file."""
        return {**super().graphs(metadata), **region_graphs(self.model, self._extracted, metadata)}

    def inputs(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, list[NDArray[np.uint8]]]:
        """Returns what each program reads of some images: of the heads, codes of :data:`REGIONS` proposals of each."""
        found = super().inputs(images)
        for image in next(iter(found.values())):
            for name, codes in pooled_codes(self.model, self._extracted, image).items():
                found.setdefault(name, []).extend(codes)
        return found


def parts_of(model: Any) -> DenseParts:
    """Returns what a detector is exported as.

    Raises:
        ValueError: In one line that names the layer or the config key, if it cannot run on integers.
    """
    return RegionParts(model) if isinstance(model, QuantGeneralizedRCNN) else DenseParts(model)
