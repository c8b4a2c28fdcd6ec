"""
Kinds of findings in a dataset, and the policy for each.

Each kind has one of five severities:

``error``     training does not start; the record cannot be used as it was meant, or stops a run in its middle.
``repaired``  the meaning is plain and the record is changed to it.
``dropped``   the record holds nothing to learn from and is left out.
``warning``   the record is used as it is, although it was probably not meant so.
``note``      the fact is worth a count.

All are counted in the log and in the report. ``DATASETS.STRICT`` refuses all but notes. Kinds that begin with "masks"
are looked for only where masks are trained. An object whose segmentation shows nothing of it (*) then becomes a crowd
region of its box: it is not trained on, and detections in it are not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import reprlib
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from ...utils.files import to_json
from .statistics import Statistics

__all__ = ["KINDS", "SEVERITIES", "Finding", "Kind", "Report", "reports_as_json"]

SEVERITIES = ("error", "repaired", "dropped", "warning", "note")
# Number of records that are kept of each kind of note; all records are counted.
NOTES_KEPT = 20
_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of finding; `changes` says whether the data used then differ from the file's."""

    severity: str
    meaning: str
    changes: bool = False


def _kinds(severity: str, changes: bool = False, **meanings: str) -> dict[str, Kind]:
    return {code.replace("_", "-"): Kind(severity, text, changes) for code, text in meanings.items()}


KINDS: dict[str, Kind] = {
    **_kinds(
        "error",
        file_unreadable="a file of annotations that is missing or cannot be parsed",
        file_format="a file of annotations that lacks a part of its format",
        record_malformed="an entry that is not an object with fields",
        category_malformed="a category needs an integer id and a name, both its own",
        no_images="a dataset, or the folder of a class, without images",
        image_id="an image without an integer id",
        image_id_twice="an image with the id of another one",
        image_name="an image without a file name",
        image_outside="an image file outside its image root: absolute, through .. or through a link",
        image_missing="an image file that does not exist",
        image_empty="an image file of 0 bytes",
        image_unreadable="a file that does not decode: truncated, damaged or no image",
        image_mode="more than 8 bits a pixel in one channel, or floats: the reader would clip them; convert to 8 bits",
        image_size="an image whose size differs from the stated one, so that the scale of its boxes is not known",
        image_size_exif="a stated size from before the turn that the image's EXIF asks for, which the reader applies",
        class_unknown="an object of a class that is not among the dataset's",
        crowd_malformed="iscrowd or ignore is neither 0 nor 1",
        box_missing="an object with neither a box nor a polygon to take it from",
        box_malformed="a box that is not four numbers",
        box_not_finite="a box with NaN or infinity in it",
        boxes_normalised="all boxes lie within 0 and 1: pixels are needed",
        boxes_corners="boxes seem to be x1, y1, x2, y2: x, y, width, height is needed",
        boxes_sides="boxes seem to be x, y, width, height: x1, y1, x2, y2 is needed",
        object_malformed="an object without a class, or without numbers that give its box",
        label_line="a YOLO line that is neither class cx cy w h nor class x1 y1 x2 y2 x3 y3 ...",
        label_not_normalised="a YOLO line with a number outside 0 to 1: pixels, or another format",
        labels_absent="no image of a YOLO folder has a label file",
    ),
    **_kinds(
        "repaired",
        changes=True,
        file_bom="a byte order mark before the text: skipped",
        file_encoding="a text file in UTF-16 or UTF-32, as its byte order mark says: read as such",
        image_name_field="an image whose file name is in filename, path, coco_url or the like: that used",
        image_id_type="an id of an image, as text or as a float: made an integer",
        image_path="a file name with backslashes or spaces, absolute, or in another Unicode form: the file's used",
        image_elsewhere="a file name that is not there: the only file of its base name, or with an ending, used",
        split_elsewhere="a split's file or folder as on another machine: the one with the last parts of its path used",
        line_name="a line of a VOC split with an ending or a folder: the record of its name used",
        image_size_absent="an image without a usable width and height: the file's used",
        image_size_type="a width or height as text or as a float: made an integer",
        annotation_id="an annotation whose id is absent, no integer, or 0, which COCO's code takes for none: a new one",
        annotation_id_twice="an annotation with the id of another one: a new one",
        class_type="a class as text, as a float or by its name: its integer id used",
        category_id_type="an id of a category, as text or as a float: made an integer",
        category_name_type="a class name that is a number: made text",
        box_text="a box with numbers as text: made numbers",
        box_clipped="a box that reaches more than a pixel outside its image: clipped",
        area_wrong="an area that is no positive number, or larger than its box: the box's used",
        crowd_type="iscrowd or ignore as true, false or text: made 0 or 1",
        segmentation_malformed="a segmentation that is neither polygons nor RLE: left out, the box kept (masks: *)",
        segmentation_empty="masks: a segmentation without area or without a pixel: *",
        segmentation_outside="masks: a segmentation outside its image: *",
        segmentation_clipped="masks: polygons that reach more than a pixel outside their image: clipped",
        polygon_empty="masks: a polygon of fewer than three points or without area, beside others: left out",
        rle_malformed="masks: run lengths that are none, or not those of their size: *",
        rle_size="masks: RLE of another size than its image's: *",
    ),
    **_kinds(
        "dropped",
        changes=True,
        category_unused="a category of a name that another one has, without annotations, or one given twice",
        annotation_nowhere="an annotation of an image that is not in the dataset",
        box_empty="a box without width or height",
        box_negative="a box that ends before it starts",
        shape_without_area="a point, a line or another shape that has no box",
        object_not_in_image="an object that is marked as outside of its image",
        box_outside="a box outside its image",
        line_repeated="a line of a split file that came before",
    ),
    **_kinds(
        "warning",
        no_boxes="a dataset without boxes, crowd regions aside: no training on it alone",
        class_alike="a class whose name differs from that of another one only by case, spaces or joints",
        image_listed_twice="an image file that another image of the dataset has too",
        image_twice="an image with the pixels of another one of the dataset",
        image_in_two_sets="an image with the pixels, or the file, of one in the other dataset",
        box_twice="an object given twice: same image, class and box",
        label_shared="a label file that two images share",
        image_of_other_name="a VOC annotation whose <filename> is another image: the image of its own name used",
        label_without_image="a YOLO label file without an image",
        split_unread="a key of a data.yaml that names images, and none of train, val, test: not read",
        file_skipped="a VOC annotation outside the split that cannot be parsed: not searched for classes",
        polygon_crossing="masks: a polygon that crosses itself: used as it is",
        segmentation_box="masks: a segmentation whose box has a side more than 2 pixels and a tenth off the object's",
        file_ignored="a file among those of the dataset that is neither an image nor an annotation of its format",
    ),
    **_kinds(
        "note",
        image_without_boxes="an image without boxes: a negative, kept unless DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        image_by_filename="a VOC annotation whose image has the name in its <filename>, not its own",
        image_unlabelled="an image without an annotation file, where each labelled image has one: left out",
        image_turned="an image turned by its EXIF orientation, as the reader does",
        image_converted="not RGB: grey in three channels, a palette's colours, alpha dropped, CMYK without profile",
        image_sixteen="16 bits a channel in colour: the reader takes the upper 8",
        image_frames="more than one frame: the first is used",
        image_ending="an ending that is not the file's format: read by content",
        class_without_boxes="a class without objects; a predictor for it is still trained",
        crowd="a crowd region: not trained on, detections in it are not counted",
        difficult="a difficult object, kept as an object",
        occluded="an object that another one covers in part, kept as an object",
        box_thin="a box of at most one pixel in width or height, kept",
        split_alias="a split under another name, as valid for val",
        file_junk="a file that a system or a tool leaves beside others (._0.jpg, Thumbs.db): passed over",
        folder_link="a link to a folder, which is not followed where images are looked for below a folder",
        label_file_absent="a YOLO image without a label file: a negative",
    ),
    **_kinds(
        "note",
        changes=True,
        area_absent="no area: the box's used",
        crowd_absent="no iscrowd: 0",
        ignore_region="an object marked ignore or, where asked for, difficult: made a crowd region",
        parts_joined="shapes of one label and one group: parts of one object",
        class_implied="objects without a class where one class is declared: of that one",
        box_edge="a box that reaches at most a pixel outside its image: clipped",
        box_from_polygon="an object given by a polygon, an ellipse, a turned box or a mask: its box used",
    ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One record of a kind: in `file`, at `record`, the `value` of `field`."""

    kind: str
    file: str
    record: str
    field: str
    value: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.record}" if self.record else self.file
        what = " = ".join(part for part in (self.field, self.value) if part)
        return f"{where}: {what}" if what else where


class Report:
    """
    The findings in a dataset, with counts.

    Attributes:
        name: the dataset's name.
        notes_kept: how many records are kept of each kind of note; None for all.
        findings: the findings in the order in which they were found; only the first ones of each kind of note.
        counts: kind -> number of findings, notes included.
        facts: further lines to print, e.g. numbers of images and boxes.
        categories: the dataset's id of a class -> its name, in the order of the contiguous ids.
        images: file name -> digest of the pixels, or the file's real path where pixels were not read.
        statistics: statistics of the images and objects; None where they were not looked at.
    """

    def __init__(self, name: str, *, notes_kept: int | None = NOTES_KEPT) -> None:
        self.name = name
        self.notes_kept = notes_kept
        self.findings: list[Finding] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.facts: dict[str, Any] = {}
        self.categories: dict[int, str] = {}
        self.images: dict[str, str] = {}
        self.statistics: Statistics | None = None

    def add(self, kind: str, file: str, record: str = "", field: str = "", value: Any = "") -> None:
        """Adds a finding; `value` is shown as JSON, and cut if it is long."""
        self.counts[kind] += 1
        kept = self.notes_kept
        if KINDS[kind].severity != "note" or kept is None or self.counts[kind] <= kept:
            self.findings.append(Finding(kind, file, record, field, _shown(value)))

    def number(self, *severities: str) -> int:
        """Returns how many findings of these severities there are."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].severity in severities)

    def refused(self, strict: bool) -> int:
        """Returns how many findings stop a training."""
        return sum(count for kind, count in self.counts.items() if self.is_refused(kind, strict))

    @staticmethod
    def is_refused(kind: str, strict: bool) -> bool:
        """Returns whether a finding of this kind stops a training."""
        return KINDS[kind].severity in (SEVERITIES[:-1] if strict else SEVERITIES[:1])

    @property
    def changes(self) -> bool:
        """Whether the data that are used differ from the file's."""
        return any(KINDS[kind].changes for kind in self.counts)

    def classes(self) -> str:
        """Returns the mapping of classes, in one line."""
        pairs = (f"{i}: {name} (id {key})" for i, (key, name) in enumerate(self.categories.items()))
        return ", ".join(pairs) or "none"

    def text(self, examples: int = 5) -> str:
        """Returns the report as text: facts, classes, then the findings by kind, each kind with `examples` records."""
        lines = [f"{self.name}: " + ", ".join(f"{value} {key}" for key, value in self.facts.items())]
        lines.append(f"  classes: {self.classes()}")
        for severity in SEVERITIES:
            for kind in [k for k in KINDS if KINDS[k].severity == severity and self.counts[k]]:
                lines.append(f"  {severity:<9}{kind}: {self.counts[kind]} ({KINDS[kind].meaning})")
                found = [finding for finding in self.findings if finding.kind == kind]
                lines += [f"             {finding}" for finding in found[:examples]]
                if self.counts[kind] > examples:
                    lines.append(f"             and {self.counts[kind] - examples} more")
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns the counts by kind, most severe first, as a table."""
        rows = [(KINDS[k].severity, k, self.counts[k]) for k in KINDS if self.counts[k]]
        rows.sort(key=lambda row: SEVERITIES.index(row[0]))
        return tabulate(rows, ["severity", "kind", "count"])

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as values of JSON; :meth:`from_dict` reads them back."""
        return {
            "name": self.name,
            "facts": self.facts,
            "categories": [{"id": key, "name": name} for key, name in self.categories.items()],
            "counts": dict(self.counts),
            "findings": [
                {"severity": KINDS[finding.kind].severity, **dataclasses.asdict(finding)} for finding in self.findings
            ],
            "images": self.images,
            "statistics": None if self.statistics is None else dataclasses.asdict(self.statistics),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any], name: str) -> Report:
        """Returns the report that :meth:`as_dict` has written, for a dataset whose name is now `name`."""
        report = cls(name)
        report.facts = content["facts"]
        report.categories = {item["id"]: item["name"] for item in content["categories"]}
        report.counts.update(content["counts"])
        report.images = content["images"]
        if content["statistics"] is not None:
            report.statistics = Statistics(**content["statistics"])
        for item in content["findings"]:
            report.findings.append(Finding(**{k: v for k, v in item.items() if k != "severity"}))
        return report


def reports_as_json(reports: Sequence[Report], strict: bool, advice: Sequence[str] = ()) -> str:
    """Returns reports as JSON text: all findings, how many of them stop a training, and advice on the whole data."""
    left_out = ("images", "statistics")
    datasets = [{k: v for k, v in report.as_dict().items() if k not in left_out} for report in reports]
    refused = sum(report.refused(strict) for report in reports)
    content = {"refused": refused, "strict": strict, "advice": list(advice), "datasets": datasets}
    return to_json(content, indent=1, ensure_ascii=False)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, list) and not any(isinstance(item, list | dict) for item in value[:_SHOWN]):
        text = json.dumps(value[:_SHOWN], ensure_ascii=False, default=repr)
    elif isinstance(value, list | dict):
        # Depth and length are limited, whatever the file has nested.
        text = reprlib.repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    text = " ".join(text.split())
    # Lone surrogates, as in a name that is not UTF-8, cannot be written to a file.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
