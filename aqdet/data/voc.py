"""Pascal VOC folders to COCO JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


@dataclasses.dataclass
class VocReport:
    """What a conversion did.

    Attributes:
        num_images, num_boxes: what was written; boxes_per_class: class name -> boxes.
        notes: kind of repair or drop -> the records it happened to.
    """

    num_images: int
    num_boxes: int
    boxes_per_class: dict[str, int]
    notes: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.num_images} images, {self.num_boxes} boxes"]
        lines += [f"  {name}: {count}" for name, count in self.boxes_per_class.items()]
        for kind, records in self.notes.items():
            shown = ", ".join(records[:5]) + (", ..." if len(records) > 5 else "")
            lines.append(f"{kind}: {len(records)} ({shown})")
        return "\n".join(lines)


def _parse(path: Path) -> ElementTree.Element:
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError(f"{path}: has a DOCTYPE or entity, which annotations do not need; refused")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML: {error}") from error


def _read_box(element: ElementTree.Element, record: str) -> list[float]:
    try:
        return [float(element.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        raise ValueError(f"{record}: bndbox needs numbers xmin, ymin, xmax, ymax") from None


def convert_voc(
    voc_root: str | os.PathLike[str],
    split: str,
    output: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
) -> VocReport:
    """Converts one split of a Pascal VOC folder; writes ``output`` whole or not at all.

    VOC boxes are 1-based with inclusive ends: ``x = xmin - 1``, ``width = xmax - xmin + 1``. Policy, each case
    counted in the report: a box that reaches outside the image is clipped; one without area after that is
    dropped; where the XML's image size differs from the file's, the file's is used. ``difficult`` objects
    are kept. Images without boxes are kept.

    Args:
        voc_root: folder with ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        split: name of a file in ``ImageSets/Main`` without its ending.
        output: COCO JSON to write; file names in it are relative to ``JPEGImages``.
        classes: names in the order of their ids; those found, sorted, if None.

    Raises:
        ValueError: in one line, for missing files (all of them), malformed XML, unknown class names.
    """
    root = Path(voc_root)
    split_file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not split_file.is_file():
        found = sorted(p.stem for p in split_file.parent.glob("*.txt"))
        raise ValueError(f"no split file {split_file}; splits there: {', '.join(found) or 'none'}")
    stems = [line.split()[0] for line in split_file.read_text().splitlines() if line.strip()]
    if len(set(stems)) != len(stems):
        repeated = sorted(s for s, n in collections.Counter(stems).items() if n > 1)
        raise ValueError(f"{split_file}: repeated records {', '.join(repeated[:5])}")
    wanted = [(root / "Annotations" / f"{s}.xml", root / "JPEGImages" / f"{s}.jpg") for s in stems]
    missing = [str(path) for pair in wanted for path in pair if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} files are missing: {', '.join(missing[:5])}")

    notes: dict[str, list[str]] = collections.defaultdict(list)
    records: list[tuple[dict[str, Any], list[tuple[str, list[float]]]]] = []
    for index, (xml_path, image_path) in enumerate(wanted):
        tree = _parse(xml_path)
        with Image.open(image_path) as image:
            width, height = image.size
        declared = (tree.findtext("size/width", ""), tree.findtext("size/height", ""))
        if declared != (str(width), str(height)):
            notes["image size in XML differs, file's used"].append(xml_path.stem)
        boxes = []
        for number, item in enumerate(tree.iter("object")):
            record = f"{xml_path.stem}#{number}"
            name = (item.findtext("name") or "").strip()
            if not name:
                raise ValueError(f"{xml_path}: object {number} has no name")
            xmin, ymin, xmax, ymax = _read_box(item, str(xml_path))
            left, top = max(xmin - 1, 0), max(ymin - 1, 0)
            right, bottom = min(xmax, width), min(ymax, height)
            if xmax < xmin or ymax < ymin or right - left < 1 or bottom - top < 1:
                notes["boxes without area, dropped"].append(record)
                continue
            if (left, top, right, bottom) != (xmin - 1, ymin - 1, xmax, ymax):
                notes["boxes outside the image, clipped"].append(record)
            boxes.append((name, [left, top, right - left, bottom - top]))
        info = {"id": index + 1, "file_name": image_path.name, "width": width, "height": height}
        records.append((info, boxes))

    found_names = sorted({name for _, boxes in records for name, _ in boxes})
    names = list(classes) if classes is not None else found_names
    unknown = sorted(set(found_names) - set(names))
    if unknown:
        raise ValueError(f"classes {', '.join(unknown)} are in the data but not in --classes")
    annotations: list[dict[str, Any]] = []
    for info, boxes in records:
        for name, box in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": info["id"],
                    "category_id": names.index(name) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {
        "images": [info for info, _ in records],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".part")
    aside.write_text(json.dumps(content))
    os.replace(aside, target)
    counts = collections.Counter(a["category_id"] for a in annotations)
    per_class = {name: counts[i + 1] for i, name in enumerate(names)}
    return VocReport(len(records), len(annotations), per_class, dict(notes))
