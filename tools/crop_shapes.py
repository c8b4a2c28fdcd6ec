#!/usr/bin/env python
"""Cuts the objects of the embedded dataset out into image folders, train and val, for a small classification run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aqdet.utils.arguments import folder_to_write, integer, number
from aqdet.utils.console import run_console


def crop_objects(split: str, root: Path, size: int, margin: float) -> int:
    """Writes ``root/split/<class>/<number>.png``, the square around each box with a margin; returns their number."""
    # Late, so that --help opens at once.
    from detectron2.data import DatasetCatalog

    import aqdet.data  # noqa: F401  (registers the dataset)

    return crop_records(DatasetCatalog.get(f"aqdet_shapes_{split}"), root / split, size, margin)


def crop_records(records: Iterable[dict[str, Any]], root: Path, size: int, margin: float) -> int:
    """Writes ``root/<class>/<number>.png`` of records of the embedded dataset; returns how many."""
    from PIL import Image

    from aqdet.data import SHAPE_CLASSES

    count = 0
    for record in records:
        with Image.open(record["file_name"]) as image:
            for annotation in record["annotations"]:
                x, y, width, height = annotation["bbox"]
                half = max(width, height) * (0.5 + margin)
                center = x + width / 2, y + height / 2
                box = (center[0] - half, center[1] - half, center[0] + half, center[1] + half)
                folder = root / SHAPE_CLASSES[annotation["category_id"]]
                folder.mkdir(parents=True, exist_ok=True)
                crop = image.convert("RGB").crop(tuple(round(value) for value in box))
                crop.resize((size, size), Image.Resampling.BILINEAR).save(folder / f"{count:06d}.png")
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=folder_to_write, required=True, help="folder for train/ and val/, new or empty"
    )
    parser.add_argument(
        "--size", type=integer(1, 4096), default=64, help="side of an image in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--margin",
        type=number(0, 10),
        default=0.15,
        help="around the box, as a share of its longer side (default: %(default)s)",
    )
    args = parser.parse_args()
    root = Path(args.output)
    if root.is_dir() and any(root.iterdir()):
        sys.exit(f"error: --output {args.output!r} is not empty")
    for split in ("train", "val"):
        print(f"{split}: {crop_objects(split, root, args.size, args.margin)} images in {root / split}")


if __name__ == "__main__":
    run_console(main)
