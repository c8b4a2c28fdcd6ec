import json
import math

import numpy as np
import pytest
from data_forms import check_entry, expect, via_entries, write_images

RECT = {"name": "rect", "x": 3, "y": 4, "width": 20, "height": 10}


def check(folder, regions, *, content=None, key="class", **entry):
    """The six images, and an export with regions (class, shape) of the first one."""
    images = write_images(folder / "images", ["a.png"])
    path = folder / "via.json"
    if content is None:
        content = via_entries({"a.png": regions}, key)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return check_entry({"format": "via", "annotations": str(path), "images": str(images), **entry})


def names(usable):
    return [c["name"] for c in usable["categories"]]


def test_shapes_become_boxes_and_outlines(tmp_path):
    regions = [
        ("cat", RECT),
        ("dog", {"name": "polygon", "all_points_x": [10, 30, 20], "all_points_y": [10, 10, 40]}),
        ("dog", {"name": "circle", "cx": 30, "cy": 20, "r": 5}),
        ("dog", {"name": "ellipse", "cx": 30, "cy": 20, "rx": 10, "ry": 4}),
        ("cat", {"name": "ellipse", "cx": 30, "cy": 20, "rx": 10, "ry": 4, "theta": math.pi / 2}),
        ("cat", {"name": "ellipse", "cx": 30, "cy": 24, "rx": 10, "ry": 4, "theta": math.pi / 6}),
    ]
    report, usable = check(tmp_path, regions)
    expect(report, {"box-from-polygon": 5})
    boxes = [a["bbox"] for a in usable["annotations"]]
    assert boxes[:4] == [[3, 4, 20, 10], [10, 10, 20, 30], [25, 15, 10, 10], [20, 16, 20, 8]]
    assert boxes[4] == pytest.approx([26, 10, 8, 20])
    # The outline's corners lie on the ellipse, and its extent is the box but for their number.
    for annotation, (rx, ry, turn) in zip(
        usable["annotations"][3:], [(10, 4, 0), (10, 4, 90), (10, 4, 30)], strict=True
    ):
        x, y, width, height = annotation["bbox"]
        points = np.array(annotation["segmentation"][0]).reshape(-1, 2) - (x + width / 2, y + height / 2)
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        along, across = points @ (cos, sin), points @ (-sin, cos)
        np.testing.assert_allclose((along / rx) ** 2 + (across / ry) ** 2, 1, atol=1e-9)
        np.testing.assert_allclose(np.ptp(points, axis=0), (width, height), rtol=0.005)
    assert usable["annotations"][1]["segmentation"] == [[10, 10, 30, 10, 20, 40]]


def test_the_class_is_found_or_declared(tmp_path):
    entries = via_entries({"a.png": [("cat", RECT)]}, "animal")
    report, usable = check(tmp_path, [], content=entries)
    expect(report, {})
    assert names(usable) == ["cat"]
    (entry,) = entries.values()
    attributes = entry["regions"][0]["region_attributes"]
    attributes["quality"] = "good"
    report, _ = check(tmp_path, [], content=entries)
    expect(report, {"file-format": 1, "no-boxes": 1}, "animal, quality: which is the class? declare class_key")
    report, usable = check(tmp_path, [], content=entries, class_key="animal")
    assert names(usable) == ["cat"]
    attributes["Label"] = "lynx"
    report, usable = check(tmp_path, [], content=entries)
    expect(report, {})
    assert names(usable) == ["lynx"]


def test_options_that_are_ticked(tmp_path):
    other = {**RECT, "x": 30}
    regions = [
        ({"cat": True, "dog": False}, RECT),
        ({"dog": "true"}, other),
        ({"cat": True, "dog": True}, RECT),
        ({}, RECT),
    ]
    report, usable = check(tmp_path, regions)
    expect(report, {"object-malformed": 2}, "class has 2 options ticked: cat, dog")
    assert [a["category_id"] for a in usable["annotations"]] == [1, 2]


def test_options_of_a_project_are_the_classes_in_their_order(tmp_path):
    content = {
        "_via_settings": {},
        "_via_img_metadata": via_entries({"a.png": [("dog", RECT)]}),
        "_via_attributes": {"region": {"class": {"type": "radio", "options": {"dog": "", "cat": "", "ape": ""}}}},
    }
    report, usable = check(tmp_path, [], content=content)
    expect(report, {"class-without-boxes": 2})
    assert names(usable) == ["dog", "cat", "ape"]
    report, usable = check(tmp_path, [], content=content, classes=["cat", "dog"])
    assert names(usable) == ["cat", "dog"] and usable["annotations"][0]["category_id"] == 2
    report, _ = check(tmp_path, [], content=content, classes=["cat"])
    assert report.counts["class-unknown"] == 1 and "dog: not among the classes" in report.text()


def test_regions_without_attributes_are_of_the_only_class(tmp_path):
    report, _ = check(tmp_path, [(None, RECT)])
    expect(report, {"file-format": 1, "no-boxes": 1}, "for a single class declare classes: [NAME]")
    report, usable = check(tmp_path, [(None, RECT)], classes=["balloon"])
    expect(report, {"class-implied": 1})
    assert names(usable) == ["balloon"] and usable["annotations"][0]["bbox"] == [3, 4, 20, 10]


def test_version_1_has_regions_by_number(tmp_path):
    content = via_entries({"a.png": [("cat", RECT)]})
    (entry,) = content.values()
    entry["regions"] = {"0": entry["regions"][0]}
    report, usable = check(tmp_path, [], content=content)
    expect(report, {})
    assert len(usable["annotations"]) == 1
    report, usable = check(tmp_path, [], content=[entry])
    assert len(usable["annotations"]) == 1


POLYGON = {"name": "polygon", "all_points_x": [1, 5], "all_points_y": [1, 5]}
# name: (class, shape, findings, words)
REGIONS = {
    "point": ("cat", {"name": "point", "cx": 1, "cy": 2}, {"shape-without-area": 1, "no-boxes": 1}, "name = point"),
    "open line": ("cat", {**POLYGON, "name": "polyline"}, {"shape-without-area": 1, "no-boxes": 1}, "polyline"),
    "unknown shape": (
        "cat",
        {"name": "star"},
        {"object-malformed": 1, "no-boxes": 1},
        "'star' is none of VIA's shapes",
    ),
    "lacks a side": ("cat", {"name": "rect", "x": 1}, {"object-malformed": 1, "no-boxes": 1}, "rect without 'y'"),
    "two points": ("cat", POLYGON, {"object-malformed": 1, "no-boxes": 1}, "needs three points"),
    "uneven points": ("cat", {**POLYGON, "all_points_x": [1]}, {"object-malformed": 1, "no-boxes": 1}, "one length"),
    "negative radius": (
        "cat",
        {"name": "circle", "cx": 9, "cy": 9, "r": -1},
        {"object-malformed": 1, "no-boxes": 1},
        "",
    ),
    "NaN": ("cat", {**RECT, "x": math.nan}, {"box-not-finite": 1, "no-boxes": 1}, "a.png: region 0"),
    "NaN in a circle": (
        "cat",
        {"name": "circle", "cx": math.nan, "cy": 9, "r": 2},
        {"box-not-finite": 1, "no-boxes": 1},
        "",
    ),
    "reversed": ("cat", {**RECT, "width": -5}, {"box-negative": 1, "no-boxes": 1, "class-without-boxes": 1}, ""),
    "outside": ("cat", {**RECT, "x": 99}, {"box-outside": 1, "no-boxes": 1, "class-without-boxes": 1}, "in 64x48"),
    "no class": ("", RECT, {"object-malformed": 1, "no-boxes": 1}, "an object without a class"),
    "a number": (3, RECT, {"category-name-type": 1}, "class = 3"),
}


@pytest.mark.parametrize("case", REGIONS)
def test_regions_that_are_wrong(tmp_path, case):
    label, shape, counts, words = REGIONS[case]
    report, _ = check(tmp_path, [(label, shape)])
    expect(report, counts, words)


GOOD = json.dumps(via_entries({"a.png": [("cat", RECT)]})).encode()
FILES = {
    "truncated": (GOOD[:-20], {"file-unreadable": 1}, "not JSON"),
    "empty": (b"", {"file-unreadable": 1}, "it is empty"),
    "BOM": (b"\xef\xbb\xbf" + GOOD, {"file-bom": 1}, ""),
    "UTF-16": (GOOD.decode().encode("utf-16"), {"file-encoding": 1}, ""),
    "text": (b"filename,class\na.png,cat\n", {"file-unreadable": 1}, "region_shape_attributes"),
    "no JSON in a CSV": (
        b"filename,region_shape_attributes,region_attributes\na.png,{x},{}\n",
        {"file-unreadable": 1},
        "not JSON or CSV of VIA",
    ),
    "version 3": (b'{"project": {}, "metadata": {}, "view": {}, "file": {}}', {"file-format": 1}, "VIA 3: export"),
    "COCO": (b'{"images": [], "annotations": [], "categories": []}', {"file-format": 1}, "not of VIA 2"),
    "an entry that is none": (
        b'{"_via_img_metadata": {"x": 3, "a": {"filename": "a.png", "regions": 5}}}',
        {"record-malformed": 2, "no-boxes": 1},
        "regions = 5",
    ),
    "a region that is none": (
        b'{"a": {"filename": "a.png", "regions": [3]}}',
        {"record-malformed": 1, "no-boxes": 1},
        "a.png: region 0",
    ),
    "an address": (
        GOOD.replace(b'"filename": "a.png"', b'"filename": "http://x.org/p/a.png"'),
        {"image-elsewhere": 1},
        "",
    ),
    "a missing image": (GOOD.replace(b'"filename": "a.png"', b'"filename": "c.png"'), {"image-missing": 1}, "c.png"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_wrong(tmp_path, case):
    content, counts, words = FILES[case]
    report, usable = check(tmp_path, [], content=content)
    found = {k: v for k, v in report.counts.items() if k in counts}
    assert found == counts, report.text()
    bad = report.refused(strict=False) and "image-missing" not in counts
    assert len(usable["annotations"]) == (0 if bad else 1)
    assert words in report.text()
