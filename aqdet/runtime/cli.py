"""Runs an exported detector on images, folders of images, videos, cameras and network streams.

It draws the detections (--output, --show), and writes them as COCO results (--json) and as a table (--csv). A camera
is given by its number, a stream by its URL (rtsp://..., http://...); Ctrl-C ends it. The exit status is 1 if an input
could not be read or a self-test failed, and 2 if the request cannot be met.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.arguments import file_to_read, file_to_write, integer, number
from ..utils.files import refuse_replacing

if TYPE_CHECKING:
    from .decode import Detections
    from .detector import Detector
    from .media import Draw, Records, Summary
    from .sources import PictureSource

UNREADABLE = 1
USER_ERROR = 2
DEFAULT_THRESHOLD = 0.5
MAX_SIZE, MAX_THREADS = 65536, 1024
_SHIPPED = ("detector.json", "report.json", "report.md", "README.md", "golden.npz", "*.onnx", "*.c", "*.h")
"""Names of an exported folder's own files."""


class DrawnDetector:
    """An exported detector with the interface of the media loop."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Finds objects in images."""
        return self._detector.detect(images)

    def drawer(self, is_video: bool) -> Draw:
        """Returns the function that draws detections into an image."""
        from .draw import draw

        return lambda image, found: draw(image, found, self._detector.classes)


def make_parser(prog: str = "python -m aqdet.runtime") -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", help="exported detector")
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image, video, folder (with its subfolders), pattern, camera, URL"
    )
    parser.add_argument("--self-test", action="store_true", help="compare this machine with the export, and end")
    out = parser.add_argument_group("output (at least one)")
    out.add_argument("--output", metavar="PATH", help="drawn pictures: a folder, or a file for one input")
    out.add_argument("--show", action="store_true", help="drawn pictures in a window; Escape stops")
    out.add_argument("--json", type=file_to_write, metavar="FILE", help="detections as COCO results")
    out.add_argument("--csv", type=file_to_write, metavar="FILE", help="detections as a table, a row each")
    out.add_argument(
        "--annotations", type=file_to_read, metavar="FILE", help="COCO annotations with the image ids for --json"
    )
    how = parser.add_argument_group("detection (by default as exported)")
    how.add_argument(
        "--threshold",
        type=number(0, 1),
        help=f"lowest score, default {DEFAULT_THRESHOLD}; for --json that of the export, as evaluation needs it",
    )
    how.add_argument("--nms-threshold", type=number(0, 1), metavar="IOU", help="overlap above which a box is left out")
    how.add_argument("--max-detections", type=integer(1), metavar="N", help="largest number in an image")
    how.add_argument(
        "--size",
        type=integer(0, MAX_SIZE),
        metavar="PIXELS",
        help="length of the shorter edge; 0 leaves images as they are",
    )
    run = parser.add_argument_group("execution")
    run.add_argument("--batch", type=integer(1), default=1, metavar="N", help="images at once (default: %(default)s)")
    run.add_argument(
        "--threads", type=integer(1, MAX_THREADS), metavar="N", help="threads of the network (default: ONNX Runtime's)"
    )
    run.add_argument(
        "--provider",
        default="CPUExecutionProvider",
        help="ONNX Runtime's execution provider (default: %(default)s)",
        metavar="NAME",
    )
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m aqdet.runtime") -> None:
    """Runs the command line; ends the process with the status that the module's text states if something is wrong."""
    parser = make_parser(prog)
    args = parser.parse_args(arguments)
    if not args.self_test:
        _check_arguments(parser, args)
    try:
        status = _self_test(args) if args.self_test else _detect(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)
    if status:
        sys.exit(status)


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.inputs:
        parser.error("INPUT: name an image, video, folder, camera or URL")
    if not (args.output or args.show or args.json or args.csv):
        parser.error("nothing would come out: give --output, --show, --json or --csv")
    if args.annotations and not args.json:
        parser.error("--annotations has the image ids for --json, which is not given")


def _self_test(args: argparse.Namespace) -> int:
    """Prints a line for each comparison and returns the exit status."""
    from .golden import self_test

    checks = self_test(args.folder, threads=args.threads, provider=args.provider)
    for check in checks:
        print(f"{'ok    ' if check.passed else 'FAILED'} {check.what}: {check.text}")
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return UNREADABLE if failed else 0


def _detect(args: argparse.Namespace) -> int:
    """Detects, writes and prints a summary, and returns the exit status."""
    from .media import MediaLoop, has_display
    from .sources import find_sources, output_paths

    sources, others = find_sources(args.inputs, args.output)
    outputs = output_paths(sources, args.output) if args.output else None
    own = [path for name in _SHIPPED for path in Path(args.folder).glob(name)]
    refuse_replacing(
        [("--json", args.json), ("--csv", args.csv), *(("--output", path) for path in outputs or ())],
        [*(source.name for source in sources), args.annotations, *own],
    )
    if args.show and not has_display():
        raise ValueError("--show: there is no display to open a window on")
    detector = _load(args)
    threshold = DEFAULT_THRESHOLD if args.threshold is None else args.threshold
    if others:
        print(f"{others} files that are neither image nor video are passed over")
    with contextlib.ExitStack() as stack:
        records = _open_records(args, detector, sources, threshold, stack)
        loop = MediaLoop(
            DrawnDetector(detector), threshold=threshold, show=args.show, records=records, batch=args.batch
        )
        summary = loop.run(sources, outputs)
    _print_summary(summary, len(sources), threshold, args)
    return UNREADABLE if summary.unreadable else 0


def _load(args: argparse.Namespace) -> Detector:
    from .detector import Detector
    from .folder import read_description

    # Only a threshold below the export's is given: a higher one is applied later, so that the highest score is known.
    lowest = None
    if args.threshold is not None and args.threshold < read_description(args.folder).score_threshold:
        lowest = args.threshold
    return Detector(
        args.folder,
        threads=args.threads,
        provider=args.provider,
        score_threshold=lowest,
        nms_threshold=args.nms_threshold,
        max_detections=args.max_detections,
        size=args.size,
    )


def _open_records(
    args: argparse.Namespace,
    detector: Detector,
    sources: Sequence[PictureSource],
    threshold: float,
    stack: contextlib.ExitStack,
) -> list[Records]:
    from .records import coco_results, csv_rows, number_ids, read_image_ids

    records: list[Records] = []
    if args.json:
        ids = read_image_ids(args.annotations, sources) if args.annotations else number_ids(sources)
        lowest = args.threshold or 0.0
        records.append(stack.enter_context(coco_results(args.json, detector.description, lowest, ids)))
    if args.csv:
        records.append(stack.enter_context(csv_rows(args.csv, detector.description, threshold)))
    return records


def _print_summary(summary: Summary, number_of_sources: int, threshold: float, args: argparse.Namespace) -> None:
    print(
        f"{summary.images + summary.videos} of {number_of_sources} inputs, {summary.images + summary.frames} images, "
        f"{summary.detections} objects with a score of at least {threshold:g}"
    )
    if not summary.detections and summary.images + summary.frames:
        print(f"nothing was found: the highest score was {summary.highest:.3f}, see --threshold")
    for note in summary.notes:
        print(f"note: {note}")
    written = [place for place in (args.output, args.json, args.csv) if place]
    if written and summary.images + summary.frames:
        print(f"written to {', '.join(written)}")
    if summary.unreadable:
        lines = summary.unreadable
        print(f"error: {len(lines)} inputs could not be read:", *lines, sep="\n  ", file=sys.stderr)
