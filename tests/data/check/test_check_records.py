"""The check on a healthy COCO folder, and on what goes wrong with people's: a line of ``VARIANTS`` each."""

import json
import math
import os
import shutil

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools.coco import COCO

from aqdet.data.check.cache import check_declaration
from aqdet.data.check.findings import KINDS, NOTES_KEPT, SEVERITIES
from aqdet.data.check.records import find_shared_images
from aqdet.data.declaration import Declaration


def healthy(folder):
    """Four images of 64x48 and six boxes of two classes; returns the content of its JSON."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(4):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "width": 64, "height": 48})
        for category in (3, 8)[: 1 + index % 2]:
            box = [4 + category, 5, 30, 20]
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": category, "bbox": box}
            annotations.append({**annotation, "area": 600, "iscrowd": 0, "segmentation": []})
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def check(folder, content, pixels=True):
    path = folder / "a.json"
    if content is not None:
        path.write_text(json.dumps(content))
    declaration = Declaration("mine", "coco", str(path), str(folder / "images"))
    report, usable, _ = check_declaration(declaration, pixels=pixels)
    return report, usable


def image(**fields):
    """Changes fields of the first image; a field of None is taken away."""
    return lambda content, folder: _change(content["images"][0], fields)


def box(**fields):
    """Changes fields of the first annotation."""
    return lambda content, folder: _change(content["annotations"][0], fields)


def all_boxes(function):
    def change(content, folder):
        for annotation in content["annotations"]:
            annotation.update(bbox=function(annotation["bbox"]), area=1)

    return change


def _change(record, fields):
    for key, value in fields.items():
        record[key] = value
        if value is None:
            del record[key]


def replace(part, value):
    return lambda content, folder: content.update({part: value})


def add(part, /, **fields):
    """Adds a copy of the first record of a part, with these fields."""
    return lambda content, folder: content[part].append({**content[part][0], **fields})


def text(function):
    """Changes the text of the JSON file itself."""
    return lambda content, folder: (folder / "a.json").write_bytes(function(json.dumps(content).encode())) and None


def file(function):
    """Changes the file of the first image."""
    return lambda content, folder: function(folder / "images/0.png")


def saved(mode, **options):
    def change(path):
        Image.open(path).convert(mode).save(path, **options)

    return file(change)


def renamed(on_disk, in_json):
    def change(content, folder):
        path = folder / "images" / on_disk
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "images/0.png").rename(path)
        content["images"][0]["file_name"] = in_json.replace("ROOT", str(folder / "images"))

    return change


def another(name):
    """Another image file, which no record names."""
    return lambda content, folder: shutil.copy(folder / "images/1.png", _made(folder / "images" / name) / "0.png")


def _made(folder):
    folder.mkdir()
    return folder


def link(target):
    def change(content, folder):
        path = folder / "images/0.png"
        shutil.move(path, folder / target)
        path.symlink_to(folder / target)

    return change


def turned(orientation, **size):
    def change(content, folder):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(folder / "images/0.png").save(folder / "images/0.png", exif=exif)
        content["images"][0].update(size)

    return change


def sixteen(channels):
    def change(path):
        cv2.imwrite(str(path), np.arange(48 * 64 * channels, dtype=np.uint16).reshape(48, 64, channels) * 7)

    return file(change)


def both(*changes):
    def change(content, folder):
        for one in changes:
            one(content, folder)

    return change


# name: (what is done to the healthy folder, the findings that it has to give)
VARIANTS = {
    # The file of annotations
    "not JSON": (text(lambda b: b[:-9]), {"file-unreadable": 1}),
    "empty file": (text(lambda b: b""), {"file-unreadable": 1}),
    "byte order mark": (text(lambda b: b"\xef\xbb\xbf" + b), {"file-bom": 1}),
    "Latin-1": (text(lambda b: b.replace(b"cat", b"c\xe4t")), {"file-unreadable": 1}),
    "results instead of annotations": (text(lambda b: b"[]"), {"file-format": 1}),
    "no categories": (
        replace("categories", []),
        {"file-format": 1},
    ),
    "categories without ids": (replace("categories", ["cat", "dog"]), {"category-malformed": 2}),
    "no annotations": (replace("annotations", None), {"file-format": 1}),
    "no images": (both(replace("images", []), replace("annotations", [])), {"no-images": 1, "class-without-boxes": 2}),
    "no boxes": (replace("annotations", []), {"no-boxes": 1, "class-without-boxes": 2, "image-without-boxes": 4}),
    # Categories
    "category without a name": (add("categories", id=9, name=""), {"category-malformed": 1}),
    "category of a taken id": (add("categories", name="cow"), {"category-malformed": 1}),
    "category of a taken name": (add("categories", id=9), {"category-unused": 1}),
    "category of a taken name, first": (
        lambda c, f: c["categories"].insert(0, {"id": 0, "name": "cat"}),
        {"category-unused": 1},
    ),
    "two unused categories of a name": (
        lambda c, f: c["categories"].extend([{"id": 9, "name": "cow"}, {"id": 10, "name": "cow"}]),
        {"category-unused": 1, "class-without-boxes": 1},
    ),
    "two used categories of a name": (
        both(add("categories", id=9), box(category_id=9)),
        {"category-malformed": 1},
    ),
    "category given twice": (add("categories"), {"category-unused": 1}),
    "category with text as id": (
        add("categories", id="9", name="cow"),
        {"category-id-type": 1, "class-without-boxes": 1},
    ),
    "categories with text as ids": (
        lambda c, f: [category.update(id=str(category["id"])) for category in c["categories"]],
        {"category-id-type": 2},
    ),
    "category with a name as id": (
        both(add("categories", id="x9", name="cow"), box(category_id="x9")),
        {"category-malformed": 1},
    ),
    "categories that differ by case": (
        add("categories", id=9, name="Cat"),
        {"class-alike": 1, "class-without-boxes": 1},
    ),
    "categories that differ by joints": (
        lambda c, f: c["categories"].extend([{"id": 9, "name": "sea lion"}, {"id": 10, "name": "sea_lion"}]),
        {"class-alike": 1, "class-without-boxes": 2},
    ),
    "category with a list as id": (add("categories", id=[9], name="cow"), {"category-malformed": 1}),
    "category that is text": (lambda c, f: c["categories"].append("cow"), {"category-malformed": 1}),
    "category named by a number": (
        add("categories", id=9, name=7),
        {"category-name-type": 1, "class-without-boxes": 1},
    ),
    # Image records
    "image id twice": (add("images", file_name="1.png"), {"image-id-twice": 1}),
    "image id as text": (image(id="1"), {"image-id-type": 1}),
    "image id as float": (image(id=1.0), {"image-id-type": 1}),
    "image id that is a name": (image(id="zero"), {"image-id": 1, "annotation-nowhere": 1}),
    "image id that is a GUID": (
        both(image(id="5f0e-11"), box(image_id="5f0e-11")),
        {"image-id": 1},
    ),
    "image without a file name": (image(file_name=None), {"image-name": 1}),
    "file name in another field": (
        lambda c, f: c["images"][0].update(filename=c["images"][0].pop("file_name")),
        {"image-name-field": 1},
    ),
    "file name in the address of an image": (
        lambda c, f: c["images"][0].update(coco_url="http://host/val/" + c["images"][0].pop("file_name")),
        {"image-name-field": 1, "image-elsewhere": 1},
    ),
    "file name in spaces": (image(file_name=" 0.png\n"), {"image-path": 1}),
    "file name without an ending": (image(file_name="0"), {"image-elsewhere": 1}),
    "file name without an ending, of two files": (
        both(image(file_name="0"), file(lambda p: shutil.copy(p, p.with_suffix(".bmp")))),
        {"image-missing": 1},
    ),
    "file name without an ending, of another image": (image(file_name="1"), {"image-missing": 1}),
    "another image's ending": (image(file_name="0.jpg"), {"image-missing": 1}),
    "image that is text": (lambda c, f: c["images"].append("x.png"), {"record-malformed": 1}),
    "image listed twice": (
        add("images", id=9),
        {"image-listed-twice": 1, "image-without-boxes": 1},
    ),
    "image without a size": (image(width=None), {"image-size-absent": 1}),
    "image of zero size": (image(width=0, height=0), {"image-size-absent": 1}),
    "image size as text": (image(width="64"), {"image-size-type": 1}),
    "image size of another image": (image(width=640, height=480), {"image-size": 1}),
    "image size swapped": (image(width=48, height=64), {"image-size": 1}),
    "image without boxes": (lambda c, f: c["annotations"].pop(0), {"image-without-boxes": 1}),
    "second file missing": (add("images", id=9, file_name="9.png"), {"image-missing": 1}),
    # Where files lie
    "absolute path outside": (image(file_name="/etc/hostname"), {"image-outside": 1}),
    "dots that lead outside": (image(file_name="../images/9.png"), {"image-outside": 1}),
    "drive letter": (image(file_name="C:\\data\\9.png"), {"image-outside": 1}),
    "null byte": (image(file_name="0.png\0.jpg"), {"image-outside": 1}),
    "link to the outside": (link("elsewhere.png"), {"image-outside": 1}),
    "link within": (link("images/elsewhere.bin"), {}),
    "absolute path inside": (renamed("x/0.png", "ROOT/x/0.png"), {"image-path": 1}),
    "backslashes": (renamed("x/y/0.png", "x\\y\\0.png"), {"image-path": 1}),
    "dots that stay inside": (renamed("x/0.png", "x/../x/0.png"), {}),
    # Names from labelling tools
    "dots that lead outside and back": (image(file_name="x/../../images/0.png"), {"image-elsewhere": 1}),
    "folders of another machine": (image(file_name="C:\\data\\0.png"), {"image-elsewhere": 1}),
    "an upload of a labelling server": (image(file_name="..\\..\\media\\upload\\4\\0.png"), {"image-elsewhere": 1}),
    "a server's address": (
        image(file_name="/data/local-files/?d=images/0.png"),
        {"image-elsewhere": 1},
    ),
    "an address": (renamed("ü 0.png", "https://host/a/%C3%BC%200.png?token=1"), {"image-elsewhere": 1}),
    "in a sub-folder": (renamed("Train/Data/0.png", "0.png"), {"image-elsewhere": 1}),
    "with the mark of an upload": (image(file_name="images/8ad5e3f1-0.png"), {"image-elsewhere": 1}),
    "with the root's own folder": (renamed("Train/0.png", "images/Train/0.png"), {"image-elsewhere": 1}),
    "of another image": (image(file_name="x/1.png"), {"image-missing": 1}),
    "the longer name of two": (
        both(
            renamed("a/0.png", "images/a/0.png"),
            lambda c, f: shutil.copy(f / "images/1.png", _made(f / "images/b") / "0.png"),
        ),
        {"image-elsewhere": 1},
    ),
    "two of the base name": (
        both(
            renamed("a/0.png", "x/0.png"), lambda c, f: shutil.copy(f / "images/1.png", _made(f / "images/b") / "0.png")
        ),
        {"image-missing": 1},
    ),
    "gone from a folder that is there": (
        both(renamed("a/0.png", "b/0.png"), lambda c, f: _made(f / "images/b")),
        {"image-missing": 1},
    ),
    "two names of one file": (
        both(image(file_name="x/0.png"), add("images", id=9, file_name="y/0.png")),
        {"image-missing": 2},
    ),
    "a link of the base name that leads outside": (
        both(link("elsewhere.png"), image(file_name="x/0.png")),
        {"image-missing": 1},
    ),
    "the mac's own file beside": (
        both(renamed("a/0.png", "x/0.png"), lambda c, f: (_made(f / "images/__MACOSX") / "0.png").write_bytes(b"x")),
        {"image-elsewhere": 1},
    ),
    "sub-folder, spaces and unicode": (renamed("über uns/naïve 猫 1.png", "über uns/naïve 猫 1.png"), {}),
    "other normal form of unicode": (renamed("u\u0308.png", "\u00fc.png"), {"image-path": 1}),
    "other case": (renamed("A.PNG", "a.png"), {"image-missing": 1}),
    "folder in place of a file": (renamed("x/0.png", "x"), {"image-missing": 1}),
    # Image files
    "missing file": (file(os.unlink), {"image-missing": 1}),
    "empty file of an image": (file(lambda p: p.write_bytes(b"")), {"image-empty": 1}),
    "truncated image": (file(lambda p: p.write_bytes(p.read_bytes()[:4000])), {"image-unreadable": 1}),
    "text in place of an image": (file(lambda p: p.write_bytes(b"<html>404</html>")), {"image-unreadable": 1}),
    "grey": (saved("L"), {"image-converted": 1}),
    "grey and alpha": (saved("LA"), {"image-converted": 1}),
    "black and white": (saved("1"), {"image-converted": 1}),
    "palette": (saved("P"), {"image-converted": 1}),
    "RGBA": (saved("RGBA"), {"image-converted": 1}),
    "CMYK": (saved("CMYK", format="JPEG"), {"image-converted": 1, "image-ending": 1}),
    "16 bits, grey": (sixteen(1), {"image-mode": 1}),
    "16 bits, colour": (sixteen(3), {"image-sixteen": 1}),
    "floats": (saved("F", format="TIFF"), {"image-mode": 1}),
    "JPEG named PNG": (saved("RGB", format="JPEG"), {"image-ending": 1}),
    "several frames": (
        saved("P", format="GIF", save_all=True, append_images=[Image.new("P", (64, 48), 9)]),
        {"image-frames": 1, "image-ending": 1, "image-converted": 1},
    ),
    "turned by EXIF, size after": (turned(6, width=48, height=64), {"image-turned": 1}),
    "turned by EXIF, size before": (turned(6), {"image-turned": 1, "image-size-exif": 1}),
    "turned by 180 degrees": (turned(3), {}),
    "same pixels twice": (
        file(lambda p: Image.open(p.with_name("1.png")).save(p, compress_level=1)),
        {"image-twice": 1},
    ),
    # Annotation records
    "annotation id twice": (box(id=2), {"annotation-id-twice": 1}),
    "annotation without an id": (box(id=None), {"annotation-id": 1}),
    "annotation id 0": (box(id=0), {"annotation-id": 1}),
    "annotation id as text": (box(id="1"), {"annotation-id": 1}),
    "annotation that is a list": (lambda c, f: c["annotations"].append([1, 2]), {"record-malformed": 1}),
    "annotation of no image": (add("annotations", id=9, image_id=99), {"annotation-nowhere": 1}),
    "annotation without an image": (add("annotations", id=9, image_id=None), {"annotation-nowhere": 1}),
    "image id of a box as text": (box(image_id="1"), {}),
    "class out of range": (box(category_id=4), {"class-unknown": 1}),
    "class missing": (box(category_id=None), {"class-unknown": 1}),
    "class as text": (box(category_id="3"), {"class-type": 1}),
    "class as float": (box(category_id=3.0), {"class-type": 1}),
    "class by its name": (box(category_id="cat"), {"class-type": 1}),
    "class by the name of none": (box(category_id="cow"), {"class-unknown": 1}),
    "class without boxes": (add("categories", id=9, name="cow"), {"class-without-boxes": 1}),
    "object given twice": (add("annotations", id=9), {"box-twice": 1}),
    # Boxes
    "no box": (box(bbox=None), {"box-missing": 1, "image-without-boxes": 1}),
    "empty box": (box(bbox=[]), {"box-missing": 1, "image-without-boxes": 1}),
    "polygon without a box": (box(bbox=None, segmentation=[[5, 5, 30, 5, 30, 25]]), {"box-from-polygon": 1}),
    "box of three numbers": (box(bbox=[1, 2, 3]), {"box-malformed": 1, "image-without-boxes": 1}),
    "turned box": (box(bbox=[20, 20, 9, 9, 45]), {"box-malformed": 1, "image-without-boxes": 1}),
    "box of words": (box(bbox=["a", 1, 2, 3]), {"box-malformed": 1, "image-without-boxes": 1}),
    "box as object": (box(bbox={"x": 1}), {"box-malformed": 1, "image-without-boxes": 1}),
    "box with null": (box(bbox=[1, None, 3, 4]), {"box-malformed": 1, "image-without-boxes": 1}),
    "box of text": (box(bbox=["4", "5.5", "30", "20"]), {"box-text": 1}),
    "NaN": (box(bbox=[math.nan, 5, 30, 20]), {"box-not-finite": 1, "image-without-boxes": 1}),
    "infinity": (box(bbox=[4, 5, math.inf, 20]), {"box-not-finite": 1, "image-without-boxes": 1}),
    "number beyond floats": (box(bbox=[4, 5, 10**400, 20]), {"box-malformed": 1, "image-without-boxes": 1}),
    "zero width": (box(bbox=[4, 5, 0, 20]), {"box-empty": 1, "image-without-boxes": 1}),
    "negative height": (box(bbox=[4, 5, 30, -20]), {"box-negative": 1, "image-without-boxes": 1}),
    "outside": (box(bbox=[64, 5, 30, 20]), {"box-outside": 1, "image-without-boxes": 1}),
    "reaches outside": (box(bbox=[40, 5, 30, 20]), {"box-clipped": 1}),
    "reaches half a pixel outside": (box(bbox=[34.5, 5, 30, 20]), {"box-edge": 1}),
    "one pixel": (box(bbox=[4, 5, 1, 1], area=1), {"box-thin": 1}),
    "normalised boxes": (
        all_boxes(lambda b: [b[0] / 64, b[1] / 48, b[2] / 64, b[3] / 48]),
        {"boxes-normalised": 1, "box-thin": 6},
    ),
    "corners": (
        all_boxes(lambda b: [b[0] + 20, b[1] + 10, b[0] + 50, b[1] + 30]),
        {"boxes-corners": 1, "box-clipped": 6},
    ),
    # Optional fields
    "no area": (box(area=None), {"area-absent": 1}),
    "area of 0": (box(area=0), {"area-wrong": 1}),
    "area as text": (box(area="600"), {"area-wrong": 1}),
    "area larger than the box": (box(area=6000), {"area-wrong": 1}),
    "no iscrowd": (box(iscrowd=None), {"crowd-absent": 1}),
    "iscrowd true": (box(iscrowd=True), {"crowd-type": 1, "crowd": 1, "image-without-boxes": 1}),
    "iscrowd 2": (box(iscrowd=2), {"crowd-malformed": 1}),
    "crowd region": (box(iscrowd=1), {"crowd": 1, "image-without-boxes": 1}),
    "ignore region": (box(ignore=1), {"ignore-region": 1, "image-without-boxes": 1}),
    "no segmentation": (box(segmentation=None), {}),
    "polygon of two points": (box(segmentation=[[1, 2, 3, 4]]), {"segmentation-malformed": 1}),
    "polygon of words": (box(segmentation=[["a"] * 6]), {"segmentation-malformed": 1}),
    "RLE without a size": (box(segmentation={"counts": "x"}), {"segmentation-malformed": 1}),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "healthy"
    return folder, json.dumps(healthy(folder))


@pytest.fixture
def broken(template, tmp_path):
    """A copy of the healthy folder and its content."""
    shutil.copytree(template[0], tmp_path / "d")
    return tmp_path / "d", json.loads(template[1])


def test_a_healthy_folder_has_no_findings(broken):
    folder, content = broken
    report, usable = check(folder, content)
    assert not report.counts and not report.changes
    assert usable == {**content, "annotations": [_without(a, "segmentation") for a in content["annotations"]]}
    assert report.classes() == "0: cat (id 3), 1: dog (id 8)"
    assert report.facts == {"images": 4, "of them without boxes": 0, "boxes": 6, "crowd regions": 0}


def _without(record, key):
    return {k: v for k, v in record.items() if k != key}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(broken, name):
    folder, content = broken
    change, expected = VARIANTS[name]
    change(content, folder)
    report, usable = check(folder, None if (folder / "a.json").exists() else content)
    assert dict(report.counts) == expected, report.text()
    for finding in report.findings:
        assert finding.file and "\n" not in str(finding)
    assert f"{next(iter(expected), 'classes')}: " in report.text()
    json.dumps(report.as_dict(), allow_nan=False).encode()
    if not report.refused(strict=False):
        as_detectron2_reads(folder, usable, report)


def as_detectron2_reads(folder, usable, report):
    """What is left can be read by Detectron2: sizes, unique ids, boxes with an area inside the image."""
    sizes = {}
    for record in usable["images"]:
        sizes[record["id"]] = (record["width"], record["height"])
        assert read_image(str(folder / "images" / record["file_name"]), "BGR").shape[1::-1] == sizes[record["id"]]
    (folder / "usable.json").write_text(json.dumps(usable, allow_nan=False))
    coco = COCO(folder / "usable.json")
    assert len(coco.anns) == len(usable["annotations"]) == report.facts["boxes"] + report.facts["crowd regions"]
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and width > 0 and height > 0
        assert x + width <= sizes[annotation["image_id"]][0] and y + height <= sizes[annotation["image_id"]][1]
        assert 0 < annotation["area"] <= width * height and annotation["iscrowd"] in (0, 1) and annotation["id"]


def test_every_kind_of_finding_is_documented_and_most_are_tried():
    tried = {kind for _, expected in VARIANTS.values() for kind in expected}
    assert len(VARIANTS) >= 30 and tried <= set(KINDS)
    assert {kind.severity for kind in KINDS.values()} == set(SEVERITIES)
    assert {"repaired", "dropped"} == {KINDS[k].severity for k in KINDS if KINDS[k].changes} - {"note"}


def test_values_are_repaired_as_documented(broken):
    folder, content = broken
    first = content["annotations"][0]
    first.update(bbox=["40", "-3", "30", "20"], area=600, category_id="3", iscrowd=False, id=0)
    content["images"][0].update(id="1", width="64.0", height=None)
    report, usable = check(folder, content)
    assert usable["images"][0] == {"id": 1, "file_name": "0.png", "width": 64, "height": 48}
    fixed = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [40, 0, 24, 17], "area": 24 * 17, "iscrowd": 0}
    assert usable["annotations"][0] == fixed
    assert report.number("repaired") == 8 and report.number("error") == 0
    assert report.refused(strict=False) == 0 and report.refused(strict=True) == 8
    assert [str(f) for f in report.findings if f.kind == "box-clipped"] == [
        f'{folder}/a.json: annotation 0: bbox = ["40", "-3", "30", "20"] in 64x48'
    ]


def test_without_images_only_their_files_are_looked_for(broken):
    folder, content = broken
    (folder / "images/0.png").write_bytes(b"no image")
    (folder / "images/1.png").write_bytes(b"")
    content["images"][2]["file_name"] = "gone.png"
    report, _ = check(folder, content, pixels=False)
    assert report.counts == {"image-empty": 1, "image-missing": 1}


def test_candidates_are_named(broken):
    folder, content = broken
    for name in "abcdef":
        shutil.copy(folder / "images/0.png", _made(folder / "images" / name) / "x.png")
    content["images"][0]["file_name"] = "upload/x.png"
    report, _ = check(folder, content)
    assert report.findings[0].value == "upload/x.png (there are a/x.png, b/x.png, c/x.png and 3 more)"


def test_a_folder_in_place_of_an_image_is_said_to_be_one(broken):
    folder, content = broken
    _made(folder / "images/x.png")
    content["images"][0]["file_name"] = "x.png"
    assert check(folder, content)[0].findings[0].value == "x.png (it is a folder)"


@pytest.mark.parametrize("name, near", [("1.PNG", "1.png"), ("data/images/1.png", "1.png"), ("none.png", None)])
def test_a_missing_file_comes_with_the_one_that_was_probably_meant(broken, name, near):
    folder, content = broken
    content["images"][0]["file_name"] = name
    report, _ = check(folder, content)
    assert report.findings[0].value == (f"{name} (there is {near})" if near else name)


def test_nested_values_are_shown_in_short(broken):
    folder, content = broken
    nested = [[1] * 1000] * 100
    content["annotations"][0]["bbox"] = nested
    content["annotations"][1]["bbox"] = [1] * 1000
    report, _ = check(folder, content)
    assert report.counts["box-malformed"] == 2 and max(len(str(f)) for f in report.findings) < 500


def test_the_same_image_in_two_sets(broken):
    folder, content = broken
    first, _ = check(folder, {**content, "images": content["images"][:2], "annotations": content["annotations"][:3]})
    shutil.copy(folder / "images/1.png", folder / "images/copy.png")
    content["images"] = [{**content["images"][1], "file_name": "copy.png"}, *content["images"][2:]]
    for pixels, count in ((True, 1), (False, 0)):
        second, _ = check(folder, content, pixels=pixels)
        find_shared_images(first, second)
        assert second.counts["image-in-two-sets"] == count
        if count:
            assert [str(f) for f in second.findings if f.kind == "image-in-two-sets"] == [
                "mine: copy.png: also = mine: 1.png"
            ]


def test_all_errors_are_kept_and_of_notes_the_first(broken):
    folder, content = broken
    content["annotations"] = [
        {**content["annotations"][0], "id": i + 1, "bbox": [i % 60, i // 60, 1, 1], "area": 1} for i in range(100)
    ]
    content["annotations"] += [{**content["annotations"][0], "id": 200 + i, "category_id": 5} for i in range(30)]
    report, _ = check(folder, content)
    assert report.counts["box-thin"] == 130 and report.counts["class-unknown"] == 30
    kept = [finding.kind for finding in report.findings]
    assert kept.count("box-thin") == NOTES_KEPT and kept.count("class-unknown") == 30
    assert "and 125 more" in report.text() and "and 25 more" in report.text()


def test_what_the_reader_does_with_modes_is_what_is_documented(tmp_path):
    def read(image, name, **options):
        image.save(tmp_path / name, **options)
        return read_image(str(tmp_path / name), "RGB")

    assert (read(Image.new("L", (2, 2), 77), "l.png") == 77).all()
    assert (read(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "rgba.png") == [10, 20, 30]).all()
    cv2.imwrite(str(tmp_path / "c.png"), np.full((2, 2, 3), 0x1234, np.uint16))
    assert (read_image(str(tmp_path / "c.png"), "RGB") == 0x12).all()
    # Why grey of 16 bits is refused: all above 255 is white.
    cv2.imwrite(str(tmp_path / "g.png"), np.full((2, 2), 0x1234, np.uint16))
    assert (read_image(str(tmp_path / "g.png"), "RGB") == 255).all()


# name: (four corners of a box of 64x48, whether the table's columns are x, y, w, h, findings)
UNITS = {
    "shares, by corners": ((0.1, 0.2, 0.5, 0.9), False, {"boxes-normalised": 1, "box-thin": 4}),
    "shares, by sides": ((0.1, 0.2, 0.4, 0.7), True, {"boxes-normalised": 1, "box-thin": 4}),
    "corners as sides": ((20, 20, 60, 40), True, {"boxes-corners": 1, "box-clipped": 4}),
    "sides as corners": ((20, 20, 10, 12), False, {"boxes-sides": 1, "box-negative": 4, "no-boxes": 1}),
    "an end before the start that is no side": ((60, 40, 20, 20), False, {"box-negative": 4, "no-boxes": 1}),
}


@pytest.mark.parametrize("name", UNITS)
def test_other_units_of_boxes_are_told_in_every_format(tmp_path, name):
    numbers, sides, expected = UNITS[name]
    healthy(tmp_path)
    columns = "x,y,w,h" if sides else "xmin,ymin,xmax,ymax"
    rows = [f"{index}.png,cat,{','.join(map(str, numbers))}" for index in range(4)]
    (tmp_path / "a.csv").write_text("\n".join([f"filename,class,{columns}", *rows]))
    declaration = Declaration("mine", "csv", str(tmp_path / "a.csv"), str(tmp_path / "images"))
    report, *_ = check_declaration(declaration, pixels=True)
    quiet = ("image-without-boxes", "class-without-boxes")
    assert {kind: count for kind, count in report.counts.items() if kind not in quiet} == expected
    assert report.refused(strict=False) == sum(kind.startswith("boxes-") for kind in expected)


def test_boxes_of_voc_in_shares_are_told(tmp_path):
    healthy(tmp_path)
    for index in range(4):
        box = "<xmin>0.1</xmin><ymin>0.1</ymin><xmax>0.5</xmax><ymax>0.9</ymax>"
        (tmp_path / f"images/{index}.xml").write_text(
            f"<annotation><size><width>64</width><height>48</height></size>"
            f"<object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
        )
    declaration = Declaration("mine", "voc", str(tmp_path / "images"), str(tmp_path / "images"))
    report, *_ = check_declaration(declaration, pixels=True)
    assert report.counts == {"boxes-normalised": 1, "box-thin": 4, "box-edge": 4}
