"""The export of a checkpoint to a folder: builds, proves and compares, then writes aside and renames."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from detectron2.config import CfgNode
from numpy.typing import NDArray
from torch import nn

from .. import __version__
from ..checkpoint import load_detector
from ..evaluation.build import is_two_stage
from ..modeling.scaffold import SCAFFOLD_PREFIXES
from ..quantization import quantizers
from ..runtime.folder import DESCRIPTION, MODEL, read_description, write_description
from ..runtime.golden import GOLDEN, write_golden
from ..utils.files import sha256, write_json, write_text
from .c_source import CSource, build_c
from .card import model_card
from .description import graph_metadata
from .end_to_end import build_end_to_end
from .gate import NotGoodEnough, as_bgr, check_loss, dataset_records, evaluate_both
from .images import training_images
from .parts import DenseParts, parts_of, refuse_forms
from .program import Add, Program
from .proof import operation_rows, tightest
from .qonnx_graph import build_qonnx
from .report import evaluation_lines, markdown
from .tensorrt_graph import build_tensorrt
from .usage import other_domain

END_TO_END_MODEL = "model.end_to_end.onnx"
QONNX_MODEL, TENSORRT_MODEL = "model.qonnx.onnx", "model.tensorrt.onnx"
C_FILES = ("detector.c", "detector.h")
TRAINING_IMAGES = 4
"""Number of images of the training set on which ranges are measured."""
GOLDEN_SIZE = 96
"""Largest side of the golden vectors' image in pixels; the image is cut out of the first one."""
SHIFTED = 0.1
"""Share of quantizers that clip more, from which on the images are said to be of another kind."""
Progress = Callable[[str], object]


def export_detector(
    cfg: CfgNode,
    weights: str,
    output: str | os.PathLike[str],
    *,
    images: Sequence[NDArray[np.uint8]] = (),
    tensorrt: bool = False,
    end_to_end: bool = False,
    qonnx: int = 0,
    c: int = 0,
    allow_float: Sequence[str] = (),
    dataset: str = "",
    max_loss: float | None = None,
    float_model: nn.Module | None = None,
    force: bool = False,
    licence: str = "",
    config_name: str = "",
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Writes a detector's folder, completely or not at all.

    Args:
        cfg: The config that the checkpoint was trained with; it is not changed.
        weights: The checkpoint of a quantized training. Its auxiliary path is left out.
        output: The folder to write; it is replaced if it is an exported detector.
        images: Images for the comparison, each ``(3, H, W)`` uint8 in ``cfg.INPUT.FORMAT``, resized for the network.
            Without any, images of the training set are used, or random ones if that is not available.
        end_to_end: Whether to write ``model.end_to_end.onnx``, see :mod:`~aqdet.export.end_to_end`; refused for a
            two-stage detector, as the three forms that follow are.
        qonnx: Height and width in pixels of the images for which to write ``model.qonnx.onnx``, see
            :mod:`~aqdet.export.qonnx_graph`; 0 for none.
        c: Height and width in pixels of the images for which to write ``detector.c`` and ``detector.h``, see
            :mod:`~aqdet.export.c_source`; 0 for none.
        tensorrt: Whether to write ``model.tensorrt.onnx``, see :mod:`~aqdet.export.tensorrt_graph`.
        allow_float: Regexes on the names of operations before the predictions that may compute in float.
        dataset: The name of a dataset on which the trained and the exported model are evaluated; "" for none.
        max_loss: The loss of AP there, in points, that the exported model may have; None for any loss.
        float_model: The full-precision detector that the checkpoint was made from without training. It is evaluated,
            too, and ``max_loss`` is a loss of its AP.
        force: Whether to write the folder in spite of implausible ranges or a loss above ``max_loss``.
        licence: The licence of the weights, for the model card.
        config_name: The name of the config, which is recorded in the folder.
        progress: A function that is called with lines of text.

    Returns:
        The content of ``report.json``.

    Raises:
        FileNotFoundError, ValueError: In one line, naming the layer, file or config key.
        NotGoodEnough: In one line, if the detector must not ship; nothing is written.
    """
    output = Path(output)
    _check_target(output)
    if dataset:
        dataset_records(cfg, dataset)
    progress(f"loading {weights}")
    if not cfg.MODEL.QUANT.ENABLED:
        raise ValueError("MODEL.QUANT.ENABLED is False: a float detector has no integers to export")
    if is_two_stage(cfg):
        refuse_forms({"end_to_end": end_to_end, "qonnx": qonnx, "c": c, "tensorrt": tensorrt})
    model = load_detector(cfg, weights, device="cpu")
    parts = parts_of(model)
    program = parts.first
    flavours = {}
    if tensorrt:
        flavours[TENSORRT_MODEL] = build_tensorrt(program)
    if qonnx:
        flavours[QONNX_MODEL] = build_qonnx(program, qonnx, qonnx)
    plain: CSource | None = build_c(program, c, c) if c else None
    rows = [row for part in parts.programs.values() for row in operation_rows(part)]
    content = parts.describe(cfg, rows, progress)
    content["source"] = {
        "config": config_name,
        "weights": os.path.basename(weights),
        "weights_sha256": sha256(weights),
        "datasets": list(cfg.DATASETS.TRAIN),
        "aqdet_version": __version__,
    }
    graphs = parts.graphs(graph_metadata(content))
    executed = parts.executed(graphs, allow_float)
    progress(
        f"{len(rows)} operations, all on integers up to the predictions" + ", but for RoiAlign" * (len(graphs) > 1)
    )
    training = training_images(cfg, TRAINING_IMAGES, progress)
    ranges, warnings = _check_ranges(parts, training, images, force, progress)
    given, images = bool(images), images or training[:2]
    random = not images
    if random:
        images = [np.random.default_rng(0).integers(0, 256, (3, 128, 160), dtype=np.uint8)]
    agreement = parts.agreement(images, progress, tensorrt=tensorrt)
    report = {
        "onnxruntime": onnxruntime.__version__,
        "executed": executed,
        "tightest": tightest(rows),
        "agreement": {
            "images": len(images),
            "random": random,
            "training": not given and not random,
            "values": [dataclasses.asdict(d) for d in agreement],
        },
        "ranges": ranges,
        "warnings": warnings,
        "operations": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        progress("writing")
        files = [*graphs, *flavours]
        for name, written in (*graphs.items(), *flavours.items()):
            (aside / name).write_bytes(written.SerializeToString())
        if plain is not None:
            for name, text in zip(C_FILES, (plain.source, plain.header), strict=True):
                write_text(aside / name, text)
            files += C_FILES
            report["c"] = {"size": c, **plain.memory}
        report["sizes"] = _sizes(model, aside, files, list(graphs))
        write_description(aside, content, files)
        if end_to_end:
            whole = build_end_to_end(graphs[MODEL], read_description(aside))
            (aside / END_TO_END_MODEL).write_bytes(whole.SerializeToString())
            files.append(END_TO_END_MODEL)
        if dataset:
            report["evaluation"] = evaluate_both(cfg, model, aside, dataset, progress, float_model)
            progress("\n".join(evaluation_lines(report["evaluation"])[1:]))
            if max_loss is not None and not force:
                check_loss(report["evaluation"], max_loss)
        golden = as_bgr(images[0][:, :GOLDEN_SIZE, :GOLDEN_SIZE], cfg.INPUT.FORMAT)
        write_golden(aside, golden, golden_layers(program))
        files.append(GOLDEN)
        write_json(aside / "report.json", report)
        write_text(aside / "report.md", markdown(report))
        write_text(aside / "README.md", model_card(content, report, files, licence))
        write_description(aside, content, files)
        _publish(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return report


def _check_ranges(
    parts: DenseParts,
    training: Sequence[NDArray[np.uint8]],
    given: Sequence[NDArray[np.uint8]],
    force: bool,
    progress: Progress,
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Returns how much of the quantizers' ranges the training images and the given ones use, and warnings.

    Raises:
        NotGoodEnough: Naming layers, if a range cannot be right.
    """
    ranges, measured = {}, {}
    for name, images in (("training", training), ("given", given)):
        if images:
            measured[name] = parts.usage(images, progress)
            ranges[name] = [dataclasses.asdict(usage) for usage in measured[name]]
    warnings = []
    usages = measured.get("training") or measured.get("given") or []
    faults = [usage.fault for usage in usages if usage.fault]
    if faults:
        text = f"{'; '.join(faults[:4])}" + f"; and {len(faults) - 4} more" * (len(faults) > 4)
        if not force:
            raise NotGoodEnough(f"{text} (--force exports it nevertheless)")
        warnings.append(text)
    hardly = [usage.name for usage in usages if usage.is_hardly_used and not usage.fault]
    if hardly:
        warnings.append(f"little of the range of {', '.join(hardly[:4])}{', ...' * (len(hardly) > 4)} is used")
    if len(measured) == 2:
        clipping = other_domain(measured["training"], measured["given"])
        if len(clipping) > SHIFTED * len(usages):
            warnings.append(
                f"{len(clipping)} of {len(usages)} quantizers clip far more on the given images than on the training "
                f"set's, {clipping[0]} for one: the images are of another kind than the detector was trained for"
            )
    for warning in warnings:
        progress(f"warning: {warning}")
    return ranges, warnings


def golden_layers(program: Program) -> list[str]:
    """Returns the values whose codes go into the golden vectors: the first, the last, and sums between them."""
    names = [operation.output for operation in program.operations if isinstance(operation, Add)]
    codes = [conv.output for conv in program.convs() if conv.grid is not None]
    return list(dict.fromkeys([codes[0], *names[:: max(len(names) // 3, 1)], codes[-1]]))


def _check_target(output: Path) -> None:
    if output.exists() and not (output.is_dir() and ((output / DESCRIPTION).is_file() or not any(output.iterdir()))):
        raise ValueError(f"--output {str(output)!r} exists and is no exported detector: name another folder")


def _publish(aside: Path, output: Path) -> None:
    """Flushes a finished folder to disk and renames it; an earlier export is replaced, or stays if that fails."""
    for path in (*aside.iterdir(), aside):
        # Others can read the files, whatever the umask and the libraries that wrote them say.
        path.chmod(0o755 if path.is_dir() else 0o644)
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


def _sizes(model: nn.Module, folder: Path, files: Sequence[str], graphs: Sequence[str]) -> dict[str, Any]:
    """Returns the bytes of the files, and of the float32 state dict of the same detector without quantizers.

    ``ratio`` is the latter over the bytes of the graphs that are run.
    """
    names = {name for name, _ in quantizers(model)}
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(SCAFFOLD_PREFIXES) and key.rpartition(".")[0] not in names
    }
    float32 = sum(4 * value.numel() for value in state.values())
    sizes = {name: (folder / name).stat().st_size for name in files}
    return {"float32_state_dict": float32, **sizes, "ratio": float32 / sum(sizes[name] for name in graphs)}
