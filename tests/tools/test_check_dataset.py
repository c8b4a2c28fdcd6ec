import json
import sys

import check_dataset
import pytest
from helpers import make_cfg
from tiny_data import write_dataset, write_image_folder, write_yolo


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; gives its exit status and what it printed."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            check_dataset.main()
        return end.value.code, capsys.readouterr().out

    return command


def broken(tmp_path):
    entry = write_dataset(tmp_path / "d", "mine")
    path = tmp_path / "d/mine.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [-10, 5, 36, 33]
    content["annotations"][1]["category_id"] = 9
    (tmp_path / "d/2.png").write_bytes(b"")
    path.write_text(json.dumps(content))
    return entry


def test_coco_json(run, tmp_path):
    entry = broken(tmp_path)
    arguments = ("--coco-json", entry["json"], "--image-root", entry["image_root"])
    status, printed = run(*arguments, "--json", tmp_path / "report.json")
    assert status == 1
    assert "error    class-unknown: 1" in printed and "error    image-empty: 1" in printed
    assert "2 error, 1 repaired, 0 dropped, 0 warning; images decoded" in printed and "refused" in printed
    (dataset,) = json.loads((tmp_path / "report.json").read_text())["datasets"]
    expected = {"severity": "error", "kind": "class-unknown", "file": entry["json"], "record": "annotation 2"}
    assert {**expected, "field": "category_id", "value": "9"} in dataset["findings"]


def test_image_folders(run, tmp_path):
    folders = [write_image_folder(tmp_path / name, name)["root"] for name in ("a", "b")]
    status, printed = run("--image-folders", *folders)
    assert status == 0 and "image-in-two-sets: 6" in printed and f"{folders[0]}: 6 images, 3 classes" in printed
    (tmp_path / "b" / "ring" / "0.png").write_bytes(b"no image")
    (tmp_path / "b" / "empty").mkdir()
    status, printed = run("--image-folders", *folders)
    assert status == 1 and "image-unreadable: 1" in printed and "no-images: 1" in printed


def test_strict_and_no_images(run, tmp_path):
    entry = write_dataset(tmp_path / "d", "mine")
    (tmp_path / "d/2.png").write_bytes(b"no image")
    arguments = ("--coco-json", entry["json"], "--image-root", entry["image_root"])
    assert run(*arguments)[0] == 1
    status, printed = run(*arguments, "--no-images")
    assert status == 0 and "images not decoded" in printed and "a training would start" in printed
    path = tmp_path / "d/mine.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [-10, 5, 36, 33]
    path.write_text(json.dumps(content))
    assert run(*arguments, "--no-images")[0] == 0
    assert run(*arguments, "--no-images", "--strict")[0] == 1


def test_config(run, tmp_path):
    entry = broken(tmp_path)
    (tmp_path / "c.yaml").write_text(make_cfg("DATASETS.DECLARED", str([entry])).dump())
    status, printed = run("--config-file", tmp_path / "c.yaml", "--examples", "0")
    assert status == 1 and printed.startswith("mine: 4 images")
    status, _ = run("--config-file", tmp_path / "c.yaml", "DATASETS.DECLARED", "[]")
    assert status == f"error: nothing to check: {tmp_path}/c.yaml names no datasets or splits"


def test_all_splits_of_a_yolo_folder(run, tmp_path):
    write_yolo(tmp_path, val="images/train")
    status, printed = run("--yolo", tmp_path / "data.yaml")
    assert status == 0 and printed.startswith("train: 2 images") and "\nval: 2 images" in printed
    assert "warning  image-in-two-sets: 2" in printed
    status, printed = run("--yolo", tmp_path / "data.yaml", "--split", "val")
    assert status == 0 and printed.startswith("val: 2 images") and "train" not in printed.splitlines()[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--coco-json", "a.json"), "--coco-json needs --image-root"),
        (("--coco-json", "none.json", "--image-root", "."), "no file 'none.json'"),
        (("--voc", "."), "nothing to check: . names no datasets or splits"),
        (("--config-file", "none.yaml"), "config file 'none.yaml' does not exist"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _ = run(*arguments)
    assert status.startswith("error: ") and words in status and "\n" not in status
