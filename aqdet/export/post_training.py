"""Comparison of a detector before and after quantization without training, and advice on whether to train."""

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
"""Loss of AP in points, and share of detections found again, up to and from which training has little to win back."""
FINE_TUNING = 5
"""Divisor of the full-precision training's learning rate for a quantized training that goes on from it."""


def match_on_images(
    cfg: Any, float_model: nn.Module, folder: str | os.PathLike[str], images: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Compares the detections of a float detector and of the exported one on images without ground truth.

    Args:
        cfg: The config of the detector.
        float_model: The float detector in evaluation mode.
        folder: The exported folder.
        images: Images resized for the network, ``(3, H, W)``.

    Returns:
        The result of :meth:`~aqdet.export.gate.Matches.summary`; ``trained`` is the float detector.
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
    """Returns the rows of a table with the full-precision detector and the quantized one.

    Args:
        report: The report of the export, see :func:`~aqdet.export.folder.export_detector`.
        matches: The comparison of the float detector's detections with the exported one's.
        label: The name of the quantized detector in the table.
    """
    rows = [["", "float", label]]
    evaluation = report.get("evaluation")
    if evaluation:
        for name, values in evaluation["metrics"].items():
            if "-" not in name:  # report.md has those of single classes
                rows.append([name, *("-" if v is None else f"{v:.1f}" for v in (values["float"], values["exported"]))])
    sizes = report["sizes"]
    rows.append(
        [
            "size, MB",
            f"{sizes['float32_state_dict'] / 1e6:.1f}",
            f"{sizes['float32_state_dict'] / sizes['ratio'] / 1e6:.1f}",
        ]
    )
    rows.append(["detections (score of 0.5 or more)", str(matches["trained"]), str(matches["exported"])])
    rows.append(["of the float ones found again", "", f"{matches['matched']} ({matched_share(matches):.1%})"])
    rows.append(["their scores differ by", "", f"{matches['mean_score_difference']:.3f} on average"])
    return rows


def matched_share(matches: Mapping[str, Any]) -> float:
    """Returns the share of the float detections that the exported detector has, too."""
    return float(matches["matched"] / matches["trained"]) if matches["trained"] else 1.0


def advice(
    report: Mapping[str, Any], matches: Mapping[str, Any], bits: int, training: str, fewer: str
) -> tuple[bool, str]:
    """Returns whether a quantized training is worth it, with the reason.

    Args:
        report, matches: See :func:`comparison`.
        bits: The bits that were asked for.
        training: The command that trains at these bits.
        fewer: The command that trains at 4 bits.

    Returns:
        Whether training is worth it, and a text for the user.
    """
    metrics = report.get("evaluation", {}).get("metrics", {})
    name = next(iter(metrics), "")
    values = metrics.get(name, {})
    if values.get("float") == 0 and name:
        return False, (
            f"Nothing is known of the loss: the float detector itself has {name} 0 on this dataset. Check --weights "
            "and --dataset, or train it longer"
        )
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
    """Returns the command that trains the quantized detector from the full-precision weights.

    Args:
        program: ``train_net.py``, or the words of a command that runs it.
        config: The config file.
        weights: The full-precision checkpoint.
        pairs: ``KEY VALUE ...`` that quantize, see :func:`aqdet.engine.post_training.quantized_overrides`.
        learning_rate: The learning rate of the full-precision training.
        overrides: ``KEY VALUE ...`` of the command line.
    """
    more = ["MODEL.AUX.ENABLED", "True", "MODEL.WEIGHTS", weights, "SOLVER.BASE_LR", f"{learning_rate / FINE_TUNING:g}"]
    return f"{program} --config-file {shlex.join([config, *pairs, *overrides, *more])}"
