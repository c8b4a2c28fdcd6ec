"""The check of segmentations: what is found where masks are trained, and what is then used."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import make_cfg
from PIL import Image
from pycocotools import mask as coco_mask
from two_stage import MASK, rcnn_cfg

from aqdet.data.check.cache import check_declaration, checked
from aqdet.data.check.findings import KINDS, Report
from aqdet.data.check.segmentations import check_segmentation, crosses_itself, run_lengths
from aqdet.data.declaration import Declaration
from aqdet.data.mask_check import reads_masks

SIZE, BOX = (40, 30), [10.0, 5, 20, 16]
SQUARE = [10, 5, 30, 5, 30, 21, 10, 21]
WHOLE_BOX = [[10.0, 5, 30, 5, 30, 21, 10, 21]]


def rle(mask, as_text=True):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if as_text:
        return {"size": list(found["size"]), "counts": found["counts"].decode()}
    flat = np.concatenate([[0], mask.T.reshape(-1), [2]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes])).tolist()
    return {"size": list(mask.shape), "counts": [*counts, len(flat) - 2 - sum(counts)]}


def of_box(x, y, width, height, size=SIZE):
    mask = np.zeros(size[::-1], dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


INSIDE = rle(of_box(10, 5, 20, 16))
VARIANTS = {
    "a polygon": ([SQUARE], {}),
    "a mask": (INSIDE, {}),
    "a mask as a list": (rle(of_box(10, 5, 20, 16), as_text=False), {}),
    "two polygons": ([[10, 5, 30, 5, 10, 13], [10, 13, 30, 13, 30, 21]], {}),
    "a corner given twice": ([[10, 5, 10, 5, 30, 5, 30, 21, 10, 21, 10, 5]], {}),
    "a pixel outside its image": ([[10, 5, 30, 5, 30, 21, 10, 21], [10, 5, 12, -1, 14, 5]], {"segmentation-box": 1}),
    "numbers as text": ([["10", 5, 30, 5, 30, 21]], {"segmentation-malformed": 1}),
    "an odd count of numbers": ([[10, 5, 30, 5, 30, 21, 3]], {"segmentation-malformed": 1}),
    "a number that is none": ([[10, 5, 30, 5, 30, float("nan")]], {"segmentation-malformed": 1}),
    "RLE without a size": ({"counts": "x"}, {"segmentation-malformed": 1}),
    "a polygon of two points": ([[10, 5, 30, 21]], {"segmentation-empty": 1}),
    "two points beside a polygon": ([SQUARE, [10, 5, 30, 21]], {"polygon-empty": 1}),
    "all points on a line": ([[10, 5, 20, 5, 30, 5]], {"segmentation-empty": 1}),
    "all points on a slanted line": ([[10, 5, 20, 13, 30, 21, 15, 9]], {"segmentation-empty": 1}),
    "a line beside a polygon": ([SQUARE, [10, 5, 20, 5, 30, 5]], {"polygon-empty": 1}),
    "a mask without a pixel": (rle(of_box(0, 0, 0, 0)), {"segmentation-empty": 1}),
    "a polygon outside": ([[50, 5, 60, 5, 60, 21]], {"segmentation-outside": 1}),
    "a polygon that reaches outside": ([[10, 5, 60, 5, 60, 21, 10, 21]], {"segmentation-clipped": 1}),
    "one of two outside": ([SQUARE, [50, 5, 60, 5, 60, 21]], {"segmentation-clipped": 1}),
    "run lengths that do not decode": ({**INSIDE, "counts": INSIDE["counts"] + "~"}, {"rle-malformed": 1}),
    "run lengths that end too early": ({**INSIDE, "counts": INSIDE["counts"][:-2]}, {"rle-malformed": 1}),
    "run lengths of words": ({**INSIDE, "counts": ["a", "b"]}, {"rle-malformed": 1}),
    "a negative run length": ({**INSIDE, "counts": [1201, -1]}, {"rle-malformed": 1}),
    "no run lengths": ({**INSIDE, "counts": ""}, {"rle-malformed": 1}),
    "RLE of another size": (rle(of_box(10, 5, 20, 16, (41, 30))), {"rle-size": 1}),
    "RLE of a turned image": ({"size": [40, 30], "counts": [0, 1200]}, {"rle-size": 1}),
    "a polygon that crosses itself": ([[10, 5, 30, 21, 30, 5, 10, 21]], {"polygon-crossing": 1}),
    "a mask of half the object": (rle(of_box(10, 5, 20, 8)), {"segmentation-box": 1}),
    "a polygon beside the object": ([[2, 5, 9, 5, 9, 21]], {"segmentation-box": 1}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    value, expected = VARIANTS[name]
    box = [10.0, 5, 30, 16] if name == "a polygon that reaches outside" else BOX
    report = Report("mine")
    usable = check_segmentation(report, ("a.json", "annotation 1"), value, box, SIZE)
    assert dict(report.counts) == expected, report.text()
    assert all("\n" not in str(finding) and "segmentation" in str(finding) for finding in report.findings)
    shows_nothing = {"malformed", "empty", "outside", "size"} & {k.rpartition("-")[2] for k in expected}
    assert (usable is None) == (bool(shows_nothing) and set(expected) != {"polygon-empty"})
    if not expected or {KINDS[kind].severity for kind in expected} == {"warning"}:
        assert usable == value
    if usable is not None:  # pycocotools reads it, and it lies in the image
        is_text = isinstance(usable, dict) and isinstance(usable["counts"], str)
        read = usable if is_text else coco_mask.frPyObjects(usable, *SIZE[::-1])
        assert np.sum(coco_mask.area(read)) > 0
    if "segmentation-clipped" in expected:
        corners = np.reshape(np.concatenate(usable), (-1, 2))
        assert corners.min() >= 0 and (corners <= SIZE).all()


def test_every_kind_is_tried_and_changes_what_it_says():
    of_masks = {kind for kind in KINDS if KINDS[kind].meaning.startswith("masks:")}
    assert of_masks | {"segmentation-malformed"} == {kind for _, expected in VARIANTS.values() for kind in expected}
    assert {KINDS[kind].severity for kind in of_masks} == {"repaired", "warning"}


def test_run_lengths_and_their_box_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(40):
        width, height = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        encoded = rle(mask)
        counts = run_lengths(encoded["counts"])
        flat = np.repeat(np.arange(len(counts)) % 2, counts)
        np.testing.assert_array_equal(flat.reshape(width, height).T, mask)
        report = Report("mine")
        box = coco_mask.toBbox(encoded).tolist()
        usable = check_segmentation(report, ("a", "b"), encoded, box, (int(width), int(height)))
        if mask.any():
            assert usable is encoded and not report.counts
            shifted = [box[0] + 2.5 + 0.11 * box[2], *box[1:]]
            check_segmentation(report, ("a", "b"), encoded, shifted, None)
            assert report.counts == {"segmentation-box": 1}
        else:
            assert usable is None and report.counts == {"segmentation-empty": 1}


def crosses_slowly(polygon):
    """Every pair of sides, solved for the point where their lines meet."""
    points = [complex(x, y) for x, y in zip(polygon[0::2], polygon[1::2], strict=True)]
    sides = list(zip(points, points[1:] + points[:1], strict=True))
    for a, b in sides:
        for c, d in sides:
            matrix = np.array([[(b - a).real, (c - d).real], [(b - a).imag, (c - d).imag]])
            if abs(np.linalg.det(matrix)) < 1e-12:
                continue
            s, t = np.linalg.solve(matrix, [(c - a).real, (c - a).imag])
            if 1e-9 < s < 1 - 1e-9 and 1e-9 < t < 1 - 1e-9:
                return True
    return False


def test_polygons_that_cross_themselves_are_those_of_a_slow_search(monkeypatch):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(150):
        angles = np.sort(rng.random(rng.integers(3, 9))) * 2 * np.pi
        if rng.random() < 0.5:
            rng.shuffle(angles)
        polygon = np.round(np.stack([np.cos(angles), np.sin(angles)], 1) * 50).reshape(-1).tolist()
        found.append(crosses_itself(polygon))
        assert found[-1] == crosses_slowly(polygon)
        monkeypatch.setattr("aqdet.data.check.segmentations._PAIRS", 10)
        assert crosses_itself(polygon) == found[-1]
        monkeypatch.undo()
    assert 20 < sum(found) < 130


def test_a_clipped_polygon_covers_what_the_whole_one_does_in_the_image():
    rng = np.random.default_rng(1)
    for _ in range(30):
        angles = np.sort(rng.random(12)) * 2 * np.pi
        radii = rng.uniform(5, 40, 12)
        polygon = (np.stack([20 + np.cos(angles) * radii, 15 + np.sin(angles) * radii], 1)).reshape(-1).tolist()
        usable = check_segmentation(Report("mine"), ("a", "b"), [polygon], [0.0, 0, 40, 30], SIZE)
        # Drawn with a frame of 100 pixels, of which the image is the middle.
        whole = coco_mask.decode(coco_mask.frPyObjects([[v + 100 for v in polygon]], 230, 240))[100:130, 100:140, 0]
        clipped = coco_mask.decode(coco_mask.frPyObjects([[v + 100 for v in usable[0]]], 230, 240))[100:130, 100:140, 0]
        assert np.mean(whole != clipped) < 0.02


@pytest.fixture
def declared(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(tmp_path / "images/0.png")

    def write(*segmentations):
        annotations = [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 320, "iscrowd": 0, "segmentation": s}
            for i, s in enumerate(segmentations)
        ]
        content = {
            "images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 30}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        return Declaration("mine", "coco", str(tmp_path / "a.json"), str(tmp_path / "images"))

    return write


def test_an_object_without_a_usable_segmentation_is_a_crowd_region_of_its_box_where_masks_are_read(declared):
    declaration = declared([SQUARE], [[50, 5, 60, 5, 60, 21]], {**INSIDE, "counts": "~"})
    report, usable, _ = check_declaration(declaration, pixels=False, masks=True)
    good, *others = usable["annotations"]
    assert good["iscrowd"] == 0 and good["segmentation"] == [SQUARE]
    assert [(a["iscrowd"], a["segmentation"], a["bbox"]) for a in others] == [(1, WHOLE_BOX, BOX)] * 2
    assert report.facts["boxes"] == 1 and report.facts["crowd regions"] == 2
    assert report.refused(strict=False) == 0 and report.refused(strict=True) == 2 + report.counts["box-twice"]
    report, usable, _ = check_declaration(declaration, pixels=False)
    assert not {"segmentation-outside", "rle-malformed"} & set(report.counts)
    assert [a["iscrowd"] for a in usable["annotations"]] == [0, 0, 0]


def test_a_crowd_region_without_a_segmentation_has_its_box_where_masks_are_read(declared):
    """Otherwise the masks of the whole dataset could not be evaluated."""
    declaration = declared([SQUARE], None)
    with open(declaration.file) as file:
        content = json.load(file)
    content["annotations"][1]["iscrowd"] = 1
    with open(declaration.file, "w") as file:
        json.dump(content, file)
    _, usable, _ = check_declaration(declaration, pixels=False, masks=True)
    assert [(a["iscrowd"], a["segmentation"]) for a in usable["annotations"]] == [(0, [SQUARE]), (1, WHOLE_BOX)]
    _, usable, _ = check_declaration(declaration, pixels=False)
    assert "segmentation" not in usable["annotations"][1]


def test_the_two_readings_of_one_file_are_kept_apart(declared, tmp_path):
    from aqdet.data.cache_folder import set_cache_dir

    set_cache_dir(str(tmp_path / "cache"))
    try:
        declaration = declared([SQUARE], [[50, 5, 60, 5, 60, 21]])
        for masks, kinds in (
            (False, {"box-twice"}),
            (True, {"box-twice", "segmentation-outside"}),
            (False, {"box-twice"}),
        ):
            for _ in range(2):
                report, json_file = checked(declaration, pixels=False, masks=masks)
                assert set(report.counts) == kinds
                annotations = json.loads(Path(json_file).read_text())["annotations"]
                assert [a["iscrowd"] for a in annotations] == [0, int(masks)]
    finally:
        set_cache_dir("")


def test_masks_are_read_by_two_stage_detectors_with_a_mask_head():
    assert reads_masks(rcnn_cfg(*MASK)) and not reads_masks(rcnn_cfg()) and not reads_masks(make_cfg(*MASK))
