#!/usr/bin/env python
"""
Checks datasets before training, and reports every problem at once.

The datasets are declared in a config, or given on the command line. aqdet/data/check/findings.py lists the findings and
what is done about each. The exit status is 1 if a training would be refused, else 0. With --output the checked
dataset is written as COCO JSON, whatever its format. PyTorch and Detectron2 are loaded only for a config.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from aqdet.data.check.cache import check_declaration
from aqdet.data.check.findings import Report, reports_as_json
from aqdet.data.check.records import find_shared_images
from aqdet.data.declaration import IMAGE_FOLDER, Declaration
from aqdet.data.declared import parse_declared, parse_image_folders
from aqdet.data.formats import FORMATS
from aqdet.data.formats.data_yaml import SPLITS, is_list_of_names, named_splits
from aqdet.data.formats.guess import file_of, guess_entries
from aqdet.utils.arguments import file_to_write, integer
from aqdet.utils.console import run_console
from aqdet.utils.files import refuse_replacing, write_json, write_text
from aqdet.utils.plain_yaml import load_yaml

EXAMPLES = """
examples:
  check_dataset.py --coco-json train.json val.json --image-root images
  check_dataset.py --voc VOC2007 --split train val
  check_dataset.py --voc my_photos --split 0.8 -0.2         images and XML of labelImg, split by share
  check_dataset.py --yolo data.yaml --output "{name}.json"   as COCO JSON, a file for each split
  check_dataset.py --dataset "{format: voc, images: photos, annotations: xml, split: 0.8, seed: 1}"
  check_dataset.py --dataset annotations.xml --image-root photos
  check_dataset.py --config-file config.yaml DATASETS.STRICT True

a dataset of DATASETS.DECLARED or --dataset has a name and the fields of its format:
"""
PARTS = """
and each may have a part of its images, chosen by a hash of their names, which stays when files are added:
  split: 0.8     the first 0.8 of the draw       split: -0.2    the last 0.2, which 0.8 leaves
  split: [0.7, 0.9]   what lies between           seed: 1        another draw (default: 0)
  share: 0.8     the same, of a named split
"""


def epilog() -> str:
    """Returns the examples and the fields of every format, for the help."""
    lines = []
    for form in FORMATS.values():
        lines.append(f"  {form.name:<10}{form.layout}")
        lines.append(f"  {'':<10}{form.example}")
    return f"{EXAMPLES}{chr(10).join(lines)}\n{PARTS}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--config-file FILE | --coco-json FILE ... | --voc DIR | --yolo FILE | --image-folders DIR ... "
        "| --dataset ENTRY ...)\n       [options] [KEY VALUE ...]",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config-file", metavar="FILE", help="check all of DATASETS.DECLARED and IMAGE_FOLDERS")
    what.add_argument("--coco-json", nargs="+", metavar="FILE", help="COCO annotation files")
    what.add_argument("--voc", metavar="DIR", help="folder of Pascal VOC, or of images and XML as labelImg writes them")
    what.add_argument("--yolo", metavar="FILE", help="data.yaml or classes.txt")
    what.add_argument("--image-folders", nargs="+", metavar="DIR", help="each with a folder of images for each class")
    what.add_argument(
        "--dataset",
        nargs="+",
        metavar="ENTRY",
        help="dataset of any format: an entry as in DATASETS.DECLARED, or a file or folder, whose format is guessed",
    )
    parser.add_argument(
        "--image-root", help="folder of the images of COCO files, of --dataset, or of YOLO if it is not data.yaml's"
    )
    parser.add_argument(
        "--split", nargs="+", help="names or shares; by default all of train, val, test that VOC or YOLO has"
    )
    parser.add_argument("--seed", type=int, help="seed of shares (default: 0)")
    parser.add_argument(
        "--classes", help="VOC's classes in the order of their ids, with commas; by default all, sorted"
    )
    parser.add_argument("--difficult-as-crowd", action="store_true", help="ignore difficult objects of VOC")
    parser.add_argument("--no-images", action="store_true", help="do not decode images")
    parser.add_argument(
        "--masks", action="store_true", help="check segmentations too, as for a --config-file that trains masks"
    )
    parser.add_argument("--strict", action="store_true", help="refuse all but notes, as DATASETS.STRICT")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write all findings to this file")
    parser.add_argument(
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="write the checked dataset as COCO JSON, unless it is refused; of several, {name} stands for each name",
    )
    parser.add_argument(
        "--examples", type=integer(0), default=5, help="records printed of each kind (default: %(default)s)"
    )
    return parser


def parse_args() -> argparse.Namespace:
    parser = make_parser()
    args, opts = parser.parse_known_args()
    args.opts = opts
    known = [name for action in parser._actions for name in action.option_strings]
    for text in args.opts:
        if text.startswith("--"):
            close = difflib.get_close_matches(text.partition("=")[0], known, 1)
            parser.error(f"unrecognized argument: {text}{f'; did you mean {close[0]}?' if close else ''}")
    if args.dataset and args.split:
        parser.error("--split: write it into the entry of --dataset, as {..., split: 0.8}")
    sources = ("config_file", "coco_json", "voc", "yolo", "image_folders", "dataset")
    if not any(getattr(args, name) for name in sources):
        parser.error("nothing to check: give one of " + ", ".join(f"--{name.replace('_', '-')}" for name in sources))
    if args.opts and not args.config_file:
        parser.error(f"unrecognized arguments: {' '.join(args.opts)} (KEY VALUE pairs are for a --config-file)")
    return args


def datasets(args: argparse.Namespace) -> tuple[list[Declaration], bool, Any]:
    """Returns the datasets to check, whether to be strict, and the config if there is one."""
    if args.config_file:
        from aqdet.config import load_config

        cfg = load_config(args.config_file, args.opts)
        config = cfg.DATASETS
        found = [*parse_declared(config.DECLARED).values(), *parse_image_folders(config.IMAGE_FOLDERS)]
        if not found:
            names = ", ".join(dict.fromkeys([*config.TRAIN, *config.TEST]))
            others = f"; what registers {names} is code, which this does not run" if names else ""
            raise ValueError(
                f"nothing to check: {args.config_file} has no dataset in DATASETS.DECLARED or IMAGE_FOLDERS{others}"
            )
        return found, args.strict or config.STRICT, cfg
    if args.image_folders:
        entries = [part for path in args.image_folders for part in parts({"root": path}, args, path)]
        return list(parse_image_folders(entries)), args.strict, None
    return list(parse_declared(entries_of(args)).values()), args.strict, None


def entries_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns entries in the form of DATASETS.DECLARED for the datasets on the command line."""
    if args.dataset:
        return [
            entry
            for index, text in enumerate(args.dataset)
            for entry in entries_of_dataset(text, index, args.image_root or "")
        ]
    if args.coco_json:
        if not args.image_root:
            raise ValueError("--coco-json needs --image-root")
        return [
            part for path in args.coco_json for part in parts({"json": path, "image_root": args.image_root}, args, path)
        ]
    if args.voc:
        entry: dict[str, Any] = {"format": "voc", "root": args.voc}
        if args.classes is not None:
            entry["classes"] = [name.strip() for name in args.classes.split(",")]
        if args.difficult_as_crowd:
            entry["difficult_as_crowd"] = True
        folder = Path(args.voc, "ImageSets", "Main")
        return parts(
            entry, args, args.voc, [name for name in ("train", "val", "test") if (folder / f"{name}.txt").exists()]
        )
    root = {"image_root": args.image_root} if args.image_root else {}
    named = named_splits(args.yolo) if os.path.isfile(args.yolo) else []
    splits = named or ([] if is_list_of_names(args.yolo) else SPLITS[:1])
    return parts({"format": "yolo", "yaml": args.yolo, **root}, args, args.yolo, splits)


def parts(
    entry: Mapping[str, Any], args: argparse.Namespace, name: str, named: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Returns the entry once for each split, which becomes its name, or as it is if there are no splits."""
    splits = [share_of(text) for text in args.split or named]
    found = []
    for split in splits:
        seed = {"seed": args.seed} if args.seed is not None and not isinstance(split, str) else {}
        of_several = isinstance(split, str) or "format" in entry
        found.append({**entry, "name": str(split) if of_several else f"{name}:{split}", "split": split, **seed})
    return found or [{**entry, "name": name}]


def share_of(text: str) -> str | float:
    """Returns a share if the text is a number, else the name of a split."""
    try:
        return float(text)
    except ValueError:
        return text


def entries_of_dataset(text: str, index: int, images: str) -> list[dict[str, Any]]:
    """Returns an entry that is written as in a config, or the entries of a file or folder; the place is their name."""
    example = next(iter(FORMATS.values())).example
    wanted = f"--dataset must be an entry as {example}, or a file or folder that exists, got {text!r}"
    if not text.lstrip().startswith("{"):
        if not os.path.exists(text):
            raise ValueError(wanted)
        found = guess_entries(text, images)
        names = [text] if len(found) == 1 else [file_of(entry) for entry in found]
        return [{"name": name, **entry} for name, entry in zip(names, found, strict=True)]
    try:
        entry = load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--dataset {text!r} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entry, dict):
        raise ValueError(wanted)
    return [{"name": f"dataset{index}", **entry}]


def outputs_of(args: argparse.Namespace, found: Sequence[Declaration]) -> list[tuple[str, str]]:
    """Returns pairs of an option and a file that it writes."""
    outputs = [output_for(args.output, declaration) for declaration in found] if args.output else []
    return [("--json", args.json or ""), *(("--output", path) for path in outputs)]


def output_for(output: str, declaration: Declaration) -> str:
    """Returns the file that --output means for a dataset."""
    return output.replace("{name}", declaration.name.replace(os.sep, "_"))


def write_output(output: str, found: list[tuple[Declaration, Report, dict[str, Any]]], strict: bool) -> list[str]:
    """Writes the datasets as COCO JSON if none of them is refused; returns a line for each."""
    if len(found) > 1 and "{name}" not in output:
        names = ", ".join(declaration.name for declaration, _, _ in found)
        raise ValueError(f"--output {output}: write {{name}} in it, there are several datasets: {names}")
    lines = []
    for declaration, report, _ in found:
        if declaration.format == IMAGE_FOLDER:
            raise ValueError(f"--output: {declaration.name} has a class an image, no boxes for COCO JSON")
        if report.refused(strict):
            return [f"nothing is written to {output}: {declaration.name} is refused"]
    for declaration, _, content in found:
        path = output_for(output, declaration)
        write_json(path, content, indent=None)
        lines.append(f"written to {path}; file names in it are relative to {declaration.image_root}")
    return lines


def masks_of(cfg: Any) -> bool:
    """Returns whether a training with this config reads masks."""
    from aqdet.data.mask_check import reads_masks

    return reads_masks(cfg)


def advice_on(reports: Sequence[Report], cfg: Any) -> list[str]:
    """Returns the advice that a training with this config would log on these datasets as a whole."""
    from aqdet.data.check.advice import advise

    return advise(cfg, {report.name: report for report in reports})


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    try:
        found, strict, cfg = datasets(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    masks = args.masks or (cfg is not None and masks_of(cfg))
    checked: list[tuple[Declaration, Report, Any]] = []
    read: list[str] = []
    for declaration in found:
        report, content, source = check_declaration(declaration, pixels=not args.no_images, masks=masks)
        # What is passed over may be what this program has written there before.
        read += source.inputs - {finding.file for finding in report.findings if finding.kind == "file-ignored"}
        if declaration.image_root:
            read += [
                os.path.join(declaration.image_root, str(image.get("file_name")))
                for image in source.images
                if isinstance(image, dict)
            ]
        for _, earlier, _ in checked:
            find_shared_images(earlier, report)
        checked.append((declaration, report, content))
    try:
        refuse_replacing(outputs_of(args, found), read)
    except ValueError as error:
        sys.exit(f"error: {error}")
    reports = [report for _, report, _ in checked]
    for report in reports:
        print(report.text(args.examples), end="\n\n")
    advice = advice_on(reports, cfg) if cfg is not None else []
    for line in advice:
        print(f"advice: {line}", end="\n\n")
    try:
        if args.json:
            write_text(args.json, reports_as_json(reports, strict, advice))
        for line in write_output(args.output, checked, strict) if args.output else ():
            print(line)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    refused = sum(report.refused(strict) for report in reports)
    images = "not decoded" if args.no_images else "decoded"
    counts = ", ".join(f"{sum(r.number(s) for r in reports)} {s}" for s in ("error", "repaired", "dropped", "warning"))
    if refused:
        verdict = "a training is refused"
    elif all(report.counts["no-boxes"] for report in reports):
        verdict = "there is nothing to train on"
    else:
        verdict = "a training would start"
    print(f"{counts}; images {images}; {time.monotonic() - start:.1f} s: {verdict}")
    sys.exit(1 if refused else 0)


if __name__ == "__main__":
    run_console(main)
