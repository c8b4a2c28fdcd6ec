#!/usr/bin/env python
"""
Checks datasets before training: every problem in one report.

The datasets are those declared in a config, or given by COCO JSON, a Pascal VOC folder, a YOLO data.yaml, or folders
of images for each class.
What is found, and what is then done about it: aqdet/data/check/findings.py. The exit status is 1 if a training would
be refused, else 0.
"""

import argparse
import sys
import time
from pathlib import Path

import yaml

from aqdet.config import load_config
from aqdet.data.check.cache import check_declaration
from aqdet.data.check.findings import reports_as_json
from aqdet.data.check.records import find_shared_images
from aqdet.data.declaration import Declaration, parse_declared, parse_image_folders
from aqdet.data.formats.yolo import SPLITS
from aqdet.utils.files import write_text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", help="check all of DATASETS.DECLARED and IMAGE_FOLDERS")
    what.add_argument("--coco-json", nargs="+", help="COCO annotation files")
    what.add_argument("--voc", help="folder with Annotations, JPEGImages and ImageSets/Main")
    what.add_argument("--yolo", help="data.yaml")
    what.add_argument("--image-folders", nargs="+", metavar="DIR", help="each with a folder of images for each class")
    parser.add_argument("--image-root", help="of the COCO files; of a YOLO folder if not that of its data.yaml")
    parser.add_argument("--split", nargs="+", help="of a VOC or YOLO folder; all of train, val, test if absent")
    parser.add_argument("--no-images", action="store_true", help="do not decode images")
    parser.add_argument("--strict", action="store_true", help="refuse all but notes, as DATASETS.STRICT")
    parser.add_argument("--json", help="also write all findings to this file")
    parser.add_argument("--examples", type=int, default=5, help="records printed of each kind")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    return parser.parse_args()


def datasets(args: argparse.Namespace) -> tuple[list[Declaration], bool]:
    """The datasets to check and whether to be strict."""
    cfg = load_config(args.config_file or "", args.opts)
    strict = args.strict or cfg.DATASETS.STRICT
    entries = []
    if args.coco_json:
        if not args.image_root:
            raise ValueError("--coco-json needs --image-root")
        entries = [{"name": path, "json": path, "image_root": args.image_root} for path in args.coco_json]
    elif args.voc:
        splits = Path(args.voc, "ImageSets", "Main")
        names = args.split or [name for name in SPLITS if (splits / f"{name}.txt").is_file()]
        entries = [{"name": name, "format": "voc", "root": args.voc, "split": name} for name in names]
    elif args.yolo:
        root = {"image_root": args.image_root} if args.image_root else {}
        names = args.split or yolo_splits(args.yolo)
        entries = [{"name": n, "format": "yolo", "yaml": args.yolo, "split": n, **root} for n in names]
    if not args.config_file:
        cfg.DATASETS.DECLARED = entries
        cfg.DATASETS.IMAGE_FOLDERS = [{"name": path, "root": path} for path in args.image_folders or ()]
    found = [*parse_declared(cfg.DATASETS.DECLARED).values(), *parse_image_folders(cfg.DATASETS.IMAGE_FOLDERS)]
    if not found:
        raise ValueError(f"nothing to check: {args.config_file or args.voc or args.yolo} names no datasets or splits")
    return found, strict


def yolo_splits(path: str) -> list[str]:
    """The splits that a data.yaml has; the check says what is wrong with one that cannot be read."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    names = [split for split in SPLITS if isinstance(content, dict) and content.get(split)]
    return names or list(SPLITS[:1])


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    try:
        found, strict = datasets(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    reports = [check_declaration(declaration, pixels=not args.no_images)[0] for declaration in found]
    for index, report in enumerate(reports):
        for earlier in reports[:index]:
            find_shared_images(earlier, report)
    for report in reports:
        print(report.text(args.examples), end="\n\n")
    if args.json:
        try:
            write_text(Path(args.json), reports_as_json(reports, strict))
        except OSError as error:
            sys.exit(f"error: --json {args.json}: {error.strerror}")
    refused = sum(report.refused(strict) for report in reports)
    images = "not decoded" if args.no_images else "decoded"
    counts = ", ".join(f"{sum(r.number(s) for r in reports)} {s}" for s in ("error", "repaired", "dropped", "warning"))
    verdict = "a training is refused" if refused else "a training would start"
    print(f"{counts}; images {images}; {time.monotonic() - start:.1f} s: {verdict}")
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    main()
