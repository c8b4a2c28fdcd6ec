"""Torchvision ResNet weights under Detectron2's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

SCOPE = "backbone.bottom_up."
_NORMS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def convert_torchvision_resnet(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the keys of a torchvision ResNet to those of a detector's ``backbone.bottom_up``.

    Args:
        state_dict: of ``torchvision.models.resnet18/34/50/101``.

    Returns:
        The renamed weights, and the keys left out (the classifier's).

    Raises:
        ValueError: in one line, listing the keys that belong to no such ResNet.
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
