import base64
import io
import json
import math

import numpy as np
import pytest
from data_forms import check_entry, expect, labelme, write_images
from PIL import Image
from pycocotools import mask as coco_mask

BOX = ("cat", "rectangle", [[3, 4], [23, 14]])


def check(folder, shapes=(BOX,), name="a.png", size=(64, 48), entry=None, **fields):
    """The six images, and a JSON of the first one."""
    write_images(folder)
    (folder / "a.json").write_text(labelme(name, size, shapes, **fields))
    return check_entry({"format": "labelme", "images": str(folder), **(entry or {})})


def test_shapes_become_boxes_and_outlines(tmp_path):
    triangle = [[10, 10], [30, 10], [20, 40]]
    shapes = [
        ("cat", "rectangle", [[23, 14], [3, 4]]),
        ("dog", "polygon", triangle),
        ("dog", "circle", [[30, 20], [33, 24]]),
        ("dog", "rotation", [[20, 10], [30, 20], [20, 30], [10, 20]]),
        ("cat", "rectangle", [[3, 4], [23, 4], [23, 14], [3, 14]]),
    ]
    report, usable = check(tmp_path, shapes)
    # A box in whole, given from two corners or four, is the same one.
    expect(report, {"box-from-polygon": 3, "box-twice": 1})
    boxes = [a["bbox"] for a in usable["annotations"]]
    assert boxes == [[3, 4, 20, 10], [10, 10, 20, 30], [25, 15, 10, 10], [10, 10, 20, 20], [3, 4, 20, 10]]
    outlines = [a.get("segmentation") for a in usable["annotations"]]
    assert outlines[0] is None and outlines[1] == [[10, 10, 30, 10, 20, 40]] and outlines[4] is None
    rim = np.array(outlines[2][0]).reshape(-1, 2)
    np.testing.assert_allclose(np.hypot(*(rim - (30, 20)).T), 5)
    assert [c["name"] for c in usable["categories"]] == ["cat", "dog"]


def test_a_mask_is_rle_of_its_pixels(tmp_path):
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[2:8, 5:15] = 255
    data = io.BytesIO()
    Image.fromarray(mask).save(data, format="PNG")
    text = base64.b64encode(data.getvalue()).decode()
    report, usable = check(tmp_path, [("cat", "mask", [[30, 20], [49, 29]], {"mask": text})])
    expect(report, {"box-from-polygon": 1})
    (found,) = usable["annotations"]
    assert found["bbox"] == [35, 22, 10, 6]
    expected = np.zeros((48, 64), dtype=np.uint8)
    expected[22:28, 35:45] = 1
    np.testing.assert_array_equal(coco_mask.decode(found["segmentation"]), expected)


def test_parts_of_one_group_are_one_object(tmp_path):
    parts = [[[1, 1], [5, 1], [5, 5]], [[20, 20], [30, 20], [30, 40]]]
    shapes = [
        ("cat", "polygon", parts[0], {"group_id": 1}),
        ("dog", "polygon", parts[0], {"group_id": 1}),
        ("cat", "polygon", parts[1], {"group_id": 1}),
        ("cat", "polygon", parts[1], {"group_id": 2}),
    ]
    report, usable = check(tmp_path, shapes)
    expect(report, {"parts-joined": 1, "box-from-polygon": 3})
    cat, dog, other = usable["annotations"]
    assert cat["bbox"] == [1, 1, 29, 39] and len(cat["segmentation"]) == 2
    assert dog["bbox"] == [1, 1, 4, 4] and other["bbox"] == [20, 20, 10, 20]


def test_rectangles_of_one_group_are_one_object_too(tmp_path):
    shapes = [
        ("cat", "rectangle", [[10, 10], [30, 20]], {"group_id": 1}),
        ("cat", "rectangle", [[40, 10], [60, 30]], {"group_id": 1}),
        ("cat", "polygon", [[1, 1], [5, 1], [5, 5]], {"group_id": 2}),
        ("cat", "rectangle", [[2, 30], [8, 40]], {"group_id": 2}),
    ]
    report, usable = check(tmp_path, shapes)
    expect(report, {"parts-joined": 2, "box-from-polygon": 1})
    boxes, mixed = usable["annotations"]
    assert boxes["bbox"] == [10, 10, 50, 20] and boxes.get("segmentation") is None
    assert mixed["bbox"] == [1, 1, 7, 39]
    assert mixed["segmentation"] == [[1, 1, 5, 1, 5, 5], [2, 30, 8, 30, 8, 40, 2, 40]]


def test_difficult_and_order_of_classes(tmp_path):
    shapes = [
        ("cat", *BOX[1:], {"difficult": True}),
        ("dog", "rectangle", [[1, 1], [9, 9]], {"flags": {"difficult": True}}),
    ]
    report, usable = check(tmp_path, shapes, entry={"classes": ["dog", "cat"]})
    expect(report, {"difficult": 2})
    assert [a["category_id"] for a in usable["annotations"]] == [2, 1]
    report, usable = check(tmp_path, shapes, entry={"difficult_as_crowd": True})
    expect(report, {"ignore-region": 2, "no-boxes": 1})
    assert [a["iscrowd"] for a in usable["annotations"]] == [1, 1]


# name: (shapes or fields, findings, words)
SHAPES = {
    "point": ([("cat", "point", [[1, 1]]), BOX], {"shape-without-area": 1}, "shape_type = point"),
    "line": ([("cat", "linestrip", [[1, 1], [9, 9]]), BOX], {"shape-without-area": 1}, "shape 0"),
    "unknown shape": ([("cat", "cube", [[1, 1]]), BOX], {"object-malformed": 1}, "cube: none of labelme's shapes"),
    "one corner": (
        [("cat", "rectangle", [[1, 1]])],
        {"object-malformed": 1, "no-boxes": 1},
        "needs two corners, got 1",
    ),
    "two points": (
        [("cat", "polygon", [[1, 1], [5, 5]])],
        {"object-malformed": 1, "no-boxes": 1},
        "needs three points",
    ),
    "no points": ([("cat", "polygon", None)], {"object-malformed": 1, "no-boxes": 1}, "points must be a list"),
    "points of three": (
        [("cat", "polygon", [[1, 2, 3]])],
        {"object-malformed": 1, "no-boxes": 1},
        "must be two numbers",
    ),
    "words": ([("cat", "rectangle", [["a", 1], [2, 3]])], {"object-malformed": 1, "no-boxes": 1}, "'a' is no number"),
    "NaN": ([("cat", "rectangle", [[math.nan, 1], [2, 3]])], {"box-not-finite": 1, "no-boxes": 1}, "shape 0"),
    "a damaged mask": (
        [("cat", "mask", [[1, 1], [2, 2]], {"mask": "AAAA"})],
        {"object-malformed": 1, "no-boxes": 1},
        "mask",
    ),
    "no label": ([(None, *BOX[1:]), BOX], {"object-malformed": 1}, "an object without a class"),
    "a number as label": ([(7, *BOX[1:])], {"category-name-type": 1}, "class = 7"),
    "no area": (
        [("cat", "rectangle", [[5, 5], [5, 9]])],
        {"box-empty": 1, "no-boxes": 1, "class-without-boxes": 1},
        "",
    ),
    "outside": (
        [("cat", "rectangle", [[70, 5], [80, 9]])],
        {"box-outside": 1, "no-boxes": 1, "class-without-boxes": 1},
        "64x48",
    ),
    "reaches outside": ([("cat", "rectangle", [[60, 5], [80, 9]])], {"box-clipped": 1}, ""),
    "twice": ([BOX, BOX], {"box-twice": 1}, ""),
    "not an object": (["cat"], {"record-malformed": 1, "no-boxes": 1}, "shape 0"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_are_wrong(tmp_path, case):
    shapes, counts, words = SHAPES[case]
    report, _ = check(tmp_path, shapes)
    expect(report, counts, words)


NAMES = {
    "backslashes": ("..\\%s\\a.png", {"image-path": 1}),
    "of another machine": ("C:\\Users\\x\\photos\\a.png", {"image-path": 1}),
    "a stale name": ("IMG_0001.png", {"image-path": 1}),
    "absolute elsewhere": ("/data/photos/a.png", {"image-path": 1}),
    "no name": (None, {"image-path": 1}),
}


@pytest.mark.parametrize("case", NAMES)
def test_image_names_that_went_stale(tmp_path, case):
    name, counts = NAMES[case]
    report, usable = check(tmp_path, name=name and name.replace("%s", tmp_path.name))
    expect(report, counts)
    assert [image["file_name"] for image in usable["images"]] == ["a.png"]


def test_json_files_in_a_folder_of_their_own(tmp_path):
    images = write_images(tmp_path / "images")
    (tmp_path / "json").mkdir()
    texts = {
        "a.json": labelme("../images/a.png", (64, 48), [BOX]),
        "b c.json": labelme("b c.png", (64, 48), [BOX]),
        "other.json": labelme("elsewhere/d.png", (64, 48), [BOX]),
        "._a.json": "\0",
        "notes.json": '{"version": 1}',
    }
    for name, text in texts.items():
        (tmp_path / "json" / name).write_text(text)
    report, usable = check_entry({"format": "labelme", "images": str(images), "annotations": str(tmp_path / "json")})
    expect(report, {"image-elsewhere": 1, "file-junk": 1, "file-ignored": 1}, "elsewhere/d.png")
    assert [image["file_name"] for image in usable["images"]] == ["a.png", "b c.png", "sub/d.png"]


def test_nothing_outside_the_root_is_read(tmp_path):
    write_images(tmp_path / "outside")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.json").write_text(labelme("../outside/a.png", (64, 48), [BOX]))
    report, usable = check_entry({"format": "labelme", "images": str(tmp_path / "in")})
    assert report.counts["image-outside"] == 1 and not usable["images"]


def test_image_missing_and_sizes(tmp_path):
    report, _ = check(tmp_path, name="none.png", shapes=[BOX])
    expect(report, {"image-path": 1})
    (tmp_path / "a.json").rename(tmp_path / "z.json")
    report, usable = check_entry({"format": "labelme", "images": str(tmp_path)})
    assert report.counts["image-missing"] == 1 and not usable["images"]
    report, _ = check(tmp_path / "b", size=(640, 480))
    expect(report, {"image-size": 1}, "640x480 stated, 64x48 read")
    report, _ = check(tmp_path / "c", size=(None, None))
    expect(report, {"image-size-absent": 1})
    turned = labelme("turned.jpg", (64, 48), [BOX])
    (write_images(tmp_path / "d") / "turned.json").write_text(turned)
    report, _ = check_entry({"format": "labelme", "images": str(tmp_path / "d")})
    assert report.counts["image-size-exif"] == 1


FILES = {
    "truncated": (lambda text: text[:-30].encode(), {"file-unreadable": 1}, "not JSON"),
    "empty": (lambda text: b"", {"file-unreadable": 1}, "it is empty"),
    "BOM": (lambda text: b"\xef\xbb\xbf" + text.encode(), {"file-bom": 1}, ""),
    "UTF-16": (lambda text: text.encode("utf-16"), {"file-encoding": 1}, "utf-16-le"),
    "UTF-16 without a mark": (lambda text: text.encode("utf-16-le"), {"file-unreadable": 1}, "UTF-16"),
    "Latin-1": (lambda text: text.replace("cat", "kätzchen").encode("latin-1"), {"file-unreadable": 1}, "UTF-8"),
    "null": (lambda text: b"null", {"file-format": 1}, ""),
    "no shapes": (lambda text: b'{"imagePath": "a.png"}', {"file-format": 1}, "shapes"),
    "nested": (lambda text: b"[" * 100_000, {"file-unreadable": 1}, ""),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_wrong(tmp_path, case):
    change, counts, words = FILES[case]
    write_images(tmp_path)
    text = json.dumps(json.loads(labelme("a.png", (64, 48), [BOX])), ensure_ascii=False)
    (tmp_path / "a.json").write_bytes(change(text))
    report, usable = check_entry({"format": "labelme", "images": str(tmp_path)})
    expect(report, counts, words)
    assert len(usable["annotations"]) == (0 if report.refused(strict=False) else 1)
    assert str(tmp_path / "a.json") in report.text()


def test_a_folder_without_json(tmp_path):
    report, _ = check_entry({"format": "labelme", "images": str(write_images(tmp_path))})
    expect(report, {"file-format": 1}, "no labelme JSON in it")
