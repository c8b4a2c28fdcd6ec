import json
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image

from aqdet.data import convert_voc

BCCD = ROOT.parent / "shared" / "data" / "BCCD"


def voc(root, objects, size=(40, 30), declared=None):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    Image.new("RGB", size).save(root / "JPEGImages/a.jpg")
    width, height = declared or size
    items = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for n, (a, b, c, d) in objects
    )
    text = f"<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>"
    (root / "Annotations/a.xml").write_text(text)
    return root


def test_boxes_and_policy(tmp_path):
    objects = [
        ("dog", (1, 1, 10, 5)),
        ("cat", (31, 21, 45, 30)),
        ("cat", (5, 5, 5, 5)),
        ("dog", (9, 9, 4, 12)),
        ("dog", (50, 1, 60, 5)),
    ]
    report = convert_voc(voc(tmp_path, objects, declared=(80, 60)), "train", tmp_path / "o.json")
    content = json.loads((tmp_path / "o.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 10, 5], [30, 20, 10, 10], [4, 4, 1, 1]]
    assert content["images"][0]["width"] == 40
    assert report.boxes_per_class == {"cat": 2, "dog": 1}
    assert report.notes == {
        "image size in XML differs, file's used": ["a"],
        "boxes outside the image, clipped": ["a#1"],
        "boxes without area, dropped": ["a#3", "a#4"],
    }
    assert "boxes without area, dropped: 2 (a#3, a#4)" in str(report)


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path):
    root = voc(tmp_path / "v", [("dog", (1, 1, 10, 5))])
    out = tmp_path / "o.json"

    def check(words, **kwargs):
        with pytest.raises(ValueError, match=words) as error:
            convert_voc(root, kwargs.pop("split", "train"), out, **kwargs)
        assert "\n" not in str(error.value) and not out.exists()

    check("no split file .*splits there: train", split="val")
    check("classes dog are in the data but not in --classes", classes=["cat"])
    xml = root / "Annotations/a.xml"
    good = xml.read_text()
    xml.write_text('<!DOCTYPE x [<!ENTITY e "">]>' + good)
    check("a.xml: has a DOCTYPE or entity")
    xml.write_text(good[:-5])
    check("a.xml: not valid XML")
    xml.write_text(good.replace("<xmin>1</xmin>", "<xmin>?</xmin>"))
    check("bndbox needs numbers")
    (root / "JPEGImages/a.jpg").unlink()
    check("1 files are missing: .*a.jpg")


def test_command_line(tmp_path):
    voc(tmp_path / "v", [("dog", (1, 1, 10, 5))])
    command = [sys.executable, str(ROOT / "tools/convert_voc.py"), "--voc-root", str(tmp_path / "v")]
    command += ["--output", str(tmp_path / "o.json"), "--split"]
    good = subprocess.run([*command, "train"], capture_output=True, text=True)
    assert good.returncode == 0 and "1 images, 1 boxes" in good.stdout
    bad = subprocess.run([*command, "test"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.splitlines()[-1].startswith("error: no split file")


@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not beside the repository")
def test_bccd(tmp_path):
    counts = [convert_voc(BCCD, s, tmp_path / f"{s}.json").num_images for s in ("train", "val", "test")]
    assert counts == [205, 87, 72]
