"""The exported folder: its description, ``detector.json``, and checks that its files belong together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import sha256, write_json

FORMAT = "aqdet-detector"
VERSION = 1
DESCRIPTION = "detector.json"
MODEL = "model.onnx"
BOX_MODEL, MASK_MODEL = "box.onnx", "mask.onnx"
"""Graphs of the heads for regions, of a two-stage detector."""
RETINANET, FCOS, RCNN = ARCHITECTURES = ("RetinaNet", "FCOS", "RCNN")
# Keys that write_description fills in.
SEAL = ("format", "version", "files", "sha256")


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        logits, deltas: Names of the graph's outputs, ``(N, A * K, h, w)`` and ``(N, A * 4, h, w)``.
        centerness: Name of FCOS's output ``(N, 1, h, w)``; "" for RetinaNet, and for an FCOS without centerness.
        stride: Pixels of the network's input from one location to the next.
        anchors: ``(width, height)`` of the A anchors at a location, in the order of the channels. FCOS has one point
            there, described by a square as large as the stride, which is the unit of distances.
    """

    logits: str
    deltas: str
    centerness: str
    stride: int
    anchors: tuple[tuple[float, float], ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the level's outputs, in the order of decoding."""
        return (self.logits, self.deltas, *[self.centerness] * bool(self.centerness))


@dataclasses.dataclass(frozen=True)
class PyramidLevel:
    """A level that regions are pooled from.

    Attributes:
        name: The ending of its inputs' names in the heads' graphs.
        output: The output of ``model.onnx`` with its codes.
        stride: Pixels of the network's input from one location to the next.
    """

    name: str
    output: str
    stride: int


@dataclasses.dataclass(frozen=True)
class Regions:
    """The second stage of a two-stage detector.

    Attributes:
        pyramid: The levels, from high to low resolution.
        canonical_size, canonical_level: Side in pixels of a region that is pooled from that level, whose stride is 2
            to its power; one of twice the side from the next level.
        max_proposals, proposal_nms_threshold, min_box_size: Limits of the regions that are proposed.
        box_logits, box_deltas: The outputs of ``box.onnx``.
        box_weights: The weights of the second stage's ``Box2BoxTransform``.
        class_agnostic_boxes: Whether all classes share one box.
        mask_logits: The output of ``mask.onnx``; "" without masks.
    """

    pyramid: tuple[PyramidLevel, ...]
    canonical_size: int
    canonical_level: int
    max_proposals: int
    proposal_nms_threshold: float
    min_box_size: float
    box_logits: str
    box_deltas: str
    box_weights: tuple[float, ...]
    class_agnostic_boxes: bool
    mask_logits: str

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the heads' graphs."""
        return (BOX_MODEL, MASK_MODEL) if self.mask_logits else (BOX_MODEL,)


@dataclasses.dataclass(frozen=True)
class Description:
    """The checked content of ``detector.json``.

    Attributes:
        architecture: One of :data:`ARCHITECTURES`, which decode predictions in different ways.
        classes: The names of the K classes.
        category_ids: The classes' ids in their dataset, if they are known.
        channels: ``"BGR"`` or ``"RGB"``, the order of the network's input.
        min_size, max_size: Lengths of the resized image's shorter and longest longer edge in pixels; ``min_size`` 0
            leaves the image as it is.
        size_divisibility: Height and width of the batch are multiples of it.
        pad_value: The padding of each channel, in the order of ``channels``.
        levels: The pyramid levels, see :class:`Level`; for RCNN those of the proposal network, which has one class.
        anchor_offset: Position of the first anchor's centre, in strides.
        box_weights, scale_clamp: Parameters of Detectron2's ``Box2BoxTransform``; ones and infinity for FCOS, which has
            none.
        score_threshold, topk_candidates, nms_threshold, max_detections: Settings of Detectron2's dense detectors. For
            RCNN the candidates are those of a level for proposals, and the others are of the second stage.
        layers: A row for each layer, for reports.
        source: The checkpoint and config that the folder was exported from.
        regions: The second stage of RCNN; None for a dense detector.
    """

    architecture: str
    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    channels: str
    min_size: int
    max_size: int
    size_divisibility: int
    pad_value: tuple[int, int, int]
    levels: tuple[Level, ...]
    anchor_offset: float
    box_weights: tuple[float, float, float, float]
    scale_clamp: float
    score_threshold: float
    topk_candidates: int
    nms_threshold: float
    max_detections: int
    layers: tuple[dict[str, Any], ...]
    source: dict[str, Any]
    regions: Regions | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Files that the detector cannot run without."""
        return (MODEL, *(self.regions.files if self.regions is not None else ()))

    @property
    def level_classes(self) -> int:
        """Number of logits of an anchor."""
        return len(self.classes) if self.regions is None else 1


def write_description(
    folder: str | os.PathLike[str],
    content: Mapping[str, Any],
    files: Sequence[str] = (MODEL,),
) -> None:
    """Writes ``detector.json`` with the checksums of itself and of the files beside it, as the export's last step.

    Args:
        folder: The folder that holds ``files``.
        content: The description without the keys of ``SEAL``.
        files: Names of the files whose checksums are written; ``model.onnx`` is one of them.
    """
    folder = Path(folder)
    sealed = {
        "format": FORMAT,
        "version": VERSION,
        "files": {n: {"sha256": sha256(folder / n), "bytes": (folder / n).stat().st_size} for n in files},
        **{key: value for key, value in content.items() if key not in SEAL},
    }
    sealed["sha256"] = _checksum(sealed)
    write_json(folder / DESCRIPTION, sealed)


def read_description(folder: str | os.PathLike[str]) -> Description:
    """Reads ``detector.json`` and checks that the files in the folder are those that it was written with.

    Raises:
        FileNotFoundError: If the folder, its description or ``model.onnx`` does not exist.
        ValueError: In one line, if a file was changed or comes from another export, or if the description has another
            format or version, or lacks a value.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is not the folder of a finished export")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, damaged: export the model again, or copy the folder again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: its 'format' is not {FORMAT!r}: not a detector exported by aqdet")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {content.get('version')!r}, this aqdet reads version {VERSION}: export the model again"
        )
    if content.get("sha256") != _checksum(content):
        raise ValueError(f"{path}: changed since it was written: export the model again, or copy the folder again")
    try:
        description = _parse(content)
        files = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in content["files"].items()}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: lacks a value or has one that is not valid ({error!r}): export again") from error
    needed = description.needed
    if not set(needed) <= set(files) or any(Path(name).name != name for name in files):
        wanted = " and ".join(needed)
        raise ValueError(f"{path}: 'files' must be names in this folder with {wanted} among them, got {list(files)}")
    for name, (digest, size) in files.items():
        file = folder / name
        if not file.exists() and name not in needed:
            continue  # the runtime does not execute such a file
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: copy the whole folder, or export the model again")
        if file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(
                f"{file}: damaged, or of another model than {DESCRIPTION} (its SHA-256 differs from the one there): "
                "copy the whole folder again, or export the model again"
            )
    return description


def _parse(content: dict[str, Any]) -> Description:
    """Returns the description's values; raises an error if one is missing or of a wrong kind."""
    architecture = content["architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    source, anchors, decode = content["input"], content["anchors"], content["decode"]
    classes = tuple(str(name) for name in content["classes"])
    category_ids = tuple(None if key is None else int(key) for key in content["category_ids"])
    channels, pad_value = source["format"], tuple(int(v) for v in source["pad_value"])
    box_weights: tuple[float, ...] = (1.0,) * 4
    scale_clamp = math.inf
    if architecture != FCOS:
        box_weights, scale_clamp = tuple(float(v) for v in decode["box_weights"]), float(decode["scale_clamp"])
    if not classes or len(category_ids) != len(classes):
        raise ValueError(f"{len(classes)} classes, {len(category_ids)} category_ids")
    if channels not in ("BGR", "RGB") or len(pad_value) != 3 or not all(0 <= v <= 255 for v in pad_value):
        raise ValueError(f"input {source!r}")
    if len(box_weights) != 4:
        raise ValueError(f"box_weights {box_weights}")
    levels = tuple(
        Level(
            str(output["logits"]),
            str(output["deltas"]),
            str(output.get("centerness", "")) if architecture == FCOS else "",
            int(stride),
            _anchor_shapes(sizes, ratios),
        )
        for output, stride, sizes, ratios in zip(
            content["outputs"], anchors["strides"], anchors["sizes"], anchors["aspect_ratios"], strict=True
        )
    )
    if not levels or any(level.stride < 1 for level in levels):
        raise ValueError(f"outputs {content['outputs']!r}")
    if architecture == FCOS and any(len(level.anchors) != 1 for level in levels):
        raise ValueError(f"anchors {anchors!r} of FCOS")
    if len({bool(level.centerness) for level in levels}) > 1:
        raise ValueError(f"outputs {content['outputs']!r}: a centerness at some levels alone")
    return Description(
        architecture=architecture,
        classes=classes,
        category_ids=category_ids,
        channels=channels,
        min_size=int(source["min_size"]),
        max_size=int(source["max_size"]),
        size_divisibility=max(int(source["size_divisibility"]), 1),
        pad_value=(pad_value[0], pad_value[1], pad_value[2]),
        levels=levels,
        anchor_offset=float(anchors["offset"]),
        box_weights=(box_weights[0], box_weights[1], box_weights[2], box_weights[3]),
        scale_clamp=scale_clamp,
        score_threshold=float(decode["score_threshold"]),
        topk_candidates=int(decode["topk_candidates"]),
        nms_threshold=float(decode["nms_threshold"]),
        max_detections=int(decode["max_detections"]),
        layers=tuple(content["layers"]),
        source=dict(content["source"]),
        regions=_regions(content["regions"]) if architecture == RCNN else None,
    )


def _regions(content: dict[str, Any]) -> Regions:
    pyramid = tuple(PyramidLevel(str(e["name"]), str(e["output"]), int(e["stride"])) for e in content["pyramid"])
    weights = tuple(float(value) for value in content["box_weights"])
    if not pyramid or any(level.stride < 1 for level in pyramid) or len(weights) != 4:
        raise ValueError(f"regions {content!r}")
    return Regions(
        pyramid=pyramid,
        canonical_size=int(content["canonical_size"]),
        canonical_level=int(content["canonical_level"]),
        max_proposals=int(content["max_proposals"]),
        proposal_nms_threshold=float(content["proposal_nms_threshold"]),
        min_box_size=float(content["min_box_size"]),
        box_logits=str(content["box_logits"]),
        box_deltas=str(content["box_deltas"]),
        box_weights=weights,
        class_agnostic_boxes=bool(content["class_agnostic_boxes"]),
        mask_logits=str(content["mask_logits"]),
    )


def _anchor_shapes(sizes: Sequence[float], ratios: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Returns ``(width, height)`` of a location's anchors, with area ``size ** 2`` and ``height / width`` the ratio."""
    widths = [math.sqrt(size**2.0 / ratio) for size in sizes for ratio in ratios]
    return tuple((w, ratio * w) for w, ratio in zip(widths, list(ratios) * len(sizes), strict=True))


def _checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a description without its key ``sha256``; white space and order of keys do not matter."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
