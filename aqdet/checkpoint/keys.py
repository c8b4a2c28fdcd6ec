"""Comparison of a checkpoint's keys with a model's: the allowed differences, and the likely cause of others."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..modeling.scaffold import AUXILIARY_PREFIX, SCAFFOLD_PREFIXES
from ..quantization import quantizers

Shape = tuple[int, ...]

MISSING, UNEXPECTED, OTHER_SHAPE = "missing", "unexpected", "of another shape"
MAX_LISTED = 6
ALLOW_KEYS = "CHECKPOINT.ALLOW_KEYS takes regexes of keys that may differ"
_QUANTIZER_STATE = re.compile(r"quantizer\.(calibrated|num_bits)$")
_PREPROCESSING = ("pixel_mean", "pixel_std")
_CLASSIFIER = ("stem.fc", "fc", "pred", "linear")
_BLOCK = re.compile(r"(?:backbone\.bottom_up\.)?res([2-5])\.(\d+)\.conv([123])\.weight$")
_TOWER = re.compile(r"head\.cls_subnet\.\d+\.weight$")
_P6 = "backbone.top_block.p6.weight"


class Difference(NamedTuple):
    """A key on which a file and a model differ.

    Attributes:
        kind: :data:`MISSING`, :data:`UNEXPECTED` or :data:`OTHER_SHAPE`.
        key: The key.
        shapes: The file's shape and the model's, for the last kind.
    """

    kind: str
    key: str
    shapes: tuple[Shape, Shape] | None = None

    def __str__(self) -> str:
        detail = f" {self.shapes[0]} in the file, {self.shapes[1]} in the model" if self.shapes else ""
        return f"{self.kind} {self.key}{detail}"


class KeyComparison:
    """Sorts the differences between a file and a model into allowed ones and problems.

    Args:
        model: The model.
        stored: The keys and shapes of the file, under the model's names.
        allow: Regexes of keys that may differ.
        scope: Prefixes of the keys that the file covers; empty for a whole model.
        exact: Whether no key but a counter of batches may differ, as when a training goes on.

    Attributes:
        allowed: The number of allowed differences of each kind, by a phrase on the kind.
        problems: The other differences.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, Shape],
        *,
        allow: Sequence[re.Pattern[str]] = (),
        scope: Sequence[str] = (),
        exact: bool = False,
    ) -> None:
        self.allowed: Counter[str] = Counter()
        self.problems: list[Difference] = []
        self._stored = stored
        self._ours = shapes_of(model.state_dict())
        self._allow = allow
        self._scope = tuple(scope)
        self._exact = exact
        names = {name for name, _ in quantizers(model)}
        self._quantizer_keys = {key for key in self._ours if key.rpartition(".")[0] in names}
        self._stored_quantizers = any(_QUANTIZER_STATE.search(key) for key in stored)
        self._node = getattr(model, "node", "")

    def add(self, difference: Difference) -> None:
        """Sorts one difference."""
        group = self._why_allowed(difference)
        if group:
            self.allowed[f"{difference.kind} {group}"] += 1
        else:
            self.problems.append(difference)

    def _why_allowed(self, difference: Difference) -> str:
        kind, key, _ = difference
        module, _, name = key.rpartition(".")
        if self._exact:
            is_same = (name == "num_batches_tracked" and kind == MISSING) or (
                kind == UNEXPECTED and key in _PREPROCESSING
            )
            return name if is_same else ""
        if key.startswith(SCAFFOLD_PREFIXES) and kind != OTHER_SHAPE:
            return "of the auxiliary path" if key.startswith(AUXILIARY_PREFIX) else "of the extra head"
        if kind == MISSING and key in self._quantizer_keys and not self._stored_quantizers:
            return "of quantizers, to be calibrated"
        # Only one of the two counts batches: it has a BN where the other has a FrozenBN.
        if name == "num_batches_tracked" and (kind == MISSING or f"{module}.running_var" in self._ours):
            return name
        if kind == UNEXPECTED and key in _PREPROCESSING:
            return "of the preprocessing, which is the config's"
        if any(pattern.search(key) for pattern in self._allow):
            return "allowed by CHECKPOINT.ALLOW_KEYS"
        if kind == MISSING and self._scope and not key.startswith(self._scope):
            return f"outside the file's scope ({', '.join(self._scope)})"
        if kind == UNEXPECTED and self._scope and key.startswith(_CLASSIFIER):
            return "of the classifier"
        return ""

    def describe(self) -> str:
        """Returns one line with the first problems, the number of the others, and the way out if it is known."""
        listed = "; ".join(map(str, self.problems[:MAX_LISTED]))
        more = f"; and {len(self.problems) - MAX_LISTED} more" * (len(self.problems) > MAX_LISTED)
        way_out = self.way_out()
        return f"{listed}{more}" + f" ({way_out})" * bool(way_out)

    def way_out(self) -> str:
        """Returns a text on the cause of the problems and the config key to change; ``""`` if it is not known."""
        if any(re.match(r"(layer1\.0\.(conv1|bn1)|trunk_output\.block1)\.", key) for key in self._stored):
            return "a torchvision ResNet or RegNetX goes through tools/convert_torchvision.py first"
        if self._stored_quantizers and not self._quantizer_keys:
            return "the file is of a quantized detector, and MODEL.QUANT.ENABLED is False"
        causes = [*self._depth(), *self._norms(), *self._pyramid(), *self._head()]
        if causes:
            return "; ".join(causes)
        if not any(key in self._ours for key in self._stored):
            return "the file has none of the model's keys: it is of another kind of network"
        if self._exact:
            return "it is of another config; without --resume a training starts from MODEL.WEIGHTS"
        return ALLOW_KEYS if len(self.problems) <= MAX_LISTED else ""

    def _depth(self) -> Iterable[str]:
        theirs, ours = _resnet(self._stored), _resnet(self._ours)
        if theirs and ours and theirs != ours:
            yield f"the file has {_resnet_name(theirs)}, the model {_resnet_name(ours)}: MODEL.RESNETS.DEPTH"

    def _norms(self) -> Iterable[str]:
        parts = [("backbone.bottom_up.", "RESNETS"), ("backbone.fpn_", "FPN")]
        if self._node:
            parts.append(("head.", self._node))
        for prefix, node in parts:
            theirs, ours = (_norm_of(keys, prefix) for keys in (self._stored, self._ours))
            if theirs and ours and theirs != ours and any(p.key.startswith(prefix) for p in self.problems):
                yield f"MODEL.{node}.NORM: the file has {theirs}, the model {ours}"

    def _pyramid(self) -> Iterable[str]:
        theirs, ours = (self._stored.get(_P6), self._ours.get(_P6))
        if theirs is None or ours is None:
            return
        if theirs[0] != ours[0]:
            yield f"MODEL.FPN.OUT_CHANNELS: {theirs[0]} in the file, {ours[0]} in the model"
        elif theirs[1] != ours[1] and not any(self._depth()):
            yield "MODEL.FPN.TOP_BLOCK_IN_FEATURE: P6 reads another feature in the file than in the model"
        bias = _P6.replace("weight", "bias")
        if (bias in self._stored) != (bias in self._ours) and _norm_of(self._stored, "backbone.fpn_") == _norm_of(
            self._ours, "backbone.fpn_"
        ):
            yield f"MODEL.FPN.RELU: P6 and P7 have {'no norm' if bias in self._stored else 'norms'} in the file"

    def _head(self) -> Iterable[str]:
        """Compares the towers and the predictions of a dense detector's head."""
        if not self._node:
            return
        lengths = [
            sum(1 for key, shape in keys.items() if _TOWER.match(key) and len(shape) == 4)
            for keys in (self._stored, self._ours)
        ]
        if lengths[0] and lengths[0] != lengths[1]:
            yield f"MODEL.{self._node}.NUM_CONVS: {lengths[0]} in the file, {lengths[1]} in the model"
        outputs = [
            [keys[f"head.{name}.weight"][0] for name in ("cls_score", "bbox_pred") if f"head.{name}.weight" in keys]
            for keys in (self._stored, self._ours)
        ]
        if any(len(numbers) != 2 for numbers in outputs) or outputs[0] == outputs[1]:
            return
        (their_classes, their_anchors), (our_classes, our_anchors) = (
            (classes * 4 // boxes, boxes // 4) for classes, boxes in outputs
        )
        if their_anchors != our_anchors:
            yield f"MODEL.ANCHOR_GENERATOR: {their_anchors} anchors a place in the file, {our_anchors} in the model"
        if their_classes != our_classes:
            cause = f"MODEL.{self._node}.NUM_CLASSES: {their_classes} in the file, {our_classes} in the model"
            to_start = "; to start with new class scores, CHECKPOINT.ALLOW_KEYS \"['head.cls_score']\""
            yield cause if self._exact else cause + to_start


def without_wrapper(state: dict[str, Any], model: nn.Module) -> tuple[dict[str, Any], str]:
    """Removes what a wrapper of a model has put in front of every key, as ``module.``, ``model.`` or ``_orig_mod.``.

    Args:
        state: The state dict of a file.
        model: The model that it is loaded into.

    Returns:
        The state dict under the model's names, and the prefix; the state dict as it is and ``""`` if its keys have no
        common beginning behind which keys of the model stand.
    """
    ours = set(model.state_dict())
    # torch's AveragedModel counts beside the model.
    keys = [key for key in state if key != "n_averaged"]
    prefix = ""
    while keys and not any(key.removeprefix(prefix) in ours for key in keys):
        part, dot, _ = keys[0].removeprefix(prefix).partition(".")
        longer = f"{prefix}{part}."
        if not dot or not all(key.startswith(longer) for key in keys):
            return state, ""
        prefix = longer
    return ({key.removeprefix(prefix): state[key] for key in keys}, prefix) if prefix else (state, "")


def not_finite(state: Mapping[str, Any]) -> list[str]:
    """Returns a text for each key of a state dict, of tensors or arrays, with NaN or an infinite value.

    It is for example ``conv1.weight has nan (1 of 64 values)``. Quantizers are left out: without a range yet, their
    scale is NaN.
    """
    wrong = {key: _not_finite_in(value) for key, value in state.items() if "quantizer." not in key}
    return [
        f"{key} has {values[0]:g} ({len(values)} of {math.prod(state[key].shape)} values)"
        for key, values in wrong.items()
        if values
    ]


def _not_finite_in(value: Tensor | np.ndarray) -> list[float]:
    if isinstance(value, np.ndarray):
        return value[~np.isfinite(value)].tolist() if np.issubdtype(value.dtype, np.inexact) else []
    return value[~torch.isfinite(value)].tolist() if value.is_floating_point() else []


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Returns the shape of every entry of a state dict."""
    return {key: tuple(value.shape) for key, value in state.items()}


def _resnet(keys: Iterable[str]) -> tuple[int, ...]:
    """Returns the number of blocks of each stage and, last, of convolutions of a block; empty without a ResNet."""
    blocks: dict[str, set[str]] = {}
    num_convs = 0
    for key in keys:
        if found := _BLOCK.match(key):
            blocks.setdefault(found[1], set()).add(found[2])
            num_convs = max(num_convs, int(found[3]))
    return (*(len(blocks[stage]) for stage in sorted(blocks)), num_convs) if blocks else ()


def _resnet_name(resnet: tuple[int, ...]) -> str:
    *blocks, num_convs = resnet
    depth = 2 + num_convs * sum(blocks)
    if len(blocks) == 4 and depth in (18, 34, 50, 101, 152):
        return f"a ResNet-{depth}"
    return f"a ResNet of {'+'.join(map(str, blocks))} blocks of {num_convs} convolutions"


def _norm_of(shapes: Mapping[str, Shape], prefix: str) -> str:
    """Returns the kind of the norms of a part, by its keys; ``""`` if the part has no keys."""
    part = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    if not part:
        return ""
    if any(key.endswith(".running_mean") for key in part):
        return "BN"
    # Weights of convolutions have four dimensions, weights of norms one.
    is_norm = any(key.endswith(".weight") and len(shape) == 1 for key, shape in part.items())
    return "a norm without running statistics" if is_norm else "no norm"
