"""Image folders: what is read, what is refused, and what the classifier is given."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import CLASSIFIER, make_cfg
from PIL import Image
from tiny_data import write_image_folder

from aqdet.data import build_mapper, check_datasets, check_num_classes, register_declared


def cfg_of(*entries, test=()):
    cfg = make_cfg(*CLASSIFIER, "INPUT.CLASSIFIER.CROP_SIZE", "32", "INPUT.MIN_SIZE_TEST", "40")
    cfg.DATASETS.IMAGE_FOLDERS = list(entries)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entries[0]["name"],), test
    return cfg


def test_classes_are_the_folders_and_other_files_are_counted(tmp_path, caplog):
    entry = write_image_folder(tmp_path / "a", "folder_a", per_class=2)
    (tmp_path / "a" / "cross" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "cross" / "below").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "cross" / "below" / "grey.JPEG")
    cfg = cfg_of(entry)
    register_declared(cfg)
    register_declared(cfg)  # once more, as every process of a job on one machine might
    check_num_classes(cfg)
    records = DatasetCatalog.get("folder_a")
    assert MetadataCatalog.get("folder_a").thing_classes == ["cross", "disc", "ring"]
    assert [record["label"] for record in records] == [0, 0, 0, 1, 1, 2, 2]
    assert [record["image_id"] for record in records] == list(range(7))
    assert "1 files that are no images by their names are left out" in caplog.text
    grey = build_mapper(cfg, False)(records[2])
    assert grey["image"].shape == (3, 32, 32)


def test_files_of_systems_are_no_images(tmp_path):
    entry = write_image_folder(tmp_path / "a", "folder_junk", per_class=2)
    (tmp_path / "a/.git").mkdir()
    (tmp_path / "a/cross/._0.png").write_bytes(b"x")
    (tmp_path / "a/cross/Thumbs.db").write_bytes(b"x")
    register_declared(cfg_of(entry))
    assert MetadataCatalog.get("folder_junk").thing_classes == ["cross", "disc", "ring"]
    assert len(DatasetCatalog.get("folder_junk")) == 6


def test_one_class_is_said(tmp_path, caplog):
    for name in ("cross", "disc"):
        (tmp_path / "a" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "a" / name / "grey.png")
    entry = {"name": "folder_one", "root": str(tmp_path / "a")}
    register_declared(cfg_of(entry))
    assert "has one class" not in caplog.text
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "cross").rename(tmp_path / "b" / "cross")
    register_declared(cfg_of({"name": "folder_one_b", "root": str(tmp_path / "b")}))
    assert "has one class, 'cross': any classifier is right" in caplog.text


def test_wrong_entries_are_one_line(tmp_path):
    entry = write_image_folder(tmp_path / "b", "folder_b")
    (tmp_path / "empty").mkdir()

    def refused(words, *entries, **changes):
        cfg = cfg_of(*(entries or ({**entry, **changes},)))
        with pytest.raises(ValueError, match=words) as error:
            register_declared(cfg)
        assert "\n" not in str(error.value)

    refused(
        r"IMAGE_FOLDERS\[0\] must have the fields name, root, and may have split, share, seed, got",
        name="x",
        images="y",
    )
    refused(r"IMAGE_FOLDERS\[0\].root must be a non-empty string, got 3", name="x", root=3)
    refused(r"IMAGE_FOLDERS\[0\].root: no folder 'nowhere'", name="x", root="nowhere")
    refused("has no folders, it must have one for each class", name="x", root=str(tmp_path / "empty"))
    register_declared(cfg_of(entry))
    refused("'folder_b' is registered already", root=str(tmp_path))
    cfg = make_cfg(*CLASSIFIER)
    cfg.DATASETS.IMAGE_FOLDERS = "folder"
    with pytest.raises(ValueError, match="IMAGE_FOLDERS must be a list"):
        register_declared(cfg)


def test_images_are_checked_before_training(tmp_path, caplog):
    caplog.set_level("INFO")
    train, test = (write_image_folder(tmp_path / name, f"folder_check_{name}") for name in ("train", "test"))
    cfg = cfg_of(train, test, test=(test["name"],))
    cfg.OUTPUT_DIR, cfg.DATASETS.CACHE_DIR = str(tmp_path / "output"), str(tmp_path / "cache")
    register_declared(cfg)
    folder = tmp_path / "train" / "cross"
    first = sorted(folder.iterdir())[0]
    Image.new("P", (8, 8)).save(folder / "palette.png")
    (folder / "again.png").symlink_to(first)
    (tmp_path / "test" / "cross" / "same.png").write_bytes(first.read_bytes())
    (folder / "notes.txt").write_text("no image")
    check_datasets(cfg).write(tmp_path / "report")
    assert not (tmp_path / "output").exists()
    report = json.loads((tmp_path / "report" / "dataset_check.json").read_text())
    counts = {dataset["name"]: dataset["counts"] for dataset in report["datasets"]}
    assert counts["folder_check_train"] == {"image-converted": 1, "image-twice": 1, "file-ignored": 1}
    assert counts["folder_check_test"] == {"image-in-two-sets": 7, "image-twice": 1}  # noise of the same seed
    number = len([path for path in (tmp_path / "train").rglob("*.png")])
    assert f"Dataset folder_check_train: {number} images, 3 classes; classes 0: cross (id 0)" in caplog.text

    caplog.clear()
    ring = tmp_path / "train" / "ring"
    (ring / "empty.png").write_bytes(b"")
    (ring / "cut.png").write_bytes(first.read_bytes()[:40])
    Image.new("I;16", (8, 8)).save(ring / "deep.png")
    with pytest.raises(ValueError, match="folder_check_train: 3 problems; 1 image-unreadable: .*cut.png") as error:
        check_datasets(cfg)
    assert "1 image-empty: " in str(error.value) and "deep.png: I;16" in str(error.value)
    check_datasets(cfg, train=False)


def test_who_only_evaluates_needs_no_folder_to_train_on(tmp_path):
    test = write_image_folder(tmp_path / "test", "folder_alone")
    cfg = cfg_of({"name": "folder_gone", "root": "nowhere"}, test, test=(test["name"],))
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        register_declared(cfg)
    register_declared(cfg, train=False)
    assert test["name"] in DatasetCatalog and "folder_gone" not in DatasetCatalog


def test_a_class_without_images_and_another_number_of_classes(tmp_path):
    entry = write_image_folder(tmp_path / "c", "folder_c")
    (tmp_path / "c" / "square").mkdir()
    cfg = cfg_of(entry)
    register_declared(cfg)
    with pytest.raises(ValueError, match="MODEL.CLASSIFIER.NUM_CLASSES is 3, but folder_c has 4 classes: cross"):
        check_num_classes(cfg)
    with pytest.raises(ValueError, match="square' has no image"):
        DatasetCatalog.get("folder_c")


def test_random_crops_have_the_drawn_size_and_stay_inside(tmp_path):
    # A pixel says where it is.
    y, x = np.mgrid[:60, :90].astype(np.uint8)
    Image.fromarray(np.stack([2 * x, 4 * y, 0 * x], axis=2)).save(tmp_path / "a.png")
    cfg = cfg_of({"name": "unused", "root": "unused"})
    cfg.INPUT.CLASSIFIER.MIN_AREA, cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = 0.25, "RGB", "none"
    mapper = build_mapper(cfg, True)
    torch.manual_seed(0)
    shares = []
    for _ in range(100):
        image = mapper({"file_name": str(tmp_path / "a.png")})["image"].float()
        assert image.shape == (3, 32, 32)
        # Of 32 samples at the middles of their parts, first and last are 31/32 of the crop apart.
        width, height = ((image[i].amax() - image[i].amin()) / step * 32 / 31 for i, step in ((0, 2), (1, 4)))
        assert 0.65 < width / height < 1.55
        shares.append((width * height / (60 * 90)).item())
    assert 0.2 < min(shares) < 0.4 and 0.75 < max(shares) < 1.1


def test_the_centre_is_taken_and_the_record_kept(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[4:36, 24:56] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cfg = cfg_of({"name": "unused", "root": "unused"})
    got = build_mapper(cfg, False)({"file_name": str(tmp_path / "a.png"), "label": 2, "image_id": 7})
    assert (got["label"], got["image_id"], got["image"].shape) == (2, 7, (3, 32, 32))
    assert (got["image"] == torch.tensor([30, 20, 10]).view(3, 1, 1)).all()  # INPUT.FORMAT is BGR
    torch.manual_seed(0)
    train = build_mapper(cfg, True)
    images = [train({"file_name": str(tmp_path / "a.png"), "label": 2})["image"] for _ in range(3)]
    assert not images[0].equal(images[1]) and all(image.shape == (3, 32, 32) for image in images)


def test_values_that_do_not_suit_and_unreadable_images(tmp_path):
    for key, value, words in [
        ("DATALOADER.ASPECT_RATIO_GROUPING", "True", "ASPECT_RATIO_GROUPING must be False"),
        ("INPUT.CLASSIFIER.MIN_AREA", "0.", "MIN_AREA must be above 0 and at most 1, got 0"),
        ("INPUT.CLASSIFIER.CROP_SIZE", "900", r"CROP_SIZE must be from 1 to INPUT.MIN_SIZE_TEST \(800\), got 900"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_mapper(make_cfg(*CLASSIFIER, key, value), True)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="image .*bad.png' cannot be read"):
        build_mapper(make_cfg(*CLASSIFIER), False)({"file_name": str(tmp_path / "bad.png"), "label": 0})


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    register_declared(cfg_of(write_image_folder(tmp_path / "d", "folder_d")))
    assert len(DatasetCatalog.get("folder_d")) == 6 and "left out" not in caplog.text


def test_data_of_the_other_kind_of_model_is_refused(tmp_path):
    entry = write_image_folder(tmp_path / "k", "folder_k")
    cfg = cfg_of(entry)
    register_declared(cfg)
    cfg.MODEL.META_ARCHITECTURE = "QuantRetinaNet"
    with pytest.raises(ValueError, match="folder_k has image folders, but .* QuantRetinaNet needs boxes"):
        check_num_classes(cfg)
    cfg = make_cfg(*CLASSIFIER)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("aqdet_shapes_train",), ()
    register_declared(cfg)
    with pytest.raises(ValueError, match="aqdet_shapes_train has boxes, but .* QuantClassifier needs image folders"):
        check_num_classes(cfg)
