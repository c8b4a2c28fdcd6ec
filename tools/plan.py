#!/usr/bin/env python
"""Prints the quantization plan of a config, without training: a row a layer, then totals."""

import argparse
import dataclasses
import sys

from aqdet.utils.arguments import add_overrides, add_plan_size, file_to_write
from aqdet.utils.console import run_console
from aqdet.utils.files import refuse_replacing, write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config of the detector")
    add_plan_size(parser, "image in pixels")
    parser.add_argument("--json", type=file_to_write, help="also write the rows and totals to this file")
    add_overrides(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # Late, so that --help opens at once.
    from detectron2.modeling import build_model
    from tabulate import tabulate

    from aqdet.analysis.plan import make_plan, total
    from aqdet.config import load_config
    from aqdet.data import complete_num_classes
    from aqdet.engine import check_config, fit_to_machine
    from aqdet.modeling.architecture import our_architectures
    from aqdet.modeling.exportable import export_obstacles

    try:
        refuse_replacing([("--json", args.json)], [args.config_file])
        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        architecture, ours = cfg.MODEL.META_ARCHITECTURE, our_architectures()
        if architecture not in ours:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {architecture!r} is Detectron2's: there is a plan of {', '.join(ours)}"
            )
        fit_to_machine(cfg)
        complete_num_classes(cfg)
        rows = make_plan(build_model(cfg), tuple(args.size))
        obstacles = export_obstacles(cfg)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    header = ["layer", "kind", "weight", "input", "norm", "parameters", "MMACs", "Gbit-ops"]
    cells = [
        [
            row.name,
            row.kind,
            row.weight,
            row.input,
            row.norm,
            row.parameters,
            row.macs / 1e6,
            row.bit_ops / 1e9,
        ]
        for row in rows
    ]
    print(tabulate(cells, header, floatfmt=".2f", intfmt=","))
    parts = {
        "float": ("float",),
        "quantized": ("quantized",),
        "auxiliary (training only)": ("auxiliary",),
        "the detector as shipped": ("float", "quantized"),
    }
    totals = {name: total(rows, *keys) for name, keys in parts.items()}
    print(f"\nTotals for one image of {args.size[0]}x{args.size[1]}:")
    header = ["part", "layers", "parameters", "weight bytes", "GMACs", "Gbit-ops"]
    cells = [
        [name, t.layers, t.parameters, t.weight_bytes, t.macs / 1e9, t.bit_ops / 1e9] for name, t in totals.items()
    ]
    print(tabulate(cells, header, floatfmt=".2f", intfmt=","))
    if obstacles:
        print("\nWhat is trained with this config cannot be exported:")
        print("\n".join(f"  {obstacle}" for obstacle in obstacles))
    if args.json:
        content = {
            "rows": [dataclasses.asdict(row) for row in rows],
            "totals": {name: dataclasses.asdict(t) for name, t in totals.items()},
            "export_obstacles": obstacles,
        }
        write_json(args.json, content)


if __name__ == "__main__":
    run_console(main)
