import numpy as np
import pytest
from data_forms import check_entry, cvat, cvat_box, expect, write_images
from pycocotools import mask as coco_mask

BOX = cvat_box("cat", 3, 4, 20, 10)


def check(folder, shapes=(), *, text=None, images=None, labels=("cat", "dog"), **entry):
    """The six images, and an XML with shapes of the first one."""
    root = write_images(folder / "images", ["a.png"])
    path = folder / "annotations.xml"
    if text is None:
        text = cvat(images or [("a.png", (64, 48), shapes)], labels)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check_entry({"format": "cvat", "annotations": str(path), "images": str(root), **entry})


def test_shapes_become_boxes_and_outlines(tmp_path):
    shapes = [
        BOX,
        '<polygon label="dog" occluded="0" points="10,10;30.5,10;20,40" z_order="0"/>',
        '<ellipse label="dog" cx="30" cy="20" rx="10" ry="4" rotation="90"/>',
        cvat_box("cat", 20, 20, 20, 10, 'occluded="1" rotation="90.0"'),
        '<mask label="dog" rle="3, 2, 4, 6" left="50" top="30" width="5" height="3"/>',
    ]
    report, usable = check(tmp_path, shapes)
    expect(report, {"box-from-polygon": 4, "occluded": 1})
    boxes = [a["bbox"] for a in usable["annotations"]]
    assert boxes[0] == [3, 4, 20, 10] and boxes[1] == [10, 10, 20.5, 30]
    # Turned by a quarter about its centre, 30 and 25.
    assert boxes[2] == pytest.approx([26, 10, 8, 20]) and boxes[3] == pytest.approx([25, 15, 10, 20])
    assert usable["annotations"][1]["segmentation"] == [[10, 10, 30.5, 10, 20, 40]]
    # 3 pixels off, 2 on, 4 off, 6 on in rows of 5.
    assert boxes[4] == [50, 30, 5, 3]
    expected = np.zeros((48, 64), dtype=np.uint8)
    expected[30, 53:55] = expected[31, 54] = expected[32, 50:55] = 1
    np.testing.assert_array_equal(coco_mask.decode(usable["annotations"][4]["segmentation"]), expected)


def test_classes_are_the_tasks_in_its_order(tmp_path):
    report, usable = check(tmp_path, [BOX], labels=("dog", "cat"))
    expect(report, {"class-without-boxes": 1})
    assert [c["name"] for c in usable["categories"]] == ["dog", "cat"]
    assert usable["annotations"][0]["category_id"] == 2
    report, _ = check(tmp_path, [cvat_box("ape", 1, 2, 3, 4)])
    assert report.counts["class-unknown"] == 1 and "ape: not among the classes" in report.text()
    report, usable = check(tmp_path, [BOX, cvat_box("ape", 1, 2, 3, 4)], labels=())
    expect(report, {})
    assert [c["name"] for c in usable["categories"]] == ["ape", "cat"]
    skeleton = "<label><name>joint</name><parent>cat</parent></label></labels>"
    text = cvat([("a.png", (64, 48), [BOX])]).replace("</labels>", skeleton)
    _, usable = check(tmp_path, text=text)
    assert [c["name"] for c in usable["categories"]] == ["cat", "dog"]


def test_difficult_is_an_attribute(tmp_path):
    box = BOX.replace("></box>", '><attribute name="difficult">true</attribute></box>')
    report, usable = check(tmp_path, [box], difficult_as_crowd=True)
    assert report.counts["ignore-region"] == 1 and usable["annotations"][0]["iscrowd"] == 1
    report, _ = check(tmp_path, [box])
    assert report.counts["difficult"] == 1


NONE = {"no-boxes": 1, "class-without-boxes": 2}
SHAPES = {
    "outside of the image": (
        cvat_box("cat", 1, 2, 3, 4, 'outside="1"'),
        {"object-not-in-image": 1, **NONE},
        "outside = 1",
    ),
    "line": ('<polyline label="cat" points="1,1;2,2;3,3"/>', {"shape-without-area": 1, **NONE}, "polyline 0"),
    "skeleton": (
        '<skeleton label="cat"><points label="x" points="1,1"/></skeleton>',
        {"shape-without-area": 1, **NONE},
        "",
    ),
    "a tag": ('<tag label="cat" source="manual"></tag>', NONE, ""),
    "lacks a side": (BOX.replace("xbr", "x"), {"object-malformed": 1, **NONE}, "no attribute 'xbr'"),
    "words": (BOX.replace('"3"', '"three"'), {"object-malformed": 1, **NONE}, "'three' is no number"),
    "NaN": (BOX.replace('"3"', '"nan"'), {"box-not-finite": 1, **NONE}, "a.png: box 0"),
    "NaN turned": (cvat_box("cat", 1, 2, 3, 4, 'rotation="nan"'), {"box-not-finite": 1, **NONE}, ""),
    "reversed": (cvat_box("cat", 20, 20, -5, 5), {"box-negative": 1, **NONE}, ""),
    "reversed and turned": (cvat_box("cat", 20, 20, -5, 5, 'rotation="30"'), {"box-negative": 1, **NONE}, ""),
    "outside": (cvat_box("cat", 70, 2, 3, 4), {"box-outside": 1, **NONE}, "in 64x48"),
    "points": ('<polygon label="cat" points="1,1;2;3,3"/>', {"object-malformed": 1, **NONE}, "x,y;x,y"),
    "short rle": (
        '<mask label="cat" rle="3,2" left="1" top="1" width="5" height="3"/>',
        {"object-malformed": 1, **NONE},
        "rle covers 5 pixels of 5x3",
    ),
    "a mask outside": (
        '<mask label="cat" rle="0,15" left="62" top="1" width="5" height="3"/>',
        {"object-malformed": 1, **NONE},
        "is not within 64x48",
    ),
    "an empty mask": (
        '<mask label="cat" rle="15" left="1" top="1" width="5" height="3"/>',
        {"object-malformed": 1, **NONE},
        "the mask is empty",
    ),
    "a mask beyond memory": (
        '<mask label="cat" rle="0,1000000000000" left="0" top="0" width="1000000" height="1000000"/>',
        {"object-malformed": 1, **NONE},
        "rle covers",
    ),
    "no label": (BOX.replace(' label="cat"', ""), {"object-malformed": 1, **NONE}, "an object without a class"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_are_wrong(tmp_path, case):
    shape, counts, words = SHAPES[case]
    report, _ = check(tmp_path, [shape])
    expect(report, counts, words)


GOOD = cvat([("a.png", (64, 48), [BOX])])
ENTITY = '<!DOCTYPE a [<!ENTITY x "y">]><annotations>'
FILES = {
    "truncated": (GOOD[:-20], {"file-unreadable": 1}, "not valid XML"),
    "empty": ("", {"file-unreadable": 1}, "not valid XML"),
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), {}, ""),
    "UTF-16": (GOOD.replace("utf-8", "utf-16").encode("utf-16"), {}, ""),
    "a DOCTYPE": (GOOD.replace("<annotations>", ENTITY), {"file-unreadable": 1}, "DOCTYPE"),
    "video": (GOOD.replace("</annotations>", "<track/></annotations>"), {"file-format": 1}, "CVAT for images 1.1"),
    "VOC": ("<annotation/>", {"file-format": 1}, "format: voc"),
    "another XML": ("<html/>", {"file-format": 1}, "its root is <html>"),
    "no images": ("<annotations/>", {"file-format": 1}, "no <image> in it"),
    "no name": (GOOD.replace(' name="a.png"', ""), {"image-name": 1}, "image 0"),
    "wrong size": (GOOD.replace('"64"', '"640"'), {"image-size": 1}, "640x48 stated, 64x48 read"),
    "no size": (GOOD.replace('width="64"', ""), {"image-size-absent": 1}, ""),
    "words for a size": (GOOD.replace('"64"', '"wide"'), {"image-size-absent": 1}, "width = wide"),
    "another folder": (GOOD.replace("a.png", "job/1/a.png"), {"image-elsewhere": 1}, "job/1/a.png"),
    "a missing image": (GOOD.replace("a.png", "c.png"), {"image-missing": 1}, "c.png"),
    "outside the root": (GOOD.replace("a.png", "../annotations.xml"), {"image-outside": 1}, "../annotations.xml"),
}


def test_a_mask_in_an_image_without_a_size_is_a_finding(tmp_path):
    mask = '<mask label="cat" rle="0,15" left="1" top="1" width="5" height="3"/>'
    text = cvat([("a.png", (64, 48), [mask])])
    assert ' width="64" height="48"' in text
    report, _ = check(tmp_path, text=text.replace(' width="64" height="48"', ""))
    assert report.counts["object-malformed"] == 1 and "needs the width and height of its image" in report.text()


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_wrong(tmp_path, case):
    text, counts, words = FILES[case]
    report, usable = check(tmp_path, text=text)
    found = {k: v for k, v in report.counts.items() if k in counts or k.startswith("file-")}
    assert found == counts, report.text()
    assert words in report.text()
    bad = report.refused(strict=False) and not {"image-size", "image-missing", "image-outside"} & set(counts)
    assert len(usable["annotations"]) == (0 if bad else 1)
