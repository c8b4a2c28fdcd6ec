import json
import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers import make_cfg
from PIL import Image

from aqdet.data import check_datasets, check_num_classes, register_declared
from aqdet.data.class_names import check_class_order


def dataset(folder, names=("cat", "dog", "cow")):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    content = {"images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}], "annotations": []}
    content["categories"] = [{"id": 10 * (i + 1), "name": n} for i, n in enumerate(names)]
    (folder / "a.json").write_text(json.dumps(content))
    return {
        "name": f"test_{folder}",
        "json": str(folder / "a.json"),
        "image_root": str(folder),
    }


def cfg_for(*entries, train=(), test=()):
    cfg = make_cfg()
    cfg.DATASETS.DECLARED = list(entries)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    return cfg


def test_registers_once_and_under_the_datasets_folder(tmp_path, monkeypatch):
    entry = dataset(tmp_path / "mine")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    entry.update(json="mine/a.json", image_root="mine")
    cfg = cfg_for(entry, train=[entry["name"]])
    register_declared(cfg)
    register_declared(cfg)
    assert entry["name"] in DatasetCatalog
    assert MetadataCatalog.get(entry["name"]).thing_classes == ["cat", "dog", "cow"]
    check_num_classes(cfg)
    other = {**entry, "json": dataset(tmp_path / "other")["json"]}
    with pytest.raises(ValueError, match="registered already with other files"):
        register_declared(cfg_for(other))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"json": "none.json"}, r"DATASETS.DECLARED\[0\].json: no file 'none.json'"),
        ({"image_root": "none"}, r"DATASETS.DECLARED\[0\].image_root: no folder 'none'"),
        ({"name": ""}, r"DATASETS.DECLARED\[0\].name must be a non-empty string"),
        ({"extra": 1}, "must have the fields name, json, image_root, and may have format, split, share, seed, got"),
        ({"format": "coc"}, r"DATASETS.DECLARED\[0\].format must be one of coco, voc, yolo, .*, csv, got 'coc'"),
        ({"json": 3}, r"DATASETS.DECLARED\[0\].json must be a non-empty string, got 3"),
        ({"name": "coco_2017_val"}, "'coco_2017_val' is registered already with other files"),
    ],
)
def test_wrong_declarations_are_one_line(tmp_path, change, words):
    entry = {**dataset(tmp_path / "d"), **change}
    with pytest.raises(ValueError, match=words) as error:
        register_declared(cfg_for(entry))
    assert "\n" not in str(error.value)


def test_unknown_names_and_class_counts(tmp_path):
    with pytest.raises(ValueError, match="no dataset 'aqdet_shapes_trian', did you mean aqdet_shapes_train"):
        register_declared(cfg_for(train=["aqdet_shapes_trian"]))
    two, three = dataset(tmp_path / "two", ("a", "b")), dataset(tmp_path / "three")
    register_declared(cfg_for(two, three))
    cfg = cfg_for(train=[two["name"]])
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3, but .* has 2 classes: a, b \(0 takes the number"):
        check_num_classes(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 0
    check_num_classes(cfg)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.DATASETS.TRAIN = 0, ()
    with pytest.raises(ValueError, match="NUM_CLASSES is 0, but no dataset"):
        check_num_classes(cfg)
    with pytest.raises(ValueError, match="have different classes"):
        check_num_classes(cfg_for(train=[three["name"]], test=[two["name"]]))


def test_who_only_evaluates_needs_no_data_to_train_on(tmp_path):
    gone, there = dataset(tmp_path / "gone"), dataset(tmp_path / "there")
    os.remove(gone["json"])
    cfg = cfg_for(gone, there, train=[gone["name"]], test=[there["name"]])
    with pytest.raises(ValueError, match=r"DATASETS.DECLARED\[0\].json: no file"):
        register_declared(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    register_declared(cfg, train=False)
    check_num_classes(cfg, train=False)
    check_datasets(cfg, train=False)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert there["name"] in DatasetCatalog and gone["name"] not in DatasetCatalog
    cfg.DATASETS.TEST = ("nowhere",)
    with pytest.raises(ValueError, match="DATASETS.TEST: no dataset 'nowhere'"):
        register_declared(cfg, train=False)


def test_a_list_of_entries_is_needed(tmp_path):
    cfg = cfg_for()
    cfg.DATASETS.DECLARED = "mine.json"
    with pytest.raises(ValueError, match=r"DATASETS.DECLARED must be a list of .*, got 'mine.json'"):
        register_declared(cfg)
    with pytest.raises(ValueError, match=r"DATASETS.DECLARED\[1\] must have the fields"):
        register_declared(cfg_for(dataset(tmp_path / "d"), "mine.json"))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: "{", "1 file-unreadable: .*/a.json: not JSON: Expecting property name"),
        (lambda c: "[1, 2]", "1 file-format: .*/a.json: images = not COCO JSON: it has no list 'images'"),
        (lambda c: json.dumps({**c, "annotations": {}}), "it has no list 'annotations'"),
        (lambda c: json.dumps({**c, "categories": []}), "'categories' is empty"),
        (lambda c: json.dumps({**c, "categories": [{"id": 1}]}), r"1 category-malformed: .*categories\[0\]: \{'id': 1"),
        (lambda c: json.dumps({**c, "categories": [{"id": 1, "name": n} for n in "ab"]}), r"categories\[1\]"),
    ],
)
def test_broken_annotation_files_are_one_line(tmp_path, change, words):
    entry = dataset(tmp_path / "d")
    path = tmp_path / "d" / "a.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=rf"DATASETS.DECLARED: {entry['name']}: 1 problem; .*{words}") as error:
        register_declared(cfg_for(entry))
    assert "\n" not in str(error.value)
    assert entry["name"] not in DatasetCatalog


def test_class_ids_are_those_of_detectron2_after_a_change_of_the_file_too(tmp_path):
    entry = dataset(tmp_path / "d", ("z", "a"))
    register_declared(cfg_for(entry))
    before = MetadataCatalog.get(entry["name"]).thing_dataset_id_to_contiguous_id
    assert before == {10: 0, 20: 1}
    path = tmp_path / "d" / "a.json"
    content = json.loads(path.read_text())
    content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 20, "bbox": [0, 0, 4, 4], "iscrowd": 0}]
    path.write_text(json.dumps(content))
    register_declared(cfg_for(entry))
    records = DatasetCatalog.get(entry["name"])
    assert records[0]["annotations"][0]["category_id"] == 1
    assert records[0]["file_name"] == str(tmp_path / "d" / "a.png")


def test_paths_are_looked_up_in_the_current_folder_too(tmp_path, monkeypatch):
    entry = {**dataset(tmp_path / "d"), "json": "d/a.json", "image_root": "d"}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    register_declared(cfg_for(entry))
    assert MetadataCatalog.get(entry["name"]).image_root == "d"


def test_class_counts_of_the_embedded_dataset_and_of_other_models(tmp_path):
    cfg = cfg_for(train=["aqdet_shapes_train"], test=["aqdet_shapes_val"])
    with pytest.raises(ValueError, match="MODEL.RETINANET.NUM_CLASSES is 3, but aqdet_shapes_train has 6"):
        check_num_classes(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    check_num_classes(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NUM_CLASSES is 80"):
        check_num_classes(cfg)


def test_classes_known_after_loading_are_checked(tmp_path):
    entry = dataset(tmp_path / "d", ("a", "b"))
    register_coco_instances(entry["name"], {}, entry["json"], entry["image_root"])
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but .* has 2 classes: a, b"):
        check_num_classes(cfg_for(train=[entry["name"]]))


def test_a_dataset_without_class_names_is_reported(caplog):
    name = "test_without_class_names"
    DatasetCatalog.register(name, list)
    try:
        check_num_classes(cfg_for(train=[name]))
    finally:
        DatasetCatalog.remove(name)
    assert f"Dataset {name} does not name its classes" in caplog.text


def test_an_evaluation_has_the_classes_of_the_training_in_their_order(tmp_path):
    one, other = dataset(tmp_path / "one"), dataset(tmp_path / "other", ("dog", "cat", "cow"))
    cfg = cfg_for(one, other, test=[one["name"]])
    register_declared(cfg)
    check_class_order(cfg, ["cat", "dog", "cow"], "model_final.pth")
    for others in (None, 3, {0: "cat"}, torch.zeros(3), ["CAT", "dog", "cow"]):
        check_class_order(cfg, others, "old.pth")
    cfg.DATASETS.TEST = (one["name"], other["name"])
    with pytest.raises(ValueError, match="the classes of model_final.pth in another order, ") as error:
        check_class_order(cfg, ["cat", "dog", "cow"], "model_final.pth")
    assert other["name"] in str(error.value) and "\n" not in str(error.value)


def test_keypoints_of_declared_datasets_are_refused_in_one_line(tmp_path):
    entry = dataset(tmp_path / "points")
    cfg = cfg_for(entry, train=[entry["name"]])
    cfg.MODEL.KEYPOINT_ON = True
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    register_declared(cfg)
    with pytest.raises(ValueError, match="MODEL.KEYPOINT_ON is True, but dataset .*points has no keypoint_names"):
        check_datasets(cfg)
