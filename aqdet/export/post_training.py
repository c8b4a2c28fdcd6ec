"""What a detector loses by quantization without training, and whether training is worth it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..evaluation.exported import to_instances
from ..runtime import Detector
from .gate import Matches, as_bgr

ENOUGH_AP, ENOUGH_MATCHED = 0.5, 0.97
"""Loss of AP, in points, and share of the detections found again, from which training has little to win back."""
FINE_TUNING = 5
"""A quantized training goes on at the learning rate of the one in full precision divided by this."""


def match_on_images(
    cfg: Any, float_model: nn.Module, folder: str | os.PathLike[str], images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Detections of a float detector and of the exported one on images without ground truth.

    Args:
        cfg: of the detector.
        float_model: in evaluation mode.
        folder: exported.
        images: as the network reads them, ``(3, H, W)``.

    Returns:
        See :meth:`~aqdet.export.gate.Matches.summary`; ``trained`` is the float detector.
    """
    detector = Detector(folder, threads=torch.get_num_threads())
    matches = Matches()
    for image in images:
        height, width = image.shape[1:]
        inputs = [{"image": torch.tensor(image), "height": height, "width": width}]
        with torch.no_grad():
            own = float_model(inputs)[0]["instances"].to("cpu")
        found = to_instances(detector(as_bgr(image, cfg.INPUT.FORMAT)), (height, width))
        matches.add(own, found, own[:0])
    return matches.summary()


def comparison(report: Mapping[str, Any], matches: Mapping[str, Any], label: str) -> list[list[str]]:
    """Rows of a table: the detector in full precision beside the quantized one.

    Args:
        report: of the export, see :func:`~aqdet.export.folder.export_detector`.
        matches: of the float detector's detections and the exported one's.
        label: of the quantized detector.
    """
    rows = [["", "float", label]]
    evaluation = report.get("evaluation")
    if evaluation:
        for name, values in evaluation["metrics"].items():
            if "-" not in name:  # those of single classes are in report.md
                rows.append([name, *("-" if v is None else f"{v:.1f}" for v in (values["float"], values["exported"]))])
    sizes = report["sizes"]
    rows.append(["size, MB", f"{sizes['float32_state_dict'] / 1e6:.1f}", f"{sizes['model.onnx'] / 1e6:.1f}"])
    rows.append(["detections (score of 0.5 or more)", str(matches["trained"]), str(matches["exported"])])
    rows.append(["of the float ones found again", "", f"{matches['matched']} ({matched_share(matches):.1%})"])
    rows.append(["their scores differ by", "", f"{matches['mean_score_difference']:.3f} on average"])
    return rows


def matched_share(matches: Mapping[str, Any]) -> float:
    """Share of the float detections that the exported detector has too."""
    return float(matches["matched"] / matches["trained"]) if matches["trained"] else 1.0


def advice(
    report: Mapping[str, Any], matches: Mapping[str, Any], bits: int, training: str, fewer: str
) -> tuple[bool, str]:
    """Whether a quantized training is worth it, in words.

    Args:
        report, matches: see :func:`comparison`.
        bits: that were asked for.
        training: command that trains at these bits.
        fewer: command that trains at 4 bits.

    Returns:
        Whether it is, and the text.
    """
    metrics = report.get("evaluation", {}).get("metrics", {})
    name = next(iter(metrics), "")
    values = metrics.get(name, {})
    if values.get("float") is not None and values.get("exported") is not None:
        loss = values["float"] - values["exported"]
        found = f"{name} falls by {max(loss, 0.0):.1f}"
        worth = not loss <= ENOUGH_AP
    elif not matches["trained"]:
        return False, (
            "Nothing is known of the loss: the float detector finds nothing in these images with a score of 0.5. Name "
            "other --images, or a --dataset"
        )
    else:
        found = f"{matched_share(matches):.1%} of the detections are found again"
        worth = matched_share(matches) < ENOUGH_MATCHED
    if worth:
        return True, f"{found}: training at {bits} bits is worth it, it wins most of that back:\n  {training}"
    text = f"{found}: {bits} bits without training are enough, training at them would win back little."
    if bits > 4:
        text += f" For a file of half the size, train at 4:\n  {fewer}"
    return False, text


def training_command(
    program: str, config: str, weights: str, pairs: Sequence[str], learning_rate: float, overrides: Sequence[str]
) -> str:
    """The command that trains the quantized detector from the weights in full precision.

    Args:
        program: ``train_net.py``, or words that run it.
        config: file.
        weights: checkpoint.
        pairs: ``KEY VALUE ...`` that quantize, see :func:`aqdet.engine.post_training.quantized_overrides`.
        learning_rate: of the training in full precision.
        overrides: ``KEY VALUE ...`` that the command line had.
    """
    more = ["MODEL.AUX.ENABLED", "True", "MODEL.WEIGHTS", weights, "SOLVER.BASE_LR", f"{learning_rate / FINE_TUNING:g}"]
    return f"{program} --config-file {shlex.join([config, *pairs, *overrides, *more])}"
