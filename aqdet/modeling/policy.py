"""The choice of quantizers for each layer: defaults by role, exceptions by rules on the module's name."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..layers import LAYER_KINDS, QuantAdd, Site, StreamQuantizer, quantized_form, weighted_layers
from ..quantization import QuantSpec
from ..quantization.spec import MAX_BITS, MIN_BITS, ODD, ODD_MAX_BITS

logger = logging.getLogger(__name__)

RULE_KEYS = {
    "ENABLED": bool,
    "WEIGHT.QUANTIZER": str,
    "WEIGHT.NUM_BITS": int,
    "WEIGHT.PER_CHANNEL": bool,
    "WEIGHT.CENTERED": bool,
    "INPUT.QUANTIZER": str,
    "INPUT.NUM_BITS": int,
}
"""Key that a rule can set -> type of its value."""


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
        residual: method and bits of sums, and of tensors that several layers read.
    """

    defaults: dict[str, Any]
    boundary_num_bits: int
    rules: tuple[Rule, ...]
    residual: tuple[str, int]

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
            "WEIGHT.CENTERED": quant.WEIGHT.CENTERED,
            "INPUT.QUANTIZER": quant.INPUT.QUANTIZER,
            "INPUT.NUM_BITS": quant.INPUT.NUM_BITS,
        }
        residual = (quant.RESIDUAL_QUANTIZER, quant.RESIDUAL_NUM_BITS)
        return cls(defaults, quant.BOUNDARY_NUM_BITS, tuple(rules), residual)

    def winning_rule(self, name: str) -> int | None:
        """Returns the index of the first rule whose pattern is found in a layer's name, or None."""
        for index, rule in enumerate(self.rules):
            if rule.pattern.search(name):
                return index
        return None

    def leaves_in_float(self, name: str) -> bool:
        """Returns whether a rule switches the quantization of a layer off."""
        index = self.winning_rule(name)
        return index is not None and not self.rules[index].overrides.get("ENABLED", True)

    def specs(self, name: str, site: Site) -> tuple[QuantSpec, QuantSpec | None] | None:
        """Returns the specs of weight and input quantizer of a layer; None to leave it in float.

        The input spec is None for the stem, which reads the uint8 image. Weights of more bits than ``lsqodd`` takes, as
        the boundary layers', are LSQ's where the config has ``lsqodd``.

        Raises:
            ValueError: in one line, naming the layer.
        """
        if self.leaves_in_float(name):
            return None
        values = dict(self.defaults)
        if site.role != "inner":
            values["WEIGHT.NUM_BITS"] = values["INPUT.NUM_BITS"] = self.boundary_num_bits
        index = self.winning_rule(name)
        if index is not None:
            values.update(self.rules[index].overrides)
        if values["WEIGHT.QUANTIZER"] == ODD and values["WEIGHT.NUM_BITS"] > ODD_MAX_BITS:
            values["WEIGHT.QUANTIZER"], values["WEIGHT.CENTERED"] = "lsq", False
        try:
            weight = QuantSpec(
                values["WEIGHT.QUANTIZER"],
                values["WEIGHT.NUM_BITS"],
                "weight",
                per_channel=values["WEIGHT.PER_CHANNEL"],
                centered=values["WEIGHT.CENTERED"],
            )
            if site.role == "stem":
                return weight, None
            input = QuantSpec(values["INPUT.QUANTIZER"], values["INPUT.NUM_BITS"], "input", signed=site.signed)
        except ValueError as error:
            raise ValueError(f"MODEL.QUANT for layer {name}: {error}") from error
        return weight, input

    def apply(self, module: nn.Module, prefix: str) -> None:
        """Converts a module in place: its sums, its shared tensors, and every layer with a weight.

        Args:
            module: part of a model whose layers with a weight all have a declared site and a quantized form, but
                for those that a rule leaves in float.
            prefix: dotted name of the part in the model, ending in a dot.

        Raises:
            ValueError: naming the layer, if one has no site or no quantized form, or a spec is not valid.
        """
        for name, child in module.named_modules():
            if isinstance(child, (QuantAdd, StreamQuantizer)):
                try:
                    child.quantize(*self.residual)
                except ValueError as error:
                    raise ValueError(f"MODEL.QUANT.RESIDUAL for {prefix}{name}: {error}") from error
        for name, layer in list(weighted_layers(module)):
            if self.leaves_in_float(prefix + name):
                logger.warning("%s stays in float by MODEL.QUANT.RULES", prefix + name)
                continue
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], self._converted(layer, prefix + name))

    def _converted(self, layer: nn.Module, name: str) -> nn.Module:
        form = quantized_form(layer)
        if form is None:
            kinds = ", ".join(kind.__name__ for kind in LAYER_KINDS)
            raise ValueError(
                f"layer {name} ({type(layer).__name__}) has a weight and no quantized form, which {kinds} have: "
                "MODEL.QUANT.RULES with ENABLED False leaves it in float"
            )
        site: Site | None = getattr(layer, "quant_site", None)
        if site is None:
            raise ValueError(f"layer {name} ({type(layer).__name__}) has no declared quantization site")
        specs = self.specs(name, site)
        assert specs is not None
        try:
            converted = form.from_float(layer, *specs)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"MODEL.QUANT for layer {name}: {error}") from error
        converted.quant_site = site  # type: ignore[assignment]
        return converted

    def check_rules(self, model: nn.Module) -> None:
        """Checks that every rule wins for at least one layer of the whole model, and that rules reach all of it.

        Raises:
            ValueError: in one line, for a rule that decides for no layer, with the earlier ones that decide for all
                that it matches or the layers that rules can match; for a rule on the input of the stem alone; or for a
                layer without a site, such as one of a backbone that is not ours.
        """
        sites: dict[str, Site | None] = {}
        for name, layer in weighted_layers(model):
            sites[name] = getattr(layer, "quant_site", None)
            if sites[name] is None and not self.leaves_in_float(name):
                raise ValueError(
                    f"MODEL.QUANT.ENABLED is True but layer {name} ({type(layer).__name__}) has no declared "
                    "quantization site: MODEL.BACKBONE.NAME must be a build_quant_* one"
                )
        names = list(sites)
        for index, rule in enumerate(self.rules):
            decided = [name for name in names if self.winning_rule(name) == index]
            decided_sites = [sites[name] for name in decided]
            reads_image = bool(decided) and all(site is not None and site.role == "stem" for site in decided_sites)
            if reads_image and any(key.startswith("INPUT.") for key in rule.overrides):
                raise ValueError(
                    f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} sets INPUT keys for {decided[0]} alone, "
                    "which reads the uint8 image and has no input quantizer"
                )
            if not decided:
                matched = [name for name in names if rule.pattern.search(name)]
                if matched:
                    winners = sorted({winner for name in matched if (winner := self.winning_rule(name)) is not None})
                    named = ", ".join(f"RULES[{winner}] {self.rules[winner].pattern.pattern!r}" for winner in winners)
                    raise ValueError(
                        f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} decides for no layer: of the "
                        f"{len(matched)} that it matches, {matched[0]} the first, it is shadowed by {named}; the first "
                        "rule that matches wins, so put the narrower one before"
                    )
                shown = ", ".join(names[:12])
                more = f" and {len(names) - 12} more (tools/plan.py lists them)" * (len(names) > 12)
                raise ValueError(
                    f"MODEL.QUANT.RULES[{index}] {rule.pattern.pattern!r} decides for no layer; "
                    f"layers are {shown}{more}"
                )


def quantizable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers with a declared site, converted or not, with their names."""
    for name, layer in weighted_layers(model):
        if hasattr(layer, "quant_site"):
            yield name, layer


def quantize_head(cfg: CfgNode, head: nn.Module, backbone: nn.Module) -> None:
    """Quantizes the one head of a model if ``MODEL.QUANT`` is enabled; its backbone is quantized already.

    Raises:
        ValueError: in one line, for a rule that matches no layer of either, or a config value that is not valid.
    """
    if cfg.MODEL.QUANT.ENABLED:
        policy = QuantPolicy.from_config(cfg)
        policy.apply(head, "head.")
        policy.check_rules(nn.ModuleDict({"backbone": backbone, "head": head}))
