"""Loading of a detector from a config and a checkpoint, for all programs."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config import detector_only
from ..quantization import quantizers
from .checkpointer import AqdetCheckpointer


def load_detector(
    cfg: CfgNode,
    weights: str,
    *,
    device: str = "",
    quantized: bool | None = None,
    key: str = "MODEL.WEIGHTS",
    whole: bool = False,
) -> nn.Module:
    """Builds the detector of a config, without the scaffold of training, and loads a checkpoint into it.

    Args:
        cfg: The config; it is not changed.
        weights: The checkpoint of the detector, which may contain an auxiliary path.
        device: Replaces ``MODEL.DEVICE`` if it is not empty.
        quantized: Replaces ``MODEL.QUANT.ENABLED`` unless it is None.
        key: The config key that names the checkpoint, for messages.
        whole: Whether to refuse a file that lacks any floating-point key of the detector, such as a backbone's,
            whatever ``CHECKPOINT.ALLOW_KEYS`` says.

    Returns:
        The detector in evaluation mode, with a range for every quantizer.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: In one line, if the config has no detector, or the checkpoint is not safe, is damaged, does not fit
            or lacks the ranges of quantizers.
    """
    cfg = detector_only(cfg)
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    if quantized is not None:
        cfg.MODEL.QUANT.ENABLED = quantized
    model = build_model(cfg)
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if whole:
        for value in state.values():
            value.fill_(torch.nan)  # these values stay if the file lacks a key
    node = cfg.CHECKPOINT
    allow_keys = () if whole else node.ALLOW_KEYS
    AqdetCheckpointer(model, allow_keys=allow_keys, allow_pickle=node.ALLOW_PICKLE).load(weights)
    lacking = [name for name, value in state.items() if whole and value.isnan().any()]
    if lacking:
        raise ValueError(f"{weights!r} lacks {len(lacking)} of its keys, {lacking[0]} among them")
    check_calibrated(model, f"{key} {weights!r}")
    return model.eval()


def check_calibrated(model: nn.Module, origin: str) -> None:
    """Checks that every quantizer that is switched on has a range.

    Args:
        model: The model.
        origin: The origin of its weights, for the message.

    Raises:
        ValueError: In one line, naming a quantizer without a range.
    """
    pending = [name for name, quantizer in quantizers(model) if quantizer.enabled and not quantizer.is_calibrated]
    if pending:
        raise ValueError(
            f"{origin}: {len(pending)} quantizers are not calibrated, {pending[0]} among them: use a checkpoint of "
            "quantized training, or MODEL.QUANT.ENABLED False"
        )
