import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import make_cfg
from PIL import Image
from tiny_data import write_yolo

from aqdet.data import check_num_classes, register_declared
from aqdet.data.check.cache import check_declaration
from aqdet.data.declaration import Declaration
from aqdet.data.formats.data_yaml import named_splits
from aqdet.engine import Trainer


def check(root, split="train", image_root="", **options):
    declaration = Declaration("mine", "yolo", str(root / "data.yaml"), image_root or str(root), split)
    report, usable, _ = check_declaration(declaration, pixels=True)
    return report, usable


def test_boxes_in_pixels_and_original_class_numbers(tmp_path):
    report, usable = check(
        write_yolo(tmp_path, names={2: "cat", 7: "dog"}, labels=("7 0.5 0.5 0.25 0.5", "2 0.25 0.5 0.5 1"))
    )
    assert not report.counts
    assert [a["bbox"] for a in usable["annotations"]] == [[24, 8, 16, 16], [0, 0, 32, 32]]
    assert [a["category_id"] for a in usable["annotations"]] == [7, 2]
    assert usable["categories"] == [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert usable["images"][0] == {"id": 1, "file_name": "images/train/bild ü 0.png", "width": 64, "height": 32}


@pytest.mark.parametrize(
    "split, files",
    [
        ("images/train", {}),
        ("./images", {}),
        ("../images/train", {}),
        (["images/train", "images/other"], {}),
        ("list.txt", {"list.txt": "images/train/bild ü 0.png\n\n./images/train/bild ü 1.png\n"}),
        ("images/list.txt", {"images/list.txt": "./train/bild ü 0.png\n./train/bild ü 1.png\n"}),
        (["list.txt"], {"list.txt": "ROOT/images/train/bild ü 0.png\r\nROOT/images/train/bild ü 1.png"}),
    ],
)
def test_splits_are_folders_lists_or_lists_of_them(tmp_path, split, files):
    write_yolo(tmp_path, train=split)
    (tmp_path / "images/other").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("ROOT", str(tmp_path)))
    report, usable = check(tmp_path)
    assert not report.counts, report.text()
    assert len(usable["images"]) == 2 and len(usable["annotations"]) == 3


def test_labels_beside_the_images(tmp_path):
    write_yolo(tmp_path, train="train")
    (tmp_path / "train").mkdir()
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.txt")]:
        path.rename(tmp_path / "train" / path.name)
    report, usable = check(tmp_path)
    assert not report.counts and len(usable["annotations"]) == 3


OTHER = "1 0.5 0.5 0.5 0.5"
# name: (labels of the first image, findings)
LINES = {
    "class out of range": ("2 0.5 0.5 0.5 0.5", {"class-unknown": 1}),
    "negative class": ("-1 0.5 0.5 0.5 0.5", {"class-unknown": 1}),
    "name for a class": ("disc 0.5 0.5 0.5 0.5", {"class-type": 1}),
    "name of no class": ("cat 0.5 0.5 0.5 0.5", {"class-unknown": 1}),
    "class as float": ("0.0 0.5 0.5 0.5 0.5", {"class-type": 1}),
    "pixels": ("0 32 16 20 10", {"label-not-normalised": 1}),
    "NaN": ("0 nan 0.5 0.5 0.5", {"label-not-normalised": 1}),
    "too few": ("0 0.5 0.5 0.5", {"label-line": 1}),
    "a score": ("0 0.5 0.5 0.5 0.5 0.9", {"label-line": 1}),
    "commas": ("0,0.5,0.5,0.5,0.5", {"label-line": 1}),
    "words": ("0 a b c d", {"label-line": 1}),
    "no width": ("0 0.5 0.5 0 0.5", {"box-empty": 1}),
    "reaches outside": ("0 0.9 0.5 0.5 0.5", {"box-clipped": 1}),
    "twice": ("0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5", {"box-twice": 1}),
    "polygon": ("0 0.1 0.2 0.5 0.2 0.3 0.8", {"box-from-polygon": 1}),
    "nothing": ("", {"image-without-boxes": 1, "class-without-boxes": 1}),
    "no file": (None, {"label-file-absent": 1, "image-without-boxes": 1, "class-without-boxes": 1}),
    "Windows line ends and spaces": ("0 0.5  0.5\t0.5 0.5 \r\n\r\n", {}),
}


@pytest.mark.parametrize("name", LINES)
def test_lines(tmp_path, name):
    line, expected = LINES[name]
    report, usable = check(write_yolo(tmp_path, labels=(line, OTHER)))
    consequences = {"image-without-boxes", "class-without-boxes"} - set(expected)
    assert {k: n for k, n in report.counts.items() if k not in consequences} == expected
    if name == "polygon":
        assert usable["annotations"][0]["bbox"] == pytest.approx([6.4, 6.4, 25.6, 19.2])
    if name == "pixels":
        assert str(report.findings[0]) == f"{tmp_path}/labels/train/bild ü 0.txt: line 1: 0 32 16 20 10"


def test_keypoints_are_left_out(tmp_path):
    report, usable = check(write_yolo(tmp_path, labels=("0 0.5 0.5 0.25 0.5 0.5 0.5 2", OTHER), kpt_shape=[1, 3]))
    assert not report.counts and usable["annotations"][0]["bbox"] == [24, 8, 16, 16]


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"names": None}, "file-format"),
        ({"names": []}, "file-format"),
        ({"names": ["cat", "cat"]}, "category-malformed"),
        ({"names": ["cat", False]}, "category-malformed"),
        ({"names": {"a": "cat"}}, "category-malformed"),
        ({"names": ["cat", 7]}, "category-name-type"),
        ({"nc": 3}, "file-format"),
        ({"train": None}, "file-format"),
        ({"train": "images/none"}, "file-format"),
        ({"train": "/etc"}, "file-format"),
        ({"path": "/etc", "train": "ssl"}, "file-format"),
    ],
)
def test_data_yaml(tmp_path, change, kind):
    report, _ = check(write_yolo(tmp_path, **change))
    assert report.counts[kind] == 1, report.text()


def test_object_tags_are_refused(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: !!python/object/apply:os.getcwd []\n")
    report, _ = check(tmp_path)
    assert report.counts == {"file-unreadable": 1}


def test_files_that_belong_to_nothing_and_files_that_are_shared(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels/train/alone.txt").write_text(OTHER)
    (tmp_path / "labels/train/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "images/train/raw.heic").write_bytes(b"x")
    Image.new("RGB", (64, 32)).save(tmp_path / "images/train/bild ü 0.jpg")
    report, _ = check(tmp_path)
    assert report.counts == {"label-without-image": 1, "file-ignored": 1, "label-shared": 1}


def test_a_wrong_layout_is_an_error(tmp_path):
    report, _ = check(write_yolo(tmp_path, labels=(None, None)))
    assert report.counts["labels-absent"] == 1 and report.refused(strict=False) == 1


def test_a_list_cannot_lead_outside(tmp_path):
    write_yolo(tmp_path / "mine", train="list.txt")
    write_yolo(tmp_path / "theirs")
    for path in [*(tmp_path / "theirs").rglob("*.png"), *(tmp_path / "theirs/labels").rglob("*.txt")]:
        path.rename(path.with_name(f"their {path.name}"))
    outside = "../theirs/images/train/their bild ü 0.png"
    (tmp_path / "mine/list.txt").write_text(f"{outside}\n{tmp_path}/theirs/images/train/their bild ü 1.png\n")
    report, _ = check(tmp_path / "mine")
    assert report.counts["image-outside"] == 2
    # A wider root is the declaration's to give, not the file's.
    report, usable = check(tmp_path / "mine", image_root=str(tmp_path))
    assert report.counts["image-outside"] == 0 and len(usable["images"]) == 2


def test_label_files_cannot_lead_outside(tmp_path):
    write_yolo(tmp_path / "mine")
    (tmp_path / "elsewhere.txt").write_text(OTHER)
    label = tmp_path / "mine/labels/train/bild ü 0.txt"
    label.unlink()
    label.symlink_to(tmp_path / "elsewhere.txt")
    report, _ = check(tmp_path / "mine")
    assert report.counts["image-outside"] == 1


def test_names_that_yaml_takes_for_something_else(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [no, yes, on, ~, 2020-01-01]\n")
    report, _ = check(tmp_path)
    assert report.counts["category-malformed"] == 5 and report.counts["class-unknown"] == 0
    assert [f.value.split(":")[0] for f in report.findings[:5]] == ["False", "True", "True", "None", "2020-01-01"]
    assert all("quote it in names, as 'no'" in f.value for f in report.findings[:5])
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: ['no', \"yes\"]\n")
    assert not check(tmp_path)[0].counts
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: {'0': a, 1.0: b}\n")
    report, usable = check(tmp_path)
    assert report.counts == {"category-id-type": 2} and [c["id"] for c in usable["categories"]] == [0, 1]


def test_numbers_in_names_are_text_as_it_is_written(tmp_path):
    write_yolo(tmp_path)
    for names in ("[010, 0x10, 12:30, 1_0, 7]", "{0: 010, 1: 0x10, 2: 12:30, 3: 1_0, 4: 7}"):
        (tmp_path / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
        report, usable = check(tmp_path)
        assert [c["name"] for c in usable["categories"]] == ["010", "0x10", "12:30", "1_0", "7"]
        assert report.counts["category-name-type"] == 5 and report.number("error") == 0


def test_objects_of_a_refused_class_do_not_make_their_images_empty(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [no, yes]\n")
    assert check(tmp_path)[0].counts == {"category-malformed": 2}
    (tmp_path / "labels/train/bild ü 0.txt").write_text("")
    assert check(tmp_path)[0].counts == {"category-malformed": 2, "image-without-boxes": 1}
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [a]\n")
    (tmp_path / "labels/train/bild ü 1.txt").write_text("5 0.5 0.5 0.2 0.2\n")
    assert check(tmp_path)[0].counts == {"class-unknown": 1, "image-without-boxes": 1, "class-without-boxes": 1}


@pytest.mark.parametrize("key", ["minival", "trian", "valid", "Val"])
def test_a_key_that_names_images_and_is_not_read_is_told(tmp_path, key):
    write_yolo(tmp_path, val="images/train", **{key: "images/train", "label_dir": "labels/train", "license": "MIT"})
    report, _ = check(tmp_path)
    assert report.counts == {"split-unread": 1}
    assert (report.findings[0].field, report.findings[0].value) == (key, "images/train")
    write_yolo(tmp_path, val=None, test=["list.txt"], **{key: ["images/train", "list.txt"]})
    (tmp_path / "list.txt").write_text("images/train/bild ü 0.png\n")
    splits = {"minival": ["train", "test"], "trian": ["train", "test"]}.get(key, ["train", "val", "test"])
    assert named_splits(str(tmp_path / "data.yaml")) == splits
    assert check(tmp_path)[0].counts["split-unread"] == (len(splits) == 2)


@pytest.mark.parametrize("key", ["val", "valid", "validation", "Val", "VALID", "eval", "dev"])
def test_other_names_of_the_validation_split(tmp_path, key):
    write_yolo(tmp_path, **{key: "images/train"})
    report, usable = check(tmp_path, "val")
    assert report.counts == ({} if key == "val" else {"split-alias": 1}) and len(usable["images"]) == 2
    assert named_splits(str(tmp_path / "data.yaml")) == ["train", "val"]
    write_yolo(tmp_path, val=None)
    report, _ = check(tmp_path, "val")
    assert "no split 'val', splits there: train" in report.text()


def test_without_a_split_it_is_all_of_them(tmp_path):
    write_yolo(tmp_path, train="list.txt", test="images/train")
    (tmp_path / "list.txt").write_text("images/train/bild ü 0.png\n")
    report, usable = check(tmp_path, "")
    assert not report.counts and [image["file_name"][-5:] for image in usable["images"]] == ["0.png", "1.png"]
    write_yolo(tmp_path, train=None)
    report, _ = check(tmp_path, "")
    assert report.counts["file-format"] == 1 and "none of train, val, test" in report.text()


def test_files_of_systems_and_tools_are_passed_over(tmp_path):
    write_yolo(tmp_path)
    junk = ["images/train/._bild ü 0.png", "images/train/Thumbs.db", "images/train/.DS_Store", "images/train/a.cache"]
    for name in [*junk, "labels/train/._bild ü 0.txt", "labels/train/train.cache"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "images/train/__MACOSX").mkdir()
    report, usable = check(tmp_path)
    assert report.counts == {"file-junk": 7} and len(usable["images"]) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_list_in_another_encoding(tmp_path, encoding):
    write_yolo(tmp_path, train="list.txt")
    (tmp_path / "list.txt").write_bytes("images/train/bild ü 0.png\r\n".encode(encoding))
    report, usable = check(tmp_path)
    assert report.number("error") == 0 and report.number("repaired") == 1 and len(usable["annotations"]) == 1
    (tmp_path / "list.txt").write_bytes("images/train/bild ü 0.png".encode("utf-16-le"))
    report, _ = check(tmp_path)
    assert report.counts["file-unreadable"] == 1 and report.findings[0].file == str(tmp_path / "list.txt")


def test_a_list_of_another_machine(tmp_path):
    write_yolo(tmp_path, train="list.txt")
    (tmp_path / "list.txt").write_text("C:\\yolo\\bild ü 0.png\n/home/else/data/images/train/bild ü 1.png\n")
    report, usable = check(tmp_path)
    assert report.counts == {"image-elsewhere": 2} and len(usable["annotations"]) == 3


def test_one_step_of_training(tmp_path):
    write_yolo(
        tmp_path, names={3: "cat", 5: "dog"}, labels=("3 0.5 0.5 0.5 0.9", "5 0.5 0.5 0.5 0.9\n3 0.3 0.5 0.5 0.8")
    )
    entry = {"name": f"yolo_{tmp_path}", "format": "yolo", "yaml": str(tmp_path / "data.yaml"), "split": "train"}
    cfg = make_cfg("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", str((entry["name"],)))
    cfg.merge_from_list(["DATASETS.TEST", (entry["name"],), "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", 1])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "MODEL.RETINANET.NUM_CLASSES", 0])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32])
    register_declared(cfg)
    check_num_classes(cfg)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
    assert MetadataCatalog.get(entry["name"]).thing_dataset_id_to_contiguous_id == {3: 0, 5: 1}
    assert [a["category_id"] for r in DatasetCatalog.get(entry["name"]) for a in r["annotations"]] == [0, 1, 0]
    (tmp_path / "out").mkdir()
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert {"AP-cat", "AP-dog"} <= set(json.loads((tmp_path / "out/inference/metrics.json").read_text()))


@pytest.mark.parametrize("name", ["classes.txt", "_darknet.labels"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_list_of_names_takes_the_place_of_a_data_yaml(tmp_path, name, beside):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / name).write_text("disc\ncross\n\n")
    if beside:
        for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("bild*.txt")]:
            path.rename(tmp_path / path.name)
    declaration = Declaration("mine", "yolo", str(tmp_path / name), str(tmp_path))
    report, usable, _ = check_declaration(declaration, pixels=True)
    assert not report.counts, report.text()
    assert [image["file_name"].rpartition("/")[2] for image in usable["images"]] == ["bild ü 0.png", "bild ü 1.png"]
    assert [a["category_id"] for a in usable["annotations"]] == [0, 1, 0]
    assert usable["categories"] == [{"id": 0, "name": "disc"}, {"id": 1, "name": "cross"}]
    report, *_ = check_declaration(Declaration("mine", "yolo", str(tmp_path / name), str(tmp_path), "val"), pixels=True)
    assert report.counts["file-format"] == 1 and "no split 'val': a list of names has no splits" in report.text()


def test_a_list_of_names_has_every_name_once(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "classes.txt").write_text("disc\n\ndisc\n")
    declaration = Declaration("mine", "yolo", str(tmp_path / "classes.txt"), str(tmp_path))
    report, *_ = check_declaration(declaration, pixels=True)
    assert report.counts["category-malformed"] == 2 and report.counts["class-unknown"] == 0


@pytest.mark.parametrize(
    "split, used",
    [
        ("/content/drive/mine/images/train", True),
        ("C:\\Users\\me\\images\\train", True),
        ("/content/train", False),
        ("/content/valid/images", False),
        ("../valid/images", False),
    ],
)
def test_a_split_of_another_machine_is_found_by_the_end_of_its_path(tmp_path, split, used):
    report, usable = check(write_yolo(tmp_path, train=split))
    assert report.counts["split-elsewhere"] == used and report.counts["file-format"] == (not used)
    assert len(usable["annotations"]) == 3 * used
    if used:
        assert f"train = {split}; used: images/train" in report.text()


@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_folders_and_label_files_in_capitals(tmp_path, ending):
    write_yolo(tmp_path, train="Images/train")
    (tmp_path / "images").rename(tmp_path / "Images")
    (tmp_path / "labels").rename(tmp_path / "Labels")
    for path in (tmp_path / "Labels").rglob("*.txt"):
        path.rename(path.with_suffix(ending))
    report, usable = check(tmp_path)
    assert not report.counts and len(usable["annotations"]) == 3


def test_a_key_given_twice_and_names_that_are_no_list(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [disc, cross]\ntrain: images/train\ntrain: images/val\n")
    report, _ = check(tmp_path)
    assert report.counts == {"file-unreadable": 1} and "train is there twice, in lines 2 and 3" in report.text()
    (tmp_path / "data.yaml").write_text("names: disc\ntrain: images/train\n")
    report, _ = check(tmp_path)
    assert "names = disc: it must be a list of the names of the classes, as [disc]" in report.text()
