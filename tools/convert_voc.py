#!/usr/bin/env python
"""Converts one split of a Pascal VOC folder to COCO JSON."""

import argparse
import sys

from aqdet.data.formats.voc import convert_voc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voc-root", required=True, help="folder with Annotations and JPEGImages")
    parser.add_argument("--split", required=True, help="name of a file in ImageSets/Main, e.g. train")
    parser.add_argument("--output", required=True, help="COCO JSON to write")
    parser.add_argument(
        "--classes",
        help="comma-separated names in the order of their ids; those in Annotations, sorted, if absent",
    )
    parser.add_argument(
        "--difficult-as-crowd",
        action="store_true",
        help="make 'difficult' objects crowd regions, ignored by training and evaluation",
    )
    args = parser.parse_args()
    try:
        classes = [name.strip() for name in args.classes.split(",")] if args.classes is not None else None
        report = convert_voc(
            args.voc_root, args.split, args.output, classes, difficult_as_crowd=args.difficult_as_crowd
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
