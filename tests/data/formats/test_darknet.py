import pytest
from data_forms import check_entry, expect, write_form

from aqdet.data.formats.darknet import named_splits


def check(folder, data=None, *, files=None, **more):
    """The six images with files of their folder changed; a text of None takes one away."""
    entry = write_form(folder / "data", "darknet")
    if data is not None:
        (folder / "data/obj.data").write_text(data)
    for name, text in (files or {}).items():
        path = folder / "data" / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check_entry({**entry, **more})


GOOD = "classes=2\ntrain=data/train.txt\nnames=data/obj.names\n"


@pytest.mark.parametrize(
    "data",
    [
        "# of mine\n; too\n\nnames = obj.names\ntrain = ./train.txt",
        "train = /content/darknet/data/train.txt\nnames = /content/darknet/data/obj.names",
        "train = build/x64/data/train.txt\r\nnames = build\\obj.names\r\n",
    ],
)
def test_paths_from_elsewhere(tmp_path, data):
    report, usable = check(tmp_path, data)
    expect(report, {})
    assert len(usable["images"]) == 6


@pytest.mark.parametrize(
    "line, name, kinds",
    [
        ("data/obj/a.png", "obj/a.png", {}),
        ("obj/a.png", "obj/a.png", {}),
        ("./data/obj/a.png", "obj/a.png", {}),
        ("data\\obj\\a.png", "obj/a.png", {}),
        ("/content/darknet/data/obj/a.png", "obj/a.png", {"image-elsewhere": 1}),
        ("build/darknet/x64/data/obj/a.png", "obj/a.png", {"image-elsewhere": 1}),
    ],
)
def test_images_from_elsewhere(tmp_path, line, name, kinds):
    report, usable = check(tmp_path, files={"train.txt": line})
    expect(report, {**kinds, "class-without-boxes": 1})
    assert [image["file_name"] for image in usable["images"]] == [name] and len(usable["annotations"]) == 1


def test_splits(tmp_path):
    data = f"{GOOD}valid = data/valid.txt\n"
    files = {"valid.txt": "data/obj/a.png\ndata/obj/a.png\n"}
    for split in ("valid", "val"):
        report, usable = check(tmp_path / split, data, files=files, split=split)
        expect(report, {"line-repeated": 1, "class-without-boxes": 1}, "valid.txt")
        assert len(usable["images"]) == 1
    report, _ = check(tmp_path / "test", data, files=files, split="test")
    expect(report, {"file-format": 1, "class-without-boxes": 2}, "no 'test', splits there: train, valid")
    assert named_splits(str(tmp_path / "val/data/obj.data")) == ["train", "valid"]
    entry = {**write_form(tmp_path / "all/data", "darknet")}
    del entry["split"]
    report, usable = check_entry(entry)
    assert len(usable["images"]) == 6


FILES = {
    "no such list": ({"train.txt": None}, {"file-format": 1}, "train = data/train.txt: no such file"),
    "no such names": ({"obj.names": None}, {"file-format": 1}, "names = data/obj.names: no such file"),
    "an empty list": ({"train.txt": ""}, {"file-unreadable": 1}, "train.txt: it is empty"),
    "UTF-16": (
        {"train.txt": "data/obj/a.png".encode("utf-16")},
        {"file-encoding": 1, "class-without-boxes": 1},
        "train.txt",
    ),
    "not text": ({"train.txt": b"\xff\xd8\xff"}, {"file-unreadable": 1}, "train.txt"),
    "names and classes": (
        {"obj.names": "cat\ndog\nape\n"},
        {"file-format": 1, "class-without-boxes": 1},
        "classes = 2, but there are 3",
    ),
    "a line between": (
        {"obj.names": "cat\n\ndog\n"},
        {"category-malformed": 1, "file-format": 1},
        "line 2: name = (empty)",
    ),
    "a class twice": ({"obj.names": "cat\ncat\n"}, {"category-malformed": 1}, "line 2: name = cat"),
    "an unknown class": ({"obj/a.txt": "7 0.5 0.5 0.1 0.1"}, {"class-unknown": 1}, "obj/a.txt: line 1"),
    "NaN": ({"obj/a.txt": "0 nan 0.5 0.1 0.1"}, {"label-not-normalised": 1}, "obj/a.txt: line 1"),
    "pixels": ({"obj/a.txt": "0 30 20 10 10"}, {"label-not-normalised": 1}, ""),
    "no label file": ({"obj/a.txt": None}, {"label-file-absent": 1}, "obj/a.txt"),
    "a missing image": ({"train.txt": "data/obj/c.png"}, {"image-missing": 1}, "data/obj/c.png"),
    "outside the root": ({"train.txt": "../x.png"}, {"image-outside": 1}, "x.png"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_wrong(tmp_path, case):
    files, counts, words = FILES[case]
    report, _ = check(tmp_path, GOOD, files=files)
    assert {k: v for k, v in report.counts.items() if k in counts or k.startswith("file-")} == counts, report.text()
    assert words in report.text(), report.text()


@pytest.mark.parametrize("data", ["", "names = obj.names", "train = train.txt", "a,b,c\n"])
def test_data_that_is_none(tmp_path, data):
    report, _ = check(tmp_path, data)
    assert report.refused(strict=False) == 1 and "obj.data" in report.text()
