import json
import os
import zlib

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from helpers import ROOT
from PIL import Image
from pycocotools.coco import COCO

from aqdet.data import convert_voc
from aqdet.data.check.cache import check_declaration
from aqdet.data.check.records import find_shared_images
from aqdet.data.declaration import Declaration

BCCD = ROOT.parent / "shared" / "data" / "BCCD"


def add(root, stem, objects, *, size=(40, 30), declared=None, ending=".jpg", split="train", exif=None):
    """Adds an image with objects (name, corners[, further XML]) to a VOC folder."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with open(root / f"ImageSets/Main/{split}.txt", "a") as file:
        file.write(f"{stem}\n")
    xml, image = root / f"Annotations/{stem}.xml", root / f"JPEGImages/{stem}{ending}"
    for path in (xml, image):
        path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if exif is None else {"exif": exif}
    # Each its own colour, so that no two images are the same.
    Image.new("RGB", size, zlib.crc32(stem.encode()) & 0xFFFFFF).save(image, **options)
    width, height = declared or size
    items = "".join(
        f"<object><name>{name}</name>{''.join(more)}<bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        + "</bndbox></object>"
        for name, corners, *more in objects
    )
    size_xml = f"<size><width>{width}</width><height>{height}</height></size>"
    xml.write_text(f"<annotation>{size_xml}{items}</annotation>")
    return root


def convert(root, split="train", classes=None, **options):
    output = root / "out" / f"{split}.json"
    report = convert_voc(root, split, output, classes, **options)
    return json.loads(output.read_text()), report


def refused(root, words, split="train", **options):
    with pytest.raises(ValueError, match=words) as error:
        convert(root, split, **options)
    assert "\n" not in str(error.value)
    assert not (root / "out").exists() or not any((root / "out").iterdir())


def test_boxes_are_one_based_and_inclusive(tmp_path):
    objects = [("dog", (1, 1, 40, 30)), ("cat", (5, 7, 5, 8)), ("dog", (2.5, 3, 10, 5))]
    content, report = convert(add(tmp_path, "a", objects))
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 40, 30], [4, 6, 1, 2], [1.5, 2, 8.5, 3]]
    assert [a["area"] for a in content["annotations"]] == [1200, 2, 25.5]
    assert [a["category_id"] for a in content["annotations"]] == [2, 1, 2]
    assert report.boxes_per_class == {"cat": 1, "dog": 2}
    assert report.images_per_class == {"cat": 1, "dog": 1}
    assert report.bands_per_class["dog"] == {"small": 1, "medium": 1, "large": 0}
    assert report.notes == {"boxes one pixel wide or high, kept": ["a#1"]}


def test_repairs_and_drops_are_counted(tmp_path):
    objects = [
        ("cat", (31, 21, 45, 30)),
        ("dog", (0, 0, 10, 10)),
        ("dog", (9, 9, 4, 12)),
        ("dog", (50, 1, 60, 5)),
        ("dog", (2, 2, 9, 9)),
        ("dog", (2, 2, 9, 9)),
    ]
    add(tmp_path, "a", objects, declared=(80, 60))
    add(tmp_path, "b", [])
    add(tmp_path, "a", objects)
    content, report = convert(tmp_path)
    boxes = [a["bbox"] for a in content["annotations"]]
    assert boxes == [[30, 20, 10, 10], [0, 0, 10, 10], [1, 1, 8, 8], [1, 1, 8, 8]]
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (40, 30)
    assert report.notes == {
        "lines repeated in the split file, used once": ["a"],
        "boxes that reach outside the image, clipped": ["a#0", "a#1"],
        "boxes that end before they start, dropped": ["a#2"],
        "boxes outside the image, dropped": ["a#3"],
        "objects given twice, kept": ["a#5"],
        "images without objects, kept": ["b"],
    }
    assert "boxes that reach outside the image, clipped: 2 (a#0, a#1)" in str(report)
    (tmp_path / "Annotations/a.xml").write_text("<annotation/>")
    _, report = convert(tmp_path, classes=["dog"])
    assert report.notes["image size in XML differs, file's used"] == ["a: nonexnone, 40x30"]


def test_long_lists_are_cut_with_a_count(tmp_path):
    _, report = convert(add(tmp_path, "a", [("dog", (5, 5, 5, 5))] * 24))
    assert "a#19, and 4 more)" in str(report)


def test_all_splits_get_the_same_class_ids(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5)), ("cow", (1, 1, 10, 5))])
    add(tmp_path, "b", [("cat", (1, 1, 10, 5))], split="val")
    train, _ = convert(tmp_path)
    val, report = convert(tmp_path, "val")
    assert train["categories"] == val["categories"]
    assert [c["name"] for c in val["categories"]] == ["cat", "cow", "dog"]
    assert report.boxes_per_class == {"cat": 1, "cow": 0, "dog": 0}
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    _, report = convert(tmp_path)
    assert report.notes == {"annotations outside the split, unreadable, not searched for classes": ["b"]}
    given, _ = convert(tmp_path, classes=["dog", "cow"])
    assert [a["category_id"] for a in given["annotations"]] == [1, 2]


def test_difficult_objects(tmp_path):
    hard = "<difficult>1</difficult>"
    add(tmp_path, "a", [("dog", (1, 1, 10, 5), hard), ("dog", (1, 1, 9, 5), "<difficult>0</difficult>")])
    content, report = convert(tmp_path)
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 0]
    assert report.notes == {"difficult objects, kept as objects": ["a#0"]}
    content, report = convert(tmp_path, difficult_as_crowd=True)
    assert [a["iscrowd"] for a in content["annotations"]] == [1, 0]
    assert report.notes == {"difficult objects, made crowd regions": ["a#0"]}


def test_parts_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    content, _ = convert(add(tmp_path, "a", [("dog", (1, 1, 10, 5), part)]))
    assert len(content["annotations"]) == 1 and len(content["categories"]) == 1


def test_other_names_and_endings(tmp_path):
    stems = {"über 1": ".png", "sub/b": ".JPG", "c.d": ".jpeg"}
    for stem, ending in stems.items():
        add(tmp_path, stem, [("dog", (1, 1, 10, 5))], ending=ending)
    content, _ = convert(tmp_path)
    assert [i["file_name"] for i in content["images"]] == [s + e for s, e in stems.items()]


def test_images_turned_by_exif_have_the_size_detectron2_reads(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content, report = convert(add(tmp_path, "a", [], declared=(30, 40), exif=exif), classes=["dog"])
    height, width = read_image(str(tmp_path / "JPEGImages/a.jpg"), "RGB").shape[:2]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (width, height) == (30, 40)
    assert report.notes["images turned by their EXIF orientation"] == ["a"]


def test_output_is_deterministic_and_loads(tmp_path):
    add(tmp_path, "b", [("dog", (1, 1, 10, 5))])
    add(tmp_path, "a", [("cat", (1, 1, 10, 5)), ("dog", (3, 3, 9, 9))])
    convert(tmp_path)
    path = tmp_path / "out/train.json"
    before = path.read_bytes()
    convert(tmp_path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["train.json"]
    assert len(COCO(str(path)).getAnnIds()) == 3
    records = load_coco_json(str(path), str(tmp_path / "JPEGImages"), f"test_{path}")
    assert [len(r["annotations"]) for r in records] == [1, 2]
    assert all(os.path.isfile(r["file_name"]) for r in records)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + text, "a.xml: has a DOCTYPE"),
        (lambda text: text[:-5], "a.xml: not valid XML"),
        (lambda text: "", "a.xml: not valid XML"),
        (lambda text: text.replace(">1<", ">?<"), r"bndbox of object 0 needs four finite .* xmin='\?'"),
        (lambda text: text.replace(">1<", ">nan<"), "needs four finite numbers"),
        (lambda text: text.replace(">10<", ">1e999<"), "needs four finite numbers"),
        (lambda text: text.replace("bndbox", "box"), "needs four finite numbers, got xmin=''"),
        (lambda text: text.replace("dog", " "), "object 0 has no name"),
    ],
)
def test_bad_annotations_are_refused(tmp_path, change, words):
    xml = add(tmp_path, "a", [("dog", (1, 1, 10, 5))]) / "Annotations/a.xml"
    xml.write_text(change(xml.read_text()))
    refused(tmp_path, words)


def test_a_doctype_in_another_encoding_is_refused(tmp_path):
    xml = add(tmp_path, "a", [("dog", (1, 1, 10, 5))]) / "Annotations/a.xml"
    text = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE x []>' + xml.read_text()
    xml.write_bytes(text.encode("utf-16"))
    refused(tmp_path, "has a DOCTYPE")


def test_all_missing_and_bad_files_are_in_one_line(tmp_path):
    for stem in "abc":
        add(tmp_path, stem, [("dog", (1, 1, 10, 5))])
    for stem in "ab":
        (tmp_path / f"Annotations/{stem}.xml").write_text("<annotation>")
    refused(tmp_path, r"2 annotation files cannot be used: .*a\.xml.*; .*b\.xml")
    (tmp_path / "JPEGImages/a.jpg").unlink()
    (tmp_path / "Annotations/c.xml").unlink()
    refused(tmp_path, r"2 files are missing in .*: Annotations/c\.xml, JPEGImages/a\.jpg$")


def test_bad_images_are_refused(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5))])
    (tmp_path / "JPEGImages/a.jpg").write_bytes(b"no image")
    refused(tmp_path, r"a\.jpg' is not an image that can be read")
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages/a.png")
    refused(tmp_path, r"images of the same name in .*: a\.jpg and a\.png")


def test_bad_splits_and_classes_are_refused(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5))])
    refused(tmp_path, "no split file .*splits there: train", split="val")
    refused(tmp_path, "classes dog are in the data but not in --classes cat", classes=["cat"])
    refused(tmp_path, "none empty or twice", classes=["dog", "dog"])
    refused(tmp_path, "at least one", classes=[])
    split = tmp_path / "ImageSets/Main/train.txt"
    split.write_text("a  1\nb -1\n")
    refused(tmp_path, "marks the images of one class")
    split.write_text("../a\n")
    refused(tmp_path, r"names files outside the folder: \.\./a")
    split.write_text("\n")
    refused(tmp_path, "lists no images")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5))])
    convert(tmp_path)
    before = (tmp_path / "out/train.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space")

    add(tmp_path, "b", [])
    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        convert(tmp_path)
    assert (tmp_path / "out/train.json").read_bytes() == before
    assert os.listdir(tmp_path / "out") == ["train.json"]


@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not beside the repository, at ../shared/data/BCCD")
def test_bccd(tmp_path):
    reports = {s: convert_voc(BCCD, s, tmp_path / f"{s}.json") for s in ("train", "val", "test")}
    assert [(r.num_images, r.num_boxes) for r in reports.values()] == [(205, 2805), (87, 1138), (72, 945)]
    assert reports["train"].boxes_per_class == {"Platelets": 209, "RBC": 2382, "WBC": 214}
    # Two stray clicks of one pixel are all that is wrong with it.
    thin = "boxes one pixel wide or high, kept"
    assert reports["train"].notes == {thin: ["BloodImage_00343#3"]}
    assert reports["val"].notes == {thin: ["BloodImage_00338#12"]}
    assert reports["test"].notes == {}
    boxes = np.array([a["bbox"] for a in json.loads((tmp_path / "val.json").read_text())["annotations"]])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= [640, 480]).all()


def check_voc(root, split="train", **options):
    declaration = Declaration("mine", "voc", str(root), str(root / "JPEGImages"), split, **options)
    report, usable, _ = check_declaration(declaration, pixels=True)
    return report, usable


def test_a_folder_is_read_as_it_is_converted(tmp_path):
    add(tmp_path, "sub/ü 1", [("dog", (1, 1, 40, 30)), ("cat", (5, 7, 5, 8))])
    add(tmp_path, "b", [("dog", (31, 21, 45, 30))])
    report, usable = check_voc(tmp_path)
    converted, _ = convert(tmp_path)
    assert report.counts == {"box-thin": 1, "box-clipped": 1}
    without = [{k: v for k, v in a.items() if k != "segmentation"} for a in converted["annotations"]]
    assert usable == {**converted, "annotations": without}


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda text: '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + text, "file-unreadable"),
        (lambda text: text[:-5], "file-unreadable"),
        (lambda text: text.replace(">1<", ">?<"), "object-malformed"),
        (lambda text: text.replace("dog", " "), "object-malformed"),
        (lambda text: text.replace(">40<", ">80<"), "image-size"),
        (lambda text: text.replace("<width>40</width>", ""), "image-size-absent"),
        (lambda text: text.replace(">10<", ">0<"), "box-empty"),
        (lambda text: text.replace(">10<", ">-7<"), "box-negative"),
    ],
)
def test_faults_of_a_folder(tmp_path, change, kind):
    add(tmp_path, "b", [("dog", (2, 2, 20, 20))])
    xml = add(tmp_path, "a", [("dog", (1, 1, 10, 5))]) / "Annotations/a.xml"
    xml.write_text(change(xml.read_text()))
    report, _ = check_voc(tmp_path)
    consequences = {"image-without-boxes", "image-size-absent"} - {kind}
    assert {k: n for k, n in report.counts.items() if k not in consequences} == {kind: 1}
    assert report.findings[0].file == str(xml)


def test_what_a_folder_lacks(tmp_path):
    for stem in "abc":
        add(tmp_path, stem, [("dog", (1, 1, 10, 5), "<difficult>1</difficult>")])
    (tmp_path / "JPEGImages/a.jpg").unlink()
    (tmp_path / "Annotations/b.xml").unlink()
    report, _ = check_voc(tmp_path)
    counts = report.counts
    assert counts["image-missing"] == counts["file-unreadable"] == 1 and counts["difficult"] == 2
    report, _ = check_voc(tmp_path, "val")
    assert report.counts == {"file-unreadable": 1} and "splits there: train" in report.findings[0].value


def test_classes_and_difficult_objects_as_declared(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5), "<difficult>1</difficult>"), ("cat", (1, 1, 9, 9))])
    report, usable = check_voc(tmp_path, classes=("dog", "cat"), difficult_as_crowd=True)
    assert [c["name"] for c in usable["categories"]] == ["dog", "cat"]
    assert [a["iscrowd"] for a in usable["annotations"]] == [1, 0] and report.counts["ignore-region"] == 1
    report, _ = check_voc(tmp_path, classes=("cow", "cat"))
    assert report.counts["class-unknown"] == 1


@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not beside the repository, at ../shared/data/BCCD")
def test_bccd_as_it_is():
    reports = [check_voc(BCCD, split)[0] for split in ("train", "val", "test")]
    assert [report.facts["boxes"] for report in reports] == [2805, 1138, 945]
    assert [dict(report.counts) for report in reports] == [{"box-thin": 1}, {"box-thin": 1}, {}]
    find_shared_images(reports[0], reports[1])
    assert not reports[1].counts["image-in-two-sets"]
