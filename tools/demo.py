#!/usr/bin/env python
"""Runs a detector on images, folders and videos and draws its detections, with the flags of Detectron2's demo.

    python tools/demo.py --config-file X --input IMAGES_OR_FOLDERS --output DIR --opts MODEL.WEIGHTS model_final.pth

The exit status is 1 if an input could not be read; the program prints its name, and goes on with the others.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from aqdet.utils.arguments import file_to_read, number
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    from aqdet.runtime.media import Summary


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the detector")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, videos, folders of them, glob patterns, URLs of streams")
    source.add_argument("--video-input", type=file_to_read, metavar="FILE", help="a video")
    source.add_argument("--webcam", action="store_true", help="the first camera; Escape or Ctrl-C ends it")
    parser.add_argument("--output", help="folder, or file for one input; without it a window is opened")
    parser.add_argument(
        "--confidence-threshold", type=number(0, 1), default=0.5, help="least score drawn (default: %(default)s)"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs, as for train_net.py")
    return parser.parse_args()


def run(args: argparse.Namespace) -> Summary:
    """Checks the arguments, then runs the detector."""
    # Late, so that --help opens at once.
    from aqdet.config import load_config
    from aqdet.data import complete_num_classes
    from aqdet.engine import check_config, fit_to_machine
    from aqdet.evaluation.demo import Demo
    from aqdet.runtime.media import MediaLoop, has_display
    from aqdet.runtime.sources import find_sources, output_paths

    if not args.output and not has_display():
        raise ValueError("there is no display to open a window on: say where to write with --output")
    inputs = ["0"] if args.webcam else [args.video_input] if args.video_input else args.input
    sources, others = find_sources(inputs, args.output)
    outputs = output_paths(sources, args.output) if args.output else None
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    fit_to_machine(cfg)
    complete_num_classes(cfg)
    loop = MediaLoop(Demo(cfg), threshold=args.confidence_threshold, show=outputs is None)
    if others:
        print(f"{others} files that are neither image nor video are passed over")
    return loop.run(sources, outputs)


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        summary = run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    where = f" to {args.output}" if args.output else ""
    print(
        f"{summary.detections} detections in {summary.images} images and {summary.videos} videos "
        f"({summary.frames} frames){where}"
    )
    for note in summary.notes:
        print(f"note: {note}")
    if summary.unreadable:
        lines = "\n".join(f"  {line}" for line in summary.unreadable)
        sys.exit(f"{len(summary.unreadable)} inputs could not be read:\n{lines}")


if __name__ == "__main__":
    run_console(main)
