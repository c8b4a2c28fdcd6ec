"""Six images in every format are the same dataset."""

import pytest
from data_forms import CLASSES, FORMS, IMAGES, check_entry, write_form

# What is no more than said of each: the two that everyone has, and what a format has besides.
NOTES = {"image-turned": 1, "image-without-boxes": 1}


def records(usable):
    """Image name -> size and objects, in the order of the file."""
    names = {c["id"]: c["name"] for c in usable["categories"]}
    found = {image["file_name"]: ((image["width"], image["height"]), []) for image in usable["images"]}
    files = {image["id"]: image["file_name"] for image in usable["images"]}
    for a in usable["annotations"]:
        assert a["iscrowd"] == 0 and a["area"] == pytest.approx(a["bbox"][2] * a["bbox"][3])
        found[files[a["image_id"]]][1].append((names[a["category_id"]], *a["bbox"]))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_six_images_are_the_same_records_in_every_format(tmp_path, form):
    report, usable = check_entry(write_form(tmp_path / "d", form))
    assert report.counts == NOTES, report.text()
    prefix = {"retinanet": "images/", "yolo": "images/train/", "darknet": "obj/"}.get(form, "")
    found = records(usable)
    assert set(found) == {f"{prefix}{name}" for name in IMAGES}
    for name, (size, objects) in IMAGES.items():
        assert found[f"{prefix}{name}"][0] == size
        boxes = found[f"{prefix}{name}"][1]
        assert [box[0] for box in boxes] == [o[0] for o in objects]
        for box, expected in zip(boxes, objects, strict=True):
            assert box[1:] == pytest.approx(expected[1:], abs=1e-9)
    assert [c["name"] for c in usable["categories"]] == list(CLASSES)
