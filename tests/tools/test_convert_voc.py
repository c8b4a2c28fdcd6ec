import json
import sys

import convert_voc
import pytest
from PIL import Image


@pytest.fixture
def voc(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages/a.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>5</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    item = f"<object><name>dog</name><difficult>1</difficult>{box}</object>"
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{size}{item}</annotation>")
    return tmp_path


def run(monkeypatch, voc, *options):
    argv = ["convert_voc.py", "--voc-root", str(voc), "--output", str(voc / "out.json"), *options]
    monkeypatch.setattr(sys, "argv", argv)
    convert_voc.main()


def test_writes_and_prints_what_it_did(voc, monkeypatch, capsys):
    run(monkeypatch, voc, "--split", "train", "--classes", "cat, dog", "--difficult-as-crowd")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 images, 1 boxes"
    assert printed[1].split() == ["class", "images", "boxes", "small", "medium", "large"]
    assert printed[4].split() == ["dog", "1", "1", "1", "0", "0"]
    assert printed[5] == "difficult objects, made crowd regions: 1 (a#0)"
    assert printed[6] == f"written to {voc / 'out.json'}"
    content = json.loads((voc / "out.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert content["annotations"][0]["iscrowd"] == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--split", "test"), "error: no split file .*; splits there: train"),
        (("--split", "train", "--classes", "cat"), "error: classes dog are in the data but not in --classes"),
        (("--split", "train", "--classes", ""), "error: class names must be at least one"),
    ],
)
def test_wrong_input_is_one_line(voc, monkeypatch, options, words):
    with pytest.raises(SystemExit, match=words) as error:
        run(monkeypatch, voc, *options)
    assert "\n" not in str(error.value) and not (voc / "out.json").exists()
