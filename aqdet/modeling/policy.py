"""Which layer gets which quantizers: defaults by role, exceptions by rules on the module path."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..layers import QuantAdd, QuantConv2d, QuantLinear, Site, StreamQuantizer
from ..quantization import QuantSpec
from ..quantization.spec import MAX_BITS, MIN_BITS

logger = logging.getLogger(__name__)

RULE_KEYS = {
    "ENABLED": bool,
    "WEIGHT.QUANTIZER": str,
    "WEIGHT.NUM_BITS": int,
    "WEIGHT.PER_CHANNEL": bool,
    "INPUT.QUANTIZER": str,
    "INPUT.NUM_BITS": int,
}
"""What a rule can set, and of which type."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One entry of ``MODEL.QUANT.RULES``."""

    pattern: re.Pattern[str]
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """The quantization part of a config, ready to be applied to modules.

    Attributes:
        defaults: values for the keys in :data:`RULE_KEYS`, for inner layers.
        boundary_num_bits: bits of the stem's weights and of the prediction convs.
        rules: first match wins.
        stream: method and bits of tensors that several layers read.
    """

    defaults: dict[str, Any]
    boundary_num_bits: int
    rules: tuple[Rule, ...]
    stream: tuple[str, int]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> QuantPolicy:
        """Reads ``MODEL.QUANT``.

        Raises:
            ValueError: in one line, for a malformed rule, naming it and the valid keys, or for bits out of range.
        """
        quant = cfg.MODEL.QUANT
        for key in ("BOUNDARY_NUM_BITS", "RESIDUAL_NUM_BITS"):
            if not MIN_BITS <= quant[key] <= MAX_BITS:
                raise ValueError(f"MODEL.QUANT.{key} must be from {MIN_BITS} to {MAX_BITS}, got {quant[key]}")
        rules = []
        for index, entry in enumerate(quant.RULES):
            name = f"MODEL.QUANT.RULES[{index}]"
            if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
                raise ValueError(f"{name} must be [regex, {{key: value}}], got {entry!r}")
            pattern, overrides = entry
            if not isinstance(pattern, str) or not isinstance(overrides, dict):
                raise ValueError(f"{name} must be [regex, {{key: value}}], got {entry!r}")
            for key, value in overrides.items():
                if key not in RULE_KEYS:
                    raise ValueError(f"{name}: unknown key {key!r}, valid keys are {', '.join(RULE_KEYS)}")
                if type(value) is not RULE_KEYS[key]:
                    raise ValueError(f"{name}: {key} must be of type {RULE_KEYS[key].__name__}, got {value!r}")
            try:
                rules.append(Rule(re.compile(pattern), dict(overrides)))
            except re.error as error:
                raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from error
        defaults = {
            "ENABLED": True,
            "WEIGHT.QUANTIZER": quant.WEIGHT.QUANTIZER,
            "WEIGHT.NUM_BITS": quant.WEIGHT.NUM_BITS,
            "WEIGHT.PER_CHANNEL": quant.WEIGHT.PER_CHANNEL,
            "INPUT.QUANTIZER": quant.INPUT.QUANTIZER,
            "INPUT.NUM_BITS": quant.INPUT.NUM_BITS,
        }
        stream = (quant.RESIDUAL_QUANTIZER, quant.RESIDUAL_NUM_BITS)
        return cls(defaults, quant.BOUNDARY_NUM_BITS, tuple(rules), stream)

    def winning_rule(self, path: str) -> int | None:
        """Index of the first rule whose pattern is found in ``path``, or None."""
        for index, rule in enumerate(self.rules):
            if rule.pattern.search(path):
                return index
        return None

    def specs(self, path: str, site: Site) -> tuple[QuantSpec, QuantSpec | None] | None:
        """Specs of weight and input quantizer of a layer; None to leave it in float.

        The input spec is None for the stem, which reads the uint8 image.

        Raises:
            ValueError: in one line, naming the layer.
        """
        values = dict(self.defaults)
        if site.role != "inner":
            values["WEIGHT.NUM_BITS"] = values["INPUT.NUM_BITS"] = self.boundary_num_bits
        index = self.winning_rule(path)
        if index is not None:
            values.update(self.rules[index].overrides)
        if not values["ENABLED"]:
            return None
        try:
            weight = QuantSpec(
                values["WEIGHT.QUANTIZER"],
                values["WEIGHT.NUM_BITS"],
                "weight",
                per_channel=values["WEIGHT.PER_CHANNEL"],
            )
            if site.role == "stem":
                return weight, None
            input = QuantSpec(values["INPUT.QUANTIZER"], values["INPUT.NUM_BITS"], "input", signed=site.signed)
        except ValueError as error:
            raise ValueError(f"MODEL.QUANT for layer {path}: {error}") from error
        return weight, input

    def apply(self, module: nn.Module, prefix: str) -> None:
        """Converts a module in place: its declared layers, sums and streams.

        Args:
            module: part of a model whose convolutions and fully connected layers all have a declared site.
            prefix: dotted path of the part in the model, ending in a dot.

        Raises:
            ValueError: naming the layer, if one has no site or a spec is not valid.
        """
        for name, child in list(module.named_modules()):
            path = prefix + name
            if isinstance(child, (QuantAdd, StreamQuantizer)):
                try:
                    child.quantize(*self.stream, path)
                except ValueError as error:
                    raise ValueError(f"MODEL.QUANT.RESIDUAL for {path}: {error}") from error
            elif isinstance(child, (nn.Conv2d, nn.Linear)):
                site = getattr(child, "quant_site", None)
                if site is None:
                    raise ValueError(f"layer {path} ({type(child).__name__}) has no declared quantization site")
                specs = self.specs(path, site)
                if specs is None:
                    logger.warning("%s stays in float by MODEL.QUANT.RULES", path)
                    continue
                try:
                    if isinstance(child, nn.Conv2d):
                        layer: nn.Module = QuantConv2d.from_float(child, *specs, path=path)
                    else:
                        layer = QuantLinear.from_float(child, *specs, path=path)
                except ValueError as error:
                    raise ValueError(f"MODEL.QUANT for layer {path}: {error}") from error
                layer.quant_site = site  # type: ignore[assignment]
                parent = module.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], layer)

    def check_rules(self, model: nn.Module) -> None:
        """Checks that every rule wins for at least one layer of the whole model, and that rules reach all of it.

        Raises:
            ValueError: in one line, naming the rule and the earlier ones that decide for all that it matches, or
                listing the layers that rules can match; naming a rule for the input of nothing but the stem; or
                naming a layer that has no site, as those of a backbone that is not ours.
        """
        sites: dict[str, Site] = {path: layer.quant_site for path, layer in quantizable_layers(model)}  # type: ignore[misc]
        paths = list(sites)
        for path, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and path not in paths:
                raise ValueError(
                    f"MODEL.QUANT.ENABLED is True but layer {path} ({type(module).__name__}) has no declared "
                    "quantization site: MODEL.BACKBONE.NAME must be a build_quant_* one"
                )
        for index, rule in enumerate(self.rules):
            decided = [path for path in paths if self.winning_rule(path) == index]
            reads_image = bool(decided) and all(sites[path].role == "stem" for path in decided)
            if reads_image and any(key.startswith("INPUT.") for key in rule.overrides):
                raise ValueError(
                    f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} sets INPUT keys for {decided[0]} alone, "
                    "which reads the uint8 image and has no input quantizer"
                )
            if not decided:
                matched = [path for path in paths if rule.pattern.search(path)]
                if matched:
                    winners = sorted({winner for path in matched if (winner := self.winning_rule(path)) is not None})
                    named = ", ".join(f"RULES[{winner}] {self.rules[winner].pattern.pattern!r}" for winner in winners)
                    raise ValueError(
                        f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} decides for no layer: of the "
                        f"{len(matched)} that it matches, {matched[0]} the first, it is shadowed by {named}; the first "
                        "rule that matches wins, so put the narrower one before"
                    )
                shown = ", ".join(paths[:12])
                more = f" and {len(paths) - 12} more (tools/plan.py lists them)" * (len(paths) > 12)
                raise ValueError(
                    f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} decides for no layer; "
                    f"layers are {shown}{more}"
                )


def quantizable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Convolutions and fully connected layers with a declared site, converted or not, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and hasattr(module, "quant_site"):
            yield path, module
