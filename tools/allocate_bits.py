#!/usr/bin/env python
"""Gives each part of a detector its bits, for the least measured cost within a budget, and writes a config that trains.

It reads sensitivity.json of tools/sensitivity.py. Weights and inputs of a part get the same bits. The stem, the
prediction layers and the tensors that several layers read keep the bits of the config, and are in no budget.

    python tools/allocate_bits.py --config-file configs/quickstart/retinanet_r18_lsq_w4a4.yaml \\
        --sensitivity output/sensitivity/sensitivity.json --budget-bits 2.5 --output output/w2.5.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from aqdet.utils.arguments import add_overrides, add_plan_size, file_to_read, file_to_write, number
from aqdet.utils.console import run_console
from aqdet.utils.files import refuse_replacing, write_text

if TYPE_CHECKING:
    from aqdet.analysis.sensitivity import Sensitivity

_SIZES = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def size_in_bytes(text: str) -> float:
    """Returns the bytes of a size such as ``1.5MB``."""
    match = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", text)
    if not match or match[2].upper() not in _SIZES or match[1].count(".") > 1 or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 1.5MB, got {text!r}")
    return float(match[1]) * _SIZES[match[2].upper()]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="config that the new one is based on")
    parser.add_argument("--sensitivity", type=file_to_read, required=True, metavar="FILE", help="sensitivity.json")
    parser.add_argument("--output", type=file_to_write, required=True, metavar="YAML", help="config to write")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-bits", type=number(2, 8), help="average bits, by bit operations")
    budget.add_argument("--budget-size", type=size_in_bytes, metavar="1.5MB", help="size of the packed weights")
    budget.add_argument("--budget-gbops", type=number(0, 1e9), help="billions of bit operations for one image")
    budget.add_argument("--max-loss", type=number(0, 1e9), help="sum of the measured costs; as few operations as that")
    add_plan_size(parser, "image of the plans that are printed, in pixels")
    add_overrides(parser)
    return parser.parse_args()


def read_sensitivity(path: str) -> Sensitivity:
    """Reads the results of tools/sensitivity.py."""
    from aqdet.analysis.sensitivity import Sensitivity

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        costs = {group: {int(bits): cost for bits, cost in of.items()} for group, of in content["costs"].items()}
        return Sensitivity(content["baseline"], content["layers"], content["macs"], content["weights"], costs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not written by tools/sensitivity.py: {type(error).__name__}: {error}") from error


def rules_of(found: Sensitivity, bits: dict[str, int]) -> list[list[Any]]:
    """Returns rules for ``MODEL.QUANT.RULES``, one for the layers of each bit width."""
    by_bits: dict[int, list[str]] = {}
    for group, width in bits.items():
        by_bits.setdefault(width, []).extend(found.layers[group])
    return [
        [f"^({'|'.join(re.escape(name) for name in names)})$", {"WEIGHT.NUM_BITS": width, "INPUT.NUM_BITS": width}]
        for width, names in sorted(by_bits.items())
    ]


def main() -> None:
    args = parse_args()
    import yaml
    from detectron2.modeling import build_model
    from tabulate import tabulate

    from aqdet.analysis.allocation import Budget, allocate, average_bits
    from aqdet.analysis.plan import make_plan, total
    from aqdet.config import load_config
    from aqdet.data import complete_num_classes
    from aqdet.engine import check_config, fit_to_machine
    from aqdet.modeling import QuantPolicy

    def plan(path: str) -> Any:
        cfg = load_config(path, args.opts)
        check_config(cfg)
        fit_to_machine(cfg)
        complete_num_classes(cfg)
        return total(make_plan(build_model(cfg), tuple(args.size)), "float", "quantized")

    try:
        refuse_replacing([("--output", args.output)], [args.config_file, args.sensitivity])
        before = plan(args.config_file)
        found = read_sensitivity(args.sensitivity)
        bit_ops = None if args.budget_gbops is None else args.budget_gbops * 1e9
        cfg = load_config(args.config_file, args.opts)
        policy = QuantPolicy.from_config(cfg)
        allocated = [name for group in found.layers.values() for name in group]
        if ruled := [name for name in allocated if policy.winning_rule(name) is not None]:
            raise ValueError(
                f"MODEL.QUANT.RULES of {args.config_file} decide for {ruled[0]}, which {args.sensitivity} has "
                "measured: measure again with this config, or take one without rules"
            )
        bits = allocate(found, Budget(args.budget_bits, args.budget_size, bit_ops, args.max_loss))
        name = os.path.splitext(os.path.basename(args.output))[0]
        content = {
            "_BASE_": os.path.abspath(args.config_file),
            "MODEL": {"QUANT": {"ENABLED": True, "RULES": [*cfg.MODEL.QUANT.RULES, *rules_of(found, bits)]}},
            "OUTPUT_DIR": f"output/{name}",
        }
        comment = (
            f"# Written by tools/allocate_bits.py: {average_bits(found, bits):.2f} bits on average by operations.\n"
        )
        write_text(args.output, comment + yaml.safe_dump(content, sort_keys=False, width=110))
        after = plan(args.output)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    cells = [[group, width, found.costs[group][width]] for group, width in bits.items()]
    print(tabulate(cells, ["part", "bits", "measured cost"], floatfmt=".3g"))
    header = ["config", "weight bytes", "GMACs", "Gbit-ops"]
    plans = ((args.config_file, before), (args.output, after))
    cells = [[path, t.weight_bytes, t.macs / 1e9, t.bit_ops / 1e9] for path, t in plans]
    print(f"\nThe detector as shipped, for one image of {args.size[0]}x{args.size[1]}:")
    print(tabulate(cells, header, floatfmt=".2f", intfmt=","))
    print(f"\nTrain it: python tools/train_net.py --config-file {args.output}")


if __name__ == "__main__":
    run_console(main)
