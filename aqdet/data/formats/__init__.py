"""
Formats of annotations that datasets can be declared in.

A reader turns the files of its format into the records of one :class:`~aqdet.data.formats.source.Source`, faults
included; :mod:`aqdet.data.check` checks them against the policy. A new format needs a reader in a file of its own and
an entry of :data:`FORMATS`. Nothing here imports torch or Detectron2.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping

from ..check.findings import Report
from ..declaration import Declaration
from .coco import read_coco
from .csv_table import read_csv
from .cvat import read_cvat
from .darknet import read_darknet
from .labelme import read_labelme
from .source import Source
from .via import read_via
from .voc import locate_voc, read_voc
from .yolo import read_yolo

__all__ = ["FORMATS", "Format", "Source"]


_Reader = Callable[[Declaration, Report], Source]


@dataclasses.dataclass(frozen=True)
class Format:
    """
    A format of annotations: how a dataset in it is declared, and its reader.

    Attributes:
        name: value of the entry's field ``format``.
        layout: one line on how the format looks on disk.
        example: an entry, as it is written in ``DATASETS.DECLARED``.
        read: the reader, a function of the declaration and of the report that receives the findings.
        needed: alternative sets of fields, one of which an entry must have.
        optional: fields that an entry may have; every entry may have ``split``, ``share`` and ``seed``, too.
        paths: the fields that are paths, each ``"file"``, ``"folder"`` or ``"file or folder"``.
        locate: (paths by field, name of the split) -> ``file`` and ``image_root`` of the declaration. It may raise a
            ValueError that starts with the name of a field.
        has_named_splits: whether ``split`` may be a name of the format's own, and not only a share.
    """

    name: str
    layout: str
    example: str
    read: _Reader
    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    paths: Mapping[str, str]
    locate: Callable[[Mapping[str, str], str], tuple[str, str]]
    has_named_splits: bool = False


def _beside(field: str) -> Callable[[Mapping[str, str], str], tuple[str, str]]:
    """Returns ``locate`` for an annotation file; images are below ``image_root``, by default the file's folder."""

    def locate(paths: Mapping[str, str], split: str) -> tuple[str, str]:
        file = paths[field]
        return file, paths.get("image_root") or os.path.dirname(file) or "."

    return locate


def _locate_exported(paths: Mapping[str, str], split: str) -> tuple[str, str]:
    """Locates annotations and images of a labelling tool; one field is enough where both are in one folder."""
    file = paths.get("annotations") or paths["images"]
    return file, paths.get("images") or os.path.dirname(file) or "."


def _yolo_like(name: str, read: _Reader, field: str, *, layout: str, example: str) -> Format:
    """Makes a format whose ``field`` is a file that names the splits, with a label file for each image."""
    return Format(
        name=name,
        layout=layout,
        example=example,
        read=read,
        needed=(("name", "format", field),),
        optional=("image_root",),
        paths={field: "file", "image_root": "folder"},
        locate=_beside(field),
        has_named_splits=True,
    )


def _labelling_tool(
    name: str, read: _Reader, *, layout: str, example: str, file_an_image: bool = False, options: tuple[str, ...] = ()
) -> Format:
    """Makes the format of a labelling tool: one file of annotations or, if ``file_an_image``, one for each image."""
    needed, other = ("images", "annotations") if file_an_image else ("annotations", "images")
    kinds = {"images": "folder", "annotations": "folder" if file_an_image else "file"}
    return Format(
        name=name,
        layout=layout,
        example=example,
        read=read,
        needed=(("name", "format", needed),),
        optional=(other, "classes", *options, "difficult_as_crowd"),
        paths={needed: kinds[needed], other: kinds[other]},
        locate=_locate_exported,
    )


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            name="coco",
            layout="a JSON file with the lists images, annotations and categories, and a folder of images",
            example="{name: mine, json: annotations.json, image_root: images}",
            read=read_coco,
            needed=(("name", "json", "image_root"),),
            optional=("format",),
            paths={"json": "file", "image_root": "folder"},
            locate=_beside("json"),
        ),
        Format(
            name="voc",
            layout=(
                "XML files and images in one folder or two, as labelImg writes them, or a folder with Annotations, "
                "JPEGImages and ImageSets/Main/train.txt"
            ),
            example="{name: mine, format: voc, images: DIR, annotations: DIR} or {..., root: VOC2007, split: train}",
            read=read_voc,
            needed=(("name", "format", "root"), ("name", "format", "images", "annotations")),
            optional=("classes", "difficult_as_crowd"),
            paths={"root": "folder", "images": "folder", "annotations": "folder"},
            locate=locate_voc,
            has_named_splits=True,
        ),
        _yolo_like(
            "yolo",
            read_yolo,
            "yaml",
            layout=(
                "a data.yaml, or a classes.txt with a name a line, and for each image of images/ a text file in labels/"
            ),
            example="{name: mine, format: yolo, yaml: data.yaml, split: train}",
        ),
        _yolo_like(
            "darknet",
            read_darknet,
            "data",
            layout="an obj.data with names = obj.names and train = train.txt, a list of images; labels as YOLO's",
            example="{name: mine, format: darknet, data: obj.data, split: train}",
        ),
        _labelling_tool(
            "labelme",
            read_labelme,
            layout="a folder of images with a JSON file (shapes, imagePath) for each, or the JSON files in another one",
            example="{name: mine, format: labelme, images: DIR}",
            file_an_image=True,
        ),
        _labelling_tool(
            "via",
            read_via,
            layout="a project of VGG Image Annotator 2, or its annotations exported as JSON or CSV",
            example="{name: mine, format: via, annotations: via_project.json, images: DIR}",
            options=("class_key",),
        ),
        _labelling_tool(
            "cvat",
            read_cvat,
            layout="annotations.xml of CVAT for images 1.1 (<annotations> with an <image> each)",
            example="{name: mine, format: cvat, annotations: annotations.xml, images: DIR}",
        ),
        _labelling_tool(
            "csv",
            read_csv,
            layout=(
                "a table, a row a box: filename,width,height,class,xmin,ymin,xmax,ymax in columns that a header names, "
                "or path,x1,y1,x2,y2,class without one"
            ),
            example="{name: mine, format: csv, annotations: boxes.csv, images: DIR}",
        ),
    )
}
