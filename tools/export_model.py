#!/usr/bin/env python
"""Exports a trained quantized detector: a folder that aqdet.runtime runs on integers, without PyTorch."""

from __future__ import annotations

import argparse
import os

from aqdet.utils.arguments import add_export_options, add_overrides, integer, regex
from aqdet.utils.console import errors_in_one_line, run_console, timed_lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config of the quantized training")
    parser.add_argument("--weights", help="checkpoint of quantized training (default: MODEL.WEIGHTS)")
    add_export_options(parser)
    # Each may be given several times: what follows the last option is KEY VALUE pairs.
    parser.add_argument(
        "--images", action="append", default=[], metavar="PATH", help="image or folder to measure the agreement on"
    )
    parser.add_argument("--max-images", type=integer(1), default=2, help="largest number of images (default: 2)")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="",
        help="evaluate the trained and the exported model on it (with --max-loss: the run's DATASETS.TEST by default)",
    )
    parser.add_argument(
        "--qonnx",
        type=integer(1),
        default=0,
        metavar="SIZE",
        help="also write model.qonnx.onnx, whose bits are the trained ones, for images SIZE pixels high and wide",
    )
    parser.add_argument(
        "--c",
        type=integer(1),
        default=0,
        metavar="SIZE",
        help="also write detector.c and detector.h, C99 without libraries, for images SIZE pixels high and wide",
    )
    parser.add_argument(
        "--tensorrt",
        action="store_true",
        help="experimental: also write model.tensorrt.onnx, signed 8 bits with zero points 0; checked in ONNX Runtime, "
        "never run in TensorRT",
    )
    parser.add_argument(
        "--allow-float",
        type=regex,
        action="append",
        default=[],
        metavar="REGEX",
        help="operations that may compute in float, by name",
    )
    add_overrides(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    say = timed_lines()
    with errors_in_one_line():
        # Late, so that --help opens at once; and ONNX is an extra, whose absence is to be a line as other errors are.
        from aqdet.config import load_config
        from aqdet.data import complete_num_classes
        from aqdet.engine import check_config, fit_to_machine
        from aqdet.export.folder import export_detector
        from aqdet.export.images import images_of
        from aqdet.export.report import agreement_totals

        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        fit_to_machine(cfg)
        complete_num_classes(cfg)
        weights = args.weights or cfg.MODEL.WEIGHTS
        if not weights:
            raise ValueError("--weights: name a checkpoint of quantized training")
        dataset = args.dataset
        if args.max_loss is not None and not dataset:
            if len(cfg.DATASETS.TEST) != 1:
                raise ValueError("--max-loss: name the --dataset, since DATASETS.TEST does not have exactly one")
            dataset = cfg.DATASETS.TEST[0]
        report = export_detector(
            cfg,
            weights,
            args.output,
            images=images_of(cfg, args.images, args.max_images),
            dataset=dataset,
            max_loss=args.max_loss,
            force=args.force,
            licence=args.licence,
            qonnx=args.qonnx,
            c=args.c,
            tensorrt=args.tensorrt,
            end_to_end=args.end_to_end,
            allow_float=args.allow_float,
            config_name=os.path.basename(args.config_file),
            progress=say,
        )
    print("Codes that differ from the integer reference, given the same inputs:")
    for total in agreement_totals(report["agreement"]):
        share = total["local"] / max(total["codes"], 1)
        far = total["unexplained"]
        print(f"  {total['execution']}: {share:.1e} of {total['codes']:,}, {far} of them not at a rounding tie")
    worst = report["tightest"]
    layer = f"{worst['layer']} {worst['level']}".strip()
    print(f"Tightest int32 sum: {layer}, at most {worst['accumulator_bound']:,}")
    sizes = report["sizes"]
    megabytes = sizes["float32_state_dict"] / 1e6
    print(f"Network: {megabytes / sizes['ratio']:.2f} MB, 1/{sizes['ratio']:.1f} of {megabytes:.2f} MB in float32")
    if "c" in report:
        memory = ", ".join(f"{report['c'][key]:,} bytes of {key}" for key in ("arena", "outputs", "flash"))
        print(f"detector.c: {memory}")
    say(f"done: {args.output} (README.md, detector.json, report.md)")


if __name__ == "__main__":
    run_console(main)
