"""Torchvision ResNet and RegNetX weights under Detectron2's ResNet's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

SCOPE = "backbone.bottom_up."
_NORMS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def convert_torchvision_resnet(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the keys of a torchvision ResNet to those of a detector's ``backbone.bottom_up``.

    Args:
        state_dict: The state dict of ``torchvision.models.resnet18/34/50/101``.

    Returns:
        The renamed weights, and the keys left out (the classifier's).

    Raises:
        ValueError: In one line, listing the keys that belong to no such ResNet.
    """
    renamed, left_out, unknown = {}, [], []
    for key, value in state_dict.items():
        if key.startswith("fc."):
            left_out.append(key)
            continue
        parts = key.split(".")
        prefix = "stem"
        stage = re.fullmatch(r"layer([1-4])", parts[0])
        if stage:
            prefix = f"res{int(stage.group(1)) + 1}.{parts[1]}"
            parts = parts[2:]
        name = None
        if parts[0] == "downsample" and len(parts) == 3:
            name = f"shortcut.{'norm.' * (parts[1] == '1')}{parts[2]}"
        elif re.fullmatch(r"conv[1-3]", parts[0]) and parts[1:] == ["weight"]:
            name = f"{parts[0]}.weight"
        elif re.fullmatch(r"bn[1-3]", parts[0]) and parts[1] in _NORMS:
            name = f"conv{parts[0][2:]}.norm.{parts[1]}"
        if name is None:
            unknown.append(key)
        else:
            renamed[f"{SCOPE}{prefix}.{name}"] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys belong to no torchvision ResNet: {', '.join(unknown[:8])}")
    return renamed, left_out


def convert_torchvision_regnet(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the keys of a torchvision RegNetX to those of a detector's ``backbone.bottom_up``.

    Args:
        state_dict: The state dict of ``torchvision.models.regnet_x_*``.

    Returns:
        The renamed weights, and the keys left out (the classifier's).

    Raises:
        ValueError: In one line, listing the keys that belong to no RegNetX, such as those of a RegNetY.
    """
    layers = {"proj": "shortcut", "f.a": "conv1", "f.b": "conv2", "f.c": "conv3"}
    renamed, left_out, unknown = {}, [], []
    for key, value in state_dict.items():
        if key.startswith("fc."):
            left_out.append(key)
            continue
        stem = re.fullmatch(r"stem\.([01])\.(\w+)", key)
        block = re.fullmatch(r"trunk_output\.block([1-4])\.block\1-(\d+)\.(proj|f\.[abc])\.([01])\.(\w+)", key)
        if stem:
            layer, (part, name) = "stem.conv1", stem.groups()
        elif block:
            stage, index, module, part, name = block.groups()
            layer = f"res{int(stage) + 1}.{index}.{layers[module]}"
        if not (stem or block) or name not in (_NORMS if part == "1" else {"weight"}):
            unknown.append(key)
            continue
        renamed[f"{SCOPE}{layer}.{'norm.' * (part == '1')}{name}"] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys belong to no torchvision RegNetX: {', '.join(unknown[:8])}")
    return renamed, left_out
