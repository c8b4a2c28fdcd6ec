import json
import re
import subprocess
import sys
from pathlib import Path

import check_dataset
import pytest
from data_forms import labelme, write_form, write_images
from detectron2.data.datasets import load_coco_json
from helpers import ROOT, make_cfg
from PIL import Image
from pycocotools.coco import COCO
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
    nothing = f"error: nothing to check: {tmp_path}/c.yaml has no dataset in DATASETS.DECLARED or IMAGE_FOLDERS"
    assert status == nothing
    none = ("DATASETS.DECLARED", "[]", "DATASETS.TRAIN", "('aqdet_shapes_train',)")
    status, _ = run("--config-file", tmp_path / "c.yaml", *none)
    assert status == f"{nothing}; what registers aqdet_shapes_train is code, which this does not run"


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
        (("--coco-json", ".", "--image-root", "."), "'.' is a folder, a file is needed"),
        (("--dataset", "a.json"), "--dataset must be an entry as {name: mine, json: "),
        (("--dataset", "{"), "--dataset '{' is not plain YAML"),
        (("--dataset", "{format: cocoa}"), "format must be one of coco, voc, yolo"),
        (("--voc", ".", "--split", "1.5"), "split must be a share as 0.8"),
        (("--coco-json", "none.json", "--image-root", "."), "no file 'none.json'"),
        (("--voc", "none"), "root: no folder 'none'"),
        (("--config-file", "none.yaml"), "config file 'none.yaml' does not exist"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _ = run(*arguments)
    assert status.startswith("error: ") and words in status and "\n" not in status


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "nothing to check: give one of --config-file, --coco-json, --voc"),
        (("--voc", ".", "--imges", "x"), "unrecognized argument: --imges; did you mean --"),
        (("--bogus=3",), "unrecognized argument: --bogus=3"),
        (
            ("--voc", ".", "DATASETS.STRICT", "True"),
            "unrecognized arguments: DATASETS.STRICT True (KEY",
        ),
        (("--voc", ".", "--examples", "-1"), "argument --examples: must be a whole number of at least 0, got '-1'"),
        (("--voc", ".", "--seed", "x"), "argument --seed: invalid int value: 'x'"),
        (("--voc", ".", "--yolo", "."), "argument --yolo: not allowed with argument --voc"),
        (("--voc", ".", "--output", "."), "argument --output: '.' is a folder: name a file in it"),
        (("--dataset", "{}", "--split", "0.8"), "write it into the entry of --dataset"),
    ],
)
def test_wrong_arguments_are_named_when_they_are_parsed(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", *arguments])
    with pytest.raises(SystemExit) as end:
        check_dataset.main()
    assert end.value.code == 2 and words in capsys.readouterr().err


def write_labelimg(folder, number=12):
    """Images with an object each and their XML beside them."""
    folder.mkdir()
    size = "<size><width>64</width><height>48</height></size>"
    for index in range(number):
        Image.new("RGB", (64, 48), (index, 0, 0)).save(folder / f"{index}.png")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
        name = ("cat", "dog")[index % 2]
        text = f"<annotation>{size}<object><name>{name}</name>{box}</object></annotation>"
        (folder / f"{index}.xml").write_text(text)
    return folder


def test_shares_of_a_folder_of_labelimg_are_written_as_coco_json(run, tmp_path):
    folder = write_labelimg(tmp_path / "photos")
    output = tmp_path / "out" / "{name}.json"
    status, printed = run("--voc", folder, "--split", "0.5", "-0.5", "--seed", "2", "--output", output)
    assert status == 0 and f"written to {tmp_path}/out/0.5.json; file names in it are relative to {folder}" in printed
    contents = [json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("0.5", "-0.5")]
    names = [{image["file_name"] for image in content["images"]} for content in contents]
    assert len(names[0] | names[1]) == 12 and not names[0] & names[1] and all(names)
    assert [c["name"] for c in contents[0]["categories"]] == ["cat", "dog"]
    assert contents[0]["categories"] == contents[1]["categories"]
    before = (tmp_path / "out/0.5.json").read_bytes()
    run("--voc", folder, "--split", "0.5", "-0.5", "--seed", "2", "--output", output)
    assert (tmp_path / "out/0.5.json").read_bytes() == before
    # What was written is a dataset without findings, and Detectron2 and COCO's own code read it.
    status, printed = run("--coco-json", tmp_path / "out/0.5.json", "--image-root", folder)
    assert status == 0 and "0 error, 0 repaired, 0 dropped" in printed
    records = load_coco_json(str(tmp_path / "out/0.5.json"), str(folder), f"written_{tmp_path}")
    assert len(records) == len(names[0]) and all(len(record["annotations"]) == 1 for record in records)
    assert len(COCO(str(tmp_path / "out/0.5.json")).getAnnIds()) == len(names[0])
    status, _ = run("--voc", folder, "--split", "0.5", "-0.5", "--output", tmp_path / "one.json")
    assert "write {name} in it, there are several datasets: 0.5, -0.5" in status
    status, printed = run("--voc", folder, "--classes", "dog, cat", "--output", tmp_path / "one.json")
    assert status == 0
    assert [c["name"] for c in json.loads((tmp_path / "one.json").read_text())["categories"]] == ["dog", "cat"]


def test_what_is_refused_is_not_written(run, tmp_path):
    folder = write_labelimg(tmp_path / "photos", 2)
    output = tmp_path / "a.json"
    output.write_text("before")
    # The size in the XML is that of another image, and boxes would end at the wrong scale.
    text = (folder / "0.xml").read_text()
    (folder / "0.xml").write_text(text.replace(">64<", ">640<").replace(">48<", ">480<"))
    status, printed = run("--voc", folder, "--output", output)
    assert (
        status == 1 and "image-size: 1" in printed and f"nothing is written to {output}: {folder} is refused" in printed
    )
    assert output.read_text() == "before" and not list(tmp_path.glob("*.part"))
    (folder / "0.xml").write_text(text.replace(">cat<", ">cow<"))
    assert run("--voc", folder, "--classes", "cat,dog", "--output", output)[0] == 1
    assert run("--voc", folder, "--classes", "cow,dog", "--output", output)[0] == 0
    folders = write_image_folder(tmp_path / "classes", "x")["root"]
    assert "has a class an image, no boxes" in run("--image-folders", folders, "--output", output)[0]


def test_difficult_objects_become_crowd_regions_where_asked_for(run, tmp_path):
    folder = write_labelimg(tmp_path / "photos", 2)
    text = (folder / "0.xml").read_text()
    (folder / "0.xml").write_text(text.replace("</name>", "</name><difficult>1</difficult>"))
    output = tmp_path / "a.json"
    for options, crowds in (((), 0), (("--difficult-as-crowd",), 1)):
        assert run("--voc", folder, "--output", output, *options)[0] == 0
        assert sum(a["iscrowd"] for a in json.loads(output.read_text())["annotations"]) == crowds


def test_datasets_of_any_format(run, tmp_path):
    folder = write_labelimg(tmp_path / "photos")
    status, printed = run(
        "--dataset", f"{{format: voc, root: {folder}, split: 0.5}}", f"{{name: x, format: voc, root: {folder}}}"
    )
    assert status == 0 and printed.startswith("dataset0: ") and "\nx: 12 images" in printed
    status, printed = run("--image-folders", write_image_folder(tmp_path / "c", "x")["root"], "--split", "0.5")
    assert status == 0 and f"{tmp_path}/c:0.5: " in printed


def test_help_and_check_need_neither_torch_nor_detectron2(tmp_path):
    entry = broken(tmp_path)
    yolo = write_yolo(tmp_path / "y") / "data.yaml"
    code = (
        "import builtins, runpy, sys\n"
        "real = builtins.__import__\n"
        "def guarded(name, *args, **kwargs):\n"
        "    assert name.split('.')[0] not in ('torch', 'detectron2', 'fvcore', 'cv2'), name\n"
        "    return real(name, *args, **kwargs)\n"
        "builtins.__import__ = guarded\n"
        f"runpy.run_path({str(ROOT / 'tools/check_dataset.py')!r}, run_name='__main__')\n"
    )
    for arguments, status in (
        (["--help"], 0),
        (["--coco-json", entry["json"], "--image-root", entry["image_root"]], 1),
        (["--yolo", str(yolo), "--split", "0.5"], 0),
        (["--voc", str(write_labelimg(tmp_path / "v")), "--output", str(tmp_path / "a.json")], 0),
        (["--image-folders", write_image_folder(tmp_path / "f", "x")["root"]], 0),
    ):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert ended.returncode == status, ended.stderr


def test_a_file_or_folder_of_any_format_is_told_by_its_look(run, tmp_path):
    entry = write_form(tmp_path / "d", "cvat")
    status, printed = run("--dataset", entry["annotations"], "--image-root", entry["images"])
    assert status == 0 and f"{entry['annotations']}: 6 images, 1 of them without boxes, 7 boxes" in printed
    status, printed = run("--dataset", tmp_path / "d", f"{{format: cvat, annotations: {entry['annotations']}}}")
    assert status == 0 and "dataset1: 6 images" in printed
    (tmp_path / "notes.txt").write_text("hello")
    status, _ = run("--dataset", tmp_path / "notes.txt")
    assert status.startswith(
        f"error: {tmp_path}/notes.txt: not of a format that is read; formats are coco: a JSON file"
    )


def test_advice_where_a_config_is_given(run, tmp_path):
    entry = write_dataset(tmp_path / "d", "mine")
    cfg = make_cfg("DATASETS.DECLARED", str([entry]), "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")
    (tmp_path / "c.yaml").write_text(cfg.dump())
    status, printed = run("--config-file", tmp_path / "c.yaml", "--json", tmp_path / "report.json")
    line = "DATASETS.TRAIN: 3 of 3 classes have fewer than 10 objects: ring 0, cross 4, disc 4"
    assert status == 0 and f"advice: {line}" in printed
    (advice,) = json.loads((tmp_path / "report.json").read_text())["advice"]
    assert advice.startswith(line)
    assert "advice:" not in run("--coco-json", entry["json"], "--image-root", entry["image_root"])[1]


def test_a_folder_with_several_files_of_annotations_is_checked_as_a_whole(run, tmp_path):
    for split in ("train", "valid"):
        write_dataset(tmp_path / "d" / split, split)
    status, printed = run("--dataset", tmp_path / "d")
    assert status == 0 and "image-in-two-sets: 4" in printed
    assert all(f"{tmp_path}/d/{split}/{split}.json: 4 images" in printed for split in ("train", "valid"))


def test_yolo_with_a_list_of_names(run, tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "classes.txt").write_text("disc\ncross\n")
    status, printed = run("--yolo", tmp_path / "classes.txt", "--output", tmp_path / "mine.json")
    assert status == 0 and "2 images, 0 of them without boxes, 3 boxes" in printed
    assert len(COCO(str(tmp_path / "mine.json")).anns) == 3


def test_outputs_that_would_replace_the_data_or_each_other_are_refused(run, tmp_path):
    entry = write_dataset(tmp_path / "d", "mine")
    arguments = ("--coco-json", entry["json"], "--image-root", entry["image_root"])
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir() if path.is_file()}
    picture = next(path for path in before if path.suffix == ".png")
    for more, words in (
        (("--json", entry["json"]), "--json .* would replace a file that is read"),
        (("--output", entry["json"]), "--output .* would replace a file that is read"),
        (("--json", picture), "would replace a file that is read"),
        (("--json", tmp_path / "x", "--output", tmp_path / "x"), "--json and --output are both"),
    ):
        assert re.search(words, str(run(*arguments, *more)[0]))
    assert before == {path: path.read_bytes() for path in before}


def test_a_dataset_of_crowd_regions_alone_has_nothing_to_train_on(run, tmp_path):
    entry = write_dataset(tmp_path / "d", "mine")
    path = tmp_path / "d/mine.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(content))
    status, printed = run("--coco-json", entry["json"], "--image-root", entry["image_root"])
    assert status == 0 and "no-boxes: 1" in printed and printed.strip().endswith("there is nothing to train on")


def test_links_to_folders_are_named(run, tmp_path):
    root = Path(write_image_folder(tmp_path / "a", "a")["root"])
    (tmp_path / "more").mkdir()
    (root / "ring" / "linked").symlink_to(tmp_path / "more")
    assert "folder-link: 1" in run("--image-folders", root)[1]


def test_what_it_has_written_among_the_data_is_written_again(run, tmp_path):
    """A labelme folder is read for its JSON files, and this one is none of labelme's."""
    folder = tmp_path / "lm"
    write_images(folder, ["a.png"])
    (folder / "a.json").write_text(labelme("a.png", (64, 48), [("cat", "rectangle", [[3, 4], [23, 14]])]))
    for _ in range(2):
        status, printed = run("--dataset", folder, "--json", folder / "found.json", "--output", folder / "coco.json")
        assert status == 0 and "written to" in printed
