import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import make_cfg

from aqdet.data import check_num_classes, register_declared


def dataset(folder, names=("cat", "dog", "cow")):
    folder.mkdir(exist_ok=True)
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": 10 * (i + 1), "name": n} for i, n in enumerate(names)]
    (folder / "a.json").write_text(json.dumps(content))
    return {
        "name": f"test_{folder.name}_{id(folder)}",
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
        ({"extra": 1}, "must have exactly the fields name, json, image_root"),
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
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but .* has 2 classes: a, b"):
        check_num_classes(cfg_for(train=[two["name"]]))
    with pytest.raises(ValueError, match="have different classes"):
        check_num_classes(cfg_for(train=[three["name"]], test=[two["name"]]))
    broken = dataset(tmp_path / "broken")
    (tmp_path / "broken" / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not COCO JSON"):
        register_declared(cfg_for(broken))
