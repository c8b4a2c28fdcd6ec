#!/usr/bin/env python
"""Writes one HTML page, complete in itself, about a run or comparing several.

    python tools/report.py OUTPUT_DIR [OUTPUT_DIR ...] [--output report.html]

Start it where the trainings were started if their data was given by relative paths, or say where the data is by
``--opts DATASETS.DECLARED ...``. What a folder lacks is said in the log and on the page.
"""

import argparse
import logging
import sys
from pathlib import Path

from aqdet.utils.arguments import file_to_read, file_to_write, integer, number
from aqdet.utils.console import run_console
from aqdet.utils.files import write_text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output_dirs", nargs="+", metavar="OUTPUT_DIR", help="folder of a training; the first is the reference"
    )
    parser.add_argument(
        "--output", type=file_to_write, default="report.html", help="file to write (default: %(default)s)"
    )
    parser.add_argument("--config-file", type=file_to_read, help="read in place of each folder's config.yaml")
    parser.add_argument(
        "--min-score", type=number(0, 1), default=0.5, help="lowest score in pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=integer(0), default=4, help="number of worst and of best images (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=integer(0), default=4, help="test images to observe activations on (default: %(default)s)"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every config")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    there = Path(args.output)
    if there.exists() and not there.read_bytes()[:100].lstrip().lower().startswith(b"<!doctype html"):
        sys.exit(f"error: --output {args.output} would replace a file that is no report: name another one")
    # Late, so that --help opens at once.
    from aqdet.engine import fit_to_machine
    from aqdet.report import load_runs, make_report

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("aqdet.report").setLevel(logging.INFO)
    try:
        runs = load_runs(args.output_dirs, config_file=args.config_file or "", overrides=args.opts)
        for run in runs:
            if run.cfg is not None:
                fit_to_machine(run.cfg)
        text = make_report(runs, min_score=args.min_score, num_pictures=args.pictures, num_images=args.images)
        write_text(args.output, text)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{args.output}: {len(text) / 1e6:.1f} MB, {len(runs)} runs")


if __name__ == "__main__":
    run_console(main)
