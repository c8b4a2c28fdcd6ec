"""Checks at the start of a training: once for each state of the files, in the log, and refused where needed."""

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import make_cfg
from PIL import Image
from tiny_data import write_dataset

from aqdet.data import check_datasets, register_declared, registry
from aqdet.data.check import cache as checked


@pytest.fixture
def entry(tmp_path):
    return write_dataset(tmp_path / "data", f"checked_{tmp_path.name}")


def change(entry, function):
    content = json.loads(Path(entry["json"]).read_text())
    function(content)
    Path(entry["json"]).write_text(json.dumps(content))


def cfg_for(tmp_path, *entries, train=0, test=0, **data):
    names = [entry["name"] for entry in entries]
    overrides = ["DATASETS.DECLARED", str(list(entries)), "OUTPUT_DIR", str(tmp_path / "out")]
    overrides += ["DATASETS.TRAIN", str((names[train],)), "DATASETS.TEST", str((names[test],))]
    return make_cfg(*overrides, *(x for key, value in data.items() for x in (f"DATASETS.{key}", str(value))))


@pytest.fixture
def count(monkeypatch):
    """The (name, pixels) of the checks that were not in the cache."""
    done = []
    check = checked.check_declaration

    def counted(declaration, *, pixels, masks):
        done.append(pixels)
        return check(declaration, pixels=pixels, masks=masks)

    monkeypatch.setattr(checked, "check_declaration", counted)
    return done


def test_a_check_is_repeated_only_when_a_file_has_changed(tmp_path, entry, count):
    cfg = cfg_for(tmp_path, entry)
    register_declared(cfg)
    check_datasets(cfg)
    assert count == [False, True]
    register_declared(cfg)
    check_datasets(cfg)
    assert count == [False, True]
    # An image with the same size and other pixels.
    path = tmp_path / "data/0.png"
    Image.new("RGB", (64, 64)).save(path)
    check_datasets(cfg)
    assert count == [False, True, True]
    change(entry, lambda c: c["annotations"].pop())
    register_declared(cfg)
    check_datasets(cfg)
    assert count == [False, True, True, False, True]
    path.rename(tmp_path / "aside.png")
    with pytest.raises(ValueError, match="1 problem; 1 image-missing: .*0.png"):
        check_datasets(cfg)
    (tmp_path / "aside.png").rename(path)
    check_datasets(cfg)


def test_training_and_evaluation_read_the_same_repaired_file(tmp_path, entry, caplog):
    change(entry, lambda c: c["annotations"][0].update(bbox=[-10, 5, 36, 33], category_id="1"))
    change(entry, lambda c: c["annotations"][1].update(bbox=[1, 2, 0, 5]))
    cfg = cfg_for(tmp_path, entry)
    register_declared(cfg)
    assert "3 findings repaired or dropped" in caplog.text
    records = DatasetCatalog.get(entry["name"])
    assert [a["bbox"] for a in records[0]["annotations"]] == [[0, 5, 26, 33]]
    json_file = MetadataCatalog.get(entry["name"]).json_file
    assert json_file != entry["json"] and len(json.loads(Path(json_file).read_text())["annotations"]) == 7
    # Repaired at the source, that is read itself.
    change(entry, lambda c: c["annotations"].__delitem__(slice(0, 2)))
    register_declared(cfg)
    assert MetadataCatalog.get(entry["name"]).json_file == entry["json"]


def test_strict_refuses_repairs_and_warnings(tmp_path, entry):
    change(entry, lambda c: c["annotations"][0].update(bbox=[-10, 5, 36, 33]))
    with pytest.raises(
        ValueError, match=r"1 problem \(DATASETS.STRICT\); 1 box-clipped: .*annotation 1: bbox"
    ) as error:
        register_declared(cfg_for(tmp_path, entry, STRICT=True))
    assert "\n" not in str(error.value)


def test_log_and_report(tmp_path, caplog):
    caplog.set_level("INFO", "aqdet")
    entry = write_dataset(tmp_path / "data", f"logged_{tmp_path.name}", empty=(2,))
    # A test set that holds an image of the training set, under another name.
    other = write_dataset(tmp_path / "other", f"test_{tmp_path.name}", num_images=1)
    os.rename(tmp_path / "other/0.png", tmp_path / "other/x.png")
    change(other, lambda c: c["images"][0].update(file_name="x.png"))
    cfg = cfg_for(tmp_path, entry, other, test=1)
    register_declared(cfg)
    check_datasets(cfg).write(tmp_path / "out")
    assert "4 images, 1 of them without boxes, 6 boxes" in caplog.text
    assert "classes 0: disc (id 1), 1: cross (id 2), 2: ring (id 3)" in caplog.text
    assert "1 images without boxes are not trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS is True)" in caplog.text
    text = (tmp_path / "out/dataset_check.txt").read_text()
    assert "warning  image-in-two-sets: 1" in text and f"{other['name']}: x.png: also = {entry['name']}: 0.png" in text
    written = json.loads((tmp_path / "out/dataset_check.json").read_text())
    assert written["refused"] == 0 and [d["name"] for d in written["datasets"]] == [entry["name"], other["name"]]
    assert written["datasets"][1]["counts"]["image-in-two-sets"] == 1
    cfg.DATASETS.STRICT = True
    with pytest.raises(ValueError, match="image-in-two-sets"):
        check_datasets(cfg)


def test_only_what_is_tested_on_is_checked_for_an_evaluation(tmp_path, entry, count):
    other = write_dataset(tmp_path / "other", f"test_{tmp_path.name}")
    cfg = cfg_for(tmp_path, entry, other, test=1)
    (tmp_path / "data/0.png").write_bytes(b"no image")
    check_datasets(cfg, train=False)
    assert count == [True]
    with pytest.raises(ValueError, match="image-unreadable"):
        check_datasets(cfg)
    cfg.DATASETS.CHECK_IMAGES = False
    check_datasets(cfg)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, entry):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="DATASETS.CACHE_DIR: the check of .* cannot be kept in ") as error:
        register_declared(cfg_for(tmp_path, entry, CACHE_DIR=str(tmp_path / "file")))
    assert "\n" not in str(error.value)


def test_datasets_registered_by_code_are_not_checked(tmp_path, caplog):
    caplog.set_level("INFO", "aqdet")
    check_datasets(make_cfg("DATASETS.TRAIN", "('aqdet_shapes_train',)", "OUTPUT_DIR", str(tmp_path)))
    assert "Dataset aqdet_shapes_train is not of DATASETS.DECLARED or IMAGE_FOLDERS: not checked" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"format": "voc", "root": "D", "split": "train", "classes": "cat"},
            r"classes must be a list of names, none twice",
        ),
        (
            {"format": "voc", "root": "D", "split": "train", "classes": ["a", "a"]},
            "classes must be a list of names, none twice",
        ),
        ({"format": "voc", "root": "D", "split": "train", "difficult_as_crowd": 1}, "must be True or False, got 1"),
        (
            {"format": "voc", "images": "D"},
            "must have the fields name, format, root or name, format, images, annotations, and may have classes",
        ),
        ({"format": "voc", "root": "D", "split": "train"}, "image_root: no folder '.*JPEGImages'"),
        ({"format": "yolo", "yaml": "D", "split": "train"}, r"\[0\].yaml: '.*' is a folder, a file is needed"),
        ({"json": "D", "image_root": "D"}, r"\[0\].json: '.*' is a folder, a file is needed"),
        ({"format": "yolo", "yaml": "none.yaml", "split": "train"}, "yaml: no file"),
        ({"format": "voc", "root": __file__}, r"root: '.*' is a file, a folder is needed"),
        ({"format": "voc", "root": "D", "split": 1.5}, r"split must be a share as 0.8, -0.2 .*, got 1.5"),
        ({"format": "voc", "root": "D", "split": 0.0}, "split must be a share"),
        ({"format": "voc", "root": "D", "split": [0.9, 0.7]}, "split must be a share"),
        ({"format": "voc", "root": "D", "split": True}, "split must be a share"),
        ({"format": "voc", "root": "D", "split": 0.8, "share": 0.5}, "one of split and share must be a share"),
        ({"format": "voc", "root": "D", "split": 0.8, "seed": "a"}, "seed must be an integer, got 'a'"),
        ({"format": "voc", "root": "D", "split": "train", "seed": 1}, "seed: it is that of a share"),
        ({"json": __file__, "image_root": "D", "split": "train"}, "split must be a share as 0.8: coco has no named"),
    ],
)
def test_wrong_declarations_of_folders(tmp_path, fields, words):
    entry = {"name": "mine", **{k: str(tmp_path) if v == "D" else v for k, v in fields.items()}}
    with pytest.raises(ValueError, match=words) as error:
        registry.declarations(make_cfg("DATASETS.DECLARED", str([entry])))
    assert "\n" not in str(error.value) and "DATASETS.DECLARED[0]" in str(error.value)


def test_two_entries_of_one_name(entry, tmp_path):
    other = {**entry, "image_root": str(tmp_path)}
    with pytest.raises(ValueError, match=r"DATASETS.DECLARED\[1\].name: .* is the name of another entry"):
        registry.declarations(make_cfg("DATASETS.DECLARED", str([entry, other])))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_a_machine_checks_first_and_lets_the_others_go(tmp_path, entry, monkeypatch, rank):
    events = []
    monkeypatch.setattr(registry.comm, "get_local_rank", lambda: rank)
    monkeypatch.setattr(registry.comm, "synchronize", lambda: events.append("synchronize"))
    check = registry.checked
    cfg = cfg_for(tmp_path, entry)
    register_declared(cfg)

    def noted(*args, **kwargs):
        events.append("check")
        return check(*args, **kwargs)

    monkeypatch.setattr(registry, "checked", noted)
    (tmp_path / "data/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="image-empty"):
        check_datasets(cfg)
    assert events == (["check", "synchronize"] if rank == 0 else ["synchronize", "check"])


def test_torchrun_tells_the_rank_on_the_machine(tmp_path, entry, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "0")
    cfg = cfg_for(tmp_path, entry)
    register_declared(cfg)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check_datasets(cfg)
    finally:
        dist.destroy_process_group()
