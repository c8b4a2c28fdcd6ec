"""From a checkpoint to the exported folder: builds, proves, compares, writes aside and renames."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray
from torch import nn

from .. import __version__
from ..checkpoint import load_detector
from ..data import register_declared
from ..modeling import QuantFCOS
from ..modeling.scaffold.auxiliary import TRAINING_ONLY
from ..quantization import quantizers
from ..runtime.folder import DESCRIPTION, FCOS, RETINANET, write_description
from .agreement import EXECUTIONS, Difference, compare, runtime_session
from .extract import extract
from .onnx_graph import build_onnx
from .packing import save_program
from .program import PadImage, Program
from .proof import operation_rows, tightest
from .tensorrt_graph import build_tensorrt

MODEL, INT4_MODEL, TENSORRT_MODEL = "model.onnx", "model.int4.onnx", "model.tensorrt.onnx"
PACKED = "model.safetensors"
INTEGER_KINDS = frozenset(
    "Clip Concat MaxPool NhwcMaxPool Pad QLinearAdd QLinearConv QLinearLeakyRelu Resize Slice Split Transpose".split()
)
"""Operators that compute on integers in the graphs written here, as ONNX Runtime executes them."""
Progress = Callable[[str], object]


def export_detector(
    cfg: CfgNode,
    weights: str,
    output: str | os.PathLike[str],
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    int4: bool = False,
    tensorrt: bool = False,
    allow_float: Sequence[str] = (),
    config_name: str = "",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Writes a detector's folder, whole or not at all.

    Args:
        cfg: config that the checkpoint was trained with; not changed.
        weights: checkpoint of quantized training. Its auxiliary path is left out.
        output: folder to write; replaced if it is an exported detector.
        images: for the agreement, each ``(3, H, W)`` uint8 in ``cfg.INPUT.FORMAT`` as the network reads them, of any
            size; random ones if there are none.
        int4: also writes ``model.int4.onnx``.
        tensorrt: also writes ``model.tensorrt.onnx``, see :mod:`~aqdet.export.tensorrt_graph`.
        allow_float: regexes on the names of operations before the predictions that may compute in float.
        config_name: noted in the folder.
        progress: called with lines of text.

    Returns:
        The content of ``report.json``.

    Raises:
        FileNotFoundError, ValueError: in one line, naming the layer, file or config key.
    """
    output = Path(output)
    _check_target(output)
    progress(f"loading {weights}")
    if not cfg.MODEL.QUANT.ENABLED:
        raise ValueError("MODEL.QUANT.ENABLED is False: a float detector has no integers to export")
    model = load_detector(cfg, weights, device="cpu")
    program = extract(model)
    flavours = {}
    if tensorrt:
        flavours[TENSORRT_MODEL] = build_tensorrt(program)
    if int4:
        flavours[INT4_MODEL] = build_onnx(program, int4=True)
    rows = operation_rows(program)
    graph = build_onnx(program)
    executed = check_integer(graph, allow_float)
    progress(f"{len(rows)} operations, all on integers up to the predictions")
    random = not images
    if random:
        images = [np.random.default_rng(0).integers(0, 256, (3, 128, 160), dtype=np.uint8)]
    padded = [pad_image(program, image) for image in images]
    agreement = compare(model, program, padded, progress, tensorrt=tensorrt)
    report = {
        "onnxruntime": onnxruntime.__version__,
        "executed": executed,
        "tightest": tightest(rows),
        "agreement": {"images": len(images), "random": random, "values": [dataclasses.asdict(d) for d in agreement]},
        "operations": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        progress("writing")
        (aside / MODEL).write_bytes(graph.SerializeToString())
        save_program(program, aside / PACKED)
        files = [MODEL, PACKED, *flavours]
        for name, flavour in flavours.items():
            (aside / name).write_bytes(flavour.SerializeToString())
        report["sizes"] = _sizes(model, aside, files)
        content = describe_detector(cfg, model, program, rows, progress)
        content["source"] = {
            "config": config_name,
            "weights_sha256": _sha256(weights),
            "aqdet_version": __version__,
        }
        (aside / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (aside / "report.md").write_text(markdown(report), encoding="utf-8")
        write_description(aside, content, files)
        _publish(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return report


def check_integer(graph: onnx.ModelProto, allow_float: Sequence[str] = ()) -> dict[str, int]:
    """Operators of the graph that ONNX Runtime executes, with their numbers.

    Raises:
        ValueError: naming them, if operations that do not come after a prediction compute in float.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "optimized.onnx")
        runtime_session(graph, optimize=True, optimized_path=path)
        nodes = onnx.load(path).graph.node
    predicted: set[str] = set()
    floats = []
    for node in nodes:
        if node.op_type == "MatMulInteger" or any(name in predicted for name in node.input):
            predicted.update(node.output)
        elif node.op_type not in INTEGER_KINDS:
            name = re.sub(r"_token_\d+$", "", node.output[0])  # which layout changes add
            if not any(re.search(pattern, name) for pattern in allow_float):
                floats.append(f"{name} ({node.op_type})")
    if floats:
        more = f" and {len(floats) - 8} more" * (len(floats) > 8)
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} computes {', '.join(floats[:8])}{more} in float: use another "
            "version of it, or allow them by name (--allow-float)"
        )
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def pad_image(program: Program, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``(3, H, W)`` with rows and columns of the code of zero, up to multiples of the size divisibility."""
    bottom, right = (-side % program.size_divisibility for side in image.shape[1:])
    padded = [
        np.pad(channel, ((0, bottom), (0, right)), constant_values=value)
        for channel, value in zip(image, pad_values(program), strict=True)
    ]
    return np.stack(padded)


def pad_values(program: Program) -> tuple[int, ...]:
    """The code of zero of each image channel."""
    return next(operation.values for operation in program.operations if isinstance(operation, PadImage))


def describe_detector(
    cfg: CfgNode, model: Any, program: Program, rows: list[dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    """The content of ``detector.json``, see :mod:`aqdet.runtime.folder`.

    Raises:
        ValueError: naming the config key, for anchors that the runtime does not know.
    """
    strides = [output.stride for output in program.outputs]
    decode: dict[str, Any] = {
        "score_threshold": float(model.test_score_thresh),
        "topk_candidates": int(model.test_topk_candidates),
        "nms_threshold": float(model.test_nms_thresh),
        "max_detections": int(model.max_detections_per_image),
    }
    if isinstance(model, QuantFCOS):
        # A point a location, which Detectron2 describes by a square as large as the stride.
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
        sizes, ratios = (_broadcast(values, len(strides)) for values in (anchors.SIZES, anchors.ASPECT_RATIOS))
        offset = anchors.OFFSET
        decode["box_weights"] = [float(weight) for weight in model.box2box_transform.weights]
        decode["scale_clamp"] = float(model.box2box_transform.scale_clamp)
    outputs = []
    for output in program.outputs:
        entry: dict[str, Any] = {"logits": output.logits, "deltas": output.deltas, "stride": output.stride}
        if output.centerness:
            entry["centerness"] = output.centerness
        outputs.append(entry)
    classes, ids = _classes(cfg, model.num_classes, progress)
    return {
        "architecture": FCOS if isinstance(model, QuantFCOS) else RETINANET,
        "classes": classes,
        "category_ids": ids,
        "input": {
            "format": cfg.INPUT.FORMAT,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "size_divisibility": program.size_divisibility,
            "pad_value": list(pad_values(program)),
        },
        "anchors": {"sizes": sizes, "aspect_ratios": ratios, "strides": strides, "offset": float(offset)},
        "decode": decode,
        "outputs": outputs,
        "layers": rows,
    }


def _broadcast(values: Sequence[Sequence[float]], levels: int) -> list[list[float]]:
    lists = [[float(value) for value in row] for row in values]
    return lists * levels if len(lists) == 1 else lists


def _classes(cfg: CfgNode, number: int, progress: Progress) -> tuple[list[str], list[int | None]]:
    """Names of the classes and their ids in the training set or, where that is not to be had, the test set."""
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


# --- files ---


def _check_target(output: Path) -> None:
    if output.exists() and not (output.is_dir() and ((output / DESCRIPTION).is_file() or not any(output.iterdir()))):
        raise ValueError(f"--output {str(output)!r} exists and is no exported detector: name another folder")


def _publish(aside: Path, output: Path) -> None:
    """Flushes a finished folder to disk and gives it its name; a former export makes way, or stays if that fails."""
    aside.chmod(0o755)
    for path in (*aside.iterdir(), aside):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    former = None
    if output.exists():
        former = output.with_name(f"{aside.name}.former")
        os.replace(output, former)
    try:
        os.replace(aside, output)
    except OSError:
        if former is not None:
            os.replace(former, output)
        raise
    if former is not None:
        shutil.rmtree(former)


def _sizes(model: nn.Module, folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """Bytes of the files, and of the float32 state dict of the same detector without quantizers."""
    names = {name for name, _ in quantizers(model)}
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(TRAINING_ONLY) and key.rpartition(".")[0] not in names
    }
    float32 = sum(4 * value.numel() for value in state.values())
    sizes = {name: (folder / name).stat().st_size for name in files}
    return {"float32_state_dict": float32, **sizes, "packed_ratio": float32 / sizes[PACKED]}


def _sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- report ---


def agreement_totals(agreement: dict[str, Any]) -> list[dict[str, Any]]:
    """Sums over the codes of each execution."""
    totals = []
    for execution in _executions(agreement):
        found = [Difference(**entry) for entry in agreement["values"] if entry["execution"] == execution]
        codes = [d for d in found if not d.is_prediction]
        totals.append(
            {
                "execution": execution,
                "codes": sum(d.count for d in codes),
                "local": sum(d.local for d in codes),
                "whole": sum(d.whole for d in codes),
                "largest": max((d.largest for d in codes), default=0),
                "unexplained": sum(d.unexplained for d in codes),
                "largest_prediction": max((d.largest for d in found if d.is_prediction), default=0),
            }
        )
    return totals


def _executions(agreement: dict[str, Any]) -> list[str]:
    """Those that were compared, in order."""
    names = {entry["execution"] for entry in agreement["values"]}
    return [execution for execution in EXECUTIONS if execution in names]


def markdown(report: dict[str, Any]) -> str:
    """``report.md``: sizes, types, bounds and agreement."""
    sizes, worst, agreement = report["sizes"], report["tightest"], report["agreement"]
    lines = ["# Exported detector", "", "## Size", "", "| | bytes | of float32 |", "|---|---|---|"]
    for name, size in sizes.items():
        if name != "packed_ratio":
            lines.append(f"| {name} | {size:,} | 1/{sizes['float32_state_dict'] / size:.2f} |")
    executed = ", ".join(f"{count} {kind}" for kind, count in report["executed"].items())
    lines += [
        "",
        "## Operations",
        "",
        f"ONNX Runtime {report['onnxruntime']} executes {executed}. Float only after a prediction's int32 sums.",
        "",
        f"Tightest int32 sum: {worst['path']} {worst['level']} with at most {worst['accumulator_bound']:,}, "
        f"{(2**31 - 1) / worst['accumulator_bound']:.1f} times less than int32 holds.",
        "",
        "| operation | kind | types | sum at most, by bits | by codes |",
        "|---|---|---|---|---|",
    ]
    for row in report["operations"]:
        bounds = ["", ""]
        if row["kind"] == "conv":
            bounds = [f"{row['accumulator_bound_by_bits']:,}", f"{row['accumulator_bound']:,}"]
        lines.append(f"| {row['output']} | {row['kind']} | {row['types']} | {bounds[0]} | {bounds[1]} |")
    source = "a random image" if agreement["random"] else f"{agreement['images']} images"
    lines += [
        "",
        f"## Agreement with the integer reference, on {source}",
        "",
        "local: codes that differ where the reference is given the execution's own inputs; not explained: those that",
        "nothing excuses, which in what computes in float32 a rounding tie does. whole: codes that differ from the",
        "image on; an early one changes what follows.",
        "",
        "| execution | codes | local | not explained | largest | whole | predictions, largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for total in agreement_totals(agreement):
        lines.append(
            f"| {total['execution']} | {total['codes']:,} | {_share(total['local'], total['codes'])} "
            f"| {total['unexplained']} | {total['largest']:g} | {_share(total['whole'], total['codes'])} "
            f"| {total['largest_prediction']:.1e} |"
        )
    executions = _executions(agreement)
    lines += ["", "Local differences by value:", "", f"| value | {' | '.join(executions)} |"]
    lines.append("|---" * (1 + len(executions)) + "|")
    by_value: dict[str, dict[str, Difference]] = {}
    for entry in agreement["values"]:
        difference = Difference(**entry)
        by_value.setdefault(difference.value, {})[difference.execution] = difference
    for value, found in by_value.items():
        cells = [_cell(found.get(execution)) for execution in executions]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.is_prediction:
        return f"{difference.largest:.1e} largest"
    return _share(difference.local, difference.count)


def _share(part: int, whole: int) -> str:
    return "0" if part == 0 else f"{part / whole:.1e}"
