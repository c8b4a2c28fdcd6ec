"""Splits by share and seed: for every format, and whatever files come or go."""

import json

import numpy as np
import pytest
from data_forms import FORMS, write_form
from detectron2.data import DatasetCatalog
from helpers import CLASSIFIER, make_cfg
from PIL import Image
from tiny_data import write_dataset, write_image_folder, write_yolo

from aqdet.data import register_declared
from aqdet.data.check.cache import check_declaration
from aqdet.data.declared import parse_declared
from aqdet.data.share import Share

NAMES = [f"{index}.png" for index in range(10000)]


def taken(value, names=NAMES, seed=0):
    share = Share.parse(value, seed)
    return {name for name in names if share.takes(name)}


def test_parts_cover_everything_once():
    parts = [taken(0.7), taken([0.7, 0.9]), taken(-0.1)]
    assert set.union(*parts) == set(NAMES) and sum(map(len, parts)) == len(NAMES)
    assert [len(part) for part in parts] == pytest.approx([7000, 2000, 1000], abs=150)
    for share in np.linspace(0.01, 0.99, 99).round(2):
        assert not taken(float(share), NAMES[:100]) & taken(-round(1 - float(share), 2), NAMES[:100])


def test_a_name_stays_in_its_part_and_a_seed_is_a_draw():
    assert taken(0.8, NAMES[:100]) == taken(0.8) & set(NAMES[:100])
    assert taken(0.8, NAMES[:100]) <= taken(0.9, NAMES[:100])
    assert 0.5 < len(taken(0.8, seed=1) & taken(0.8)) / len(NAMES) < 0.7  # 0.64 if independent
    # The draw itself, which a new release must not change.
    assert sorted(taken(0.5, NAMES[:8])) == ["3.png", "4.png", "6.png", "7.png"]
    assert Share.parse(0.5).takes("a\\ü.png") == Share.parse(0.5).takes("a/u\u0308.png")


@pytest.mark.parametrize("value", [0, 1, 1.5, -1, "0.8", None, [0, 1], [0.5], [0.9, 0.7], float("nan"), True])
def test_what_is_no_share(value):
    with pytest.raises(ValueError, match="must be a share as 0.8, -0.2"):
        Share.parse(value)


def check(entry):
    (declaration,) = parse_declared([entry]).values()
    report, usable, _ = check_declaration(declaration, pixels=False)
    return report, usable


def entries(tmp_path):
    coco = write_dataset(tmp_path / "coco", "coco", num_images=40)
    write_yolo(tmp_path / "yolo", labels=["0 0.5 0.5 0.25 0.5"] * 40)
    voc = tmp_path / "voc"
    voc.mkdir()
    size = "<size><width>8</width><height>8</height></size>"
    for index in range(40):
        Image.new("RGB", (8, 8)).save(voc / f"{index}.png")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5</ymax></bndbox>"
        (voc / f"{index}.xml").write_text(f"<annotation>{size}<object><name>a</name>{box}</object></annotation>")
    yield coco
    yield {"name": "yolo", "format": "yolo", "yaml": str(tmp_path / "yolo/data.yaml")}
    yield {"name": "yolo", "format": "yolo", "yaml": str(tmp_path / "yolo/data.yaml"), "split": "train"}
    yield {"name": "voc", "format": "voc", "root": str(voc)}


@pytest.mark.parametrize("index, form", enumerate(["coco", "yolo", "yolo, of a named split", "voc"]))
def test_every_format_is_split(tmp_path, index, form):
    entry = list(entries(tmp_path))[index]
    whole, usable = check(entry)
    field = "share" if "named" in form else "split"
    parts = [check({**entry, field: share, "seed": 3}) for share in (0.7, -0.3)]
    names = [{image["file_name"] for image in part["images"]} for _, part in parts]
    assert names[0] | names[1] == {image["file_name"] for image in usable["images"]} and not names[0] & names[1]
    assert sum(report.facts["boxes"] for report, _ in parts) == whole.facts["boxes"]
    assert [part["categories"] for _, part in parts] == [usable["categories"]] * 2
    for report, part in parts:
        assert 5 < len(part["images"]) < 35
        assert report.number("error", "repaired", "dropped") == 0, report.text()
        assert names[0] == {n for n in names[0] | names[1] if Share.parse(0.7, 3).takes(n)}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_labelling_tools_are_split(tmp_path, form):
    entry = write_form(tmp_path / "d", form)
    whole, usable = check(entry)
    field = "share" if "split" in entry else "split"
    parts = [check({**entry, field: share, "seed": 3}) for share in (0.5, -0.5)]
    names = [{image["file_name"] for image in part["images"]} for _, part in parts]
    assert names[0] | names[1] == {image["file_name"] for image in usable["images"]}
    assert not names[0] & names[1] and all(names)
    assert sum(report.facts["boxes"] for report, _ in parts) == whole.facts["boxes"]
    assert [part["categories"] for _, part in parts] == [usable["categories"]] * 2


def test_findings_are_those_of_the_part(tmp_path):
    entry = list(entries(tmp_path))[3]
    for index in range(40):
        (tmp_path / f"voc/{index}.xml").write_text("<annotation>")
    reports = [check({**entry, "split": share})[0] for share in (0.5, -0.5)]
    assert reports[0].counts["file-unreadable"] + reports[1].counts["file-unreadable"] == 40
    assert all(0 < report.counts["file-unreadable"] < 40 and report.facts["images"] == 0 for report in reports)


def test_yolo_labels_of_the_other_part_are_not_reported(tmp_path):
    write_yolo(tmp_path, labels=["0 0.5 0.5"] * 40)
    entry = {"name": "yolo", "format": "yolo", "yaml": str(tmp_path / "data.yaml")}
    reports = [check({**entry, "split": share})[0] for share in (0.5, -0.5)]
    assert reports[0].counts["label-line"] + reports[1].counts["label-line"] == 40
    assert all(report.counts["label-line"] == report.facts["images"] for report in reports)


def test_names_of_a_labelling_server_are_split_as_their_files(tmp_path):
    entry = write_dataset(tmp_path, "coco", num_images=40)
    expected = check({**entry, "split": 0.5})[1]["images"]
    content = json.loads((tmp_path / "coco.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"/data/local-files/?d=images/{image['file_name']}"
    (tmp_path / "coco.json").write_text(json.dumps(content))
    report, usable = check({**entry, "split": 0.5})
    assert usable["images"] == expected and report.counts["image-elsewhere"] == len(expected)


def test_an_empty_part_is_said(tmp_path):
    entry = write_dataset(tmp_path, "coco", num_images=1)
    counts = [check({**entry, "split": share})[0].counts["no-images"] for share in (0.5, -0.5)]
    assert sorted(counts) == [0, 1]


def test_declared_parts_are_registered_apart(tmp_path):
    entry = write_dataset(tmp_path / "data", "x", num_images=40)
    entries = [{**entry, "name": f"{name}_{tmp_path}", "split": share} for name, share in (("t", 0.75), ("v", -0.25))]
    cfg = make_cfg("DATASETS.DECLARED", str(entries), "DATASETS.TRAIN", str((entries[0]["name"],)))
    cfg.DATASETS.TEST = (entries[1]["name"],)
    register_declared(cfg)
    train, test = ({r["file_name"] for r in DatasetCatalog.get(e["name"])} for e in entries)
    assert len(train | test) == 40 and not train & test


def test_image_folders_are_split(tmp_path):
    entry = write_image_folder(tmp_path / "a", "x", per_class=20)
    cfg = make_cfg(*CLASSIFIER)
    cfg.DATASETS.IMAGE_FOLDERS = [
        {**entry, "name": f"{name}_{tmp_path}", "split": share} for name, share in (("t", 0.5), ("v", -0.5))
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"t_{tmp_path}",), (f"v_{tmp_path}",)
    register_declared(cfg)
    train, test = ({r["file_name"] for r in DatasetCatalog.get(e["name"])} for e in cfg.DATASETS.IMAGE_FOLDERS)
    assert len(train | test) == 60 and not train & test and 15 < len(train) < 45
