import json
from pathlib import Path

import pytest
from data_forms import FORMS, IMAGES, check_entry, write_form, write_images
from tiny_data import write_yolo

from aqdet.data.declared import parse_declared
from aqdet.data.formats import FORMATS
from aqdet.data.formats.guess import guess_entries, guess_format


def guess_entry(path, images=""):
    (entry,) = guess_entries(path, images)
    return entry


FILE = {"coco": "json", "voc": "root", "yolo": "yaml", "darknet": "data", "labelme": "images"}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_known_by_its_file_and_by_its_folder(tmp_path, form):
    entry = write_form(tmp_path / "d", form)
    expected = entry.get("format", "coco")
    path = entry[FILE.get(expected, "annotations")]
    assert guess_format(path) == guess_format(str(tmp_path / "d")) == expected
    for given in (path, str(tmp_path / "d")):
        report, usable = check_entry(guess_entry(given))
        assert not report.refused(strict=True), report.text()
        assert len(usable["images"]) == len(IMAGES) and len(usable["annotations"]) == 7


@pytest.mark.parametrize("form", [form for form in FORMS if form != "coco"])
def test_an_entry_needs_no_format(tmp_path, form):
    entry = write_form(tmp_path / "d", form)
    without = {key: value for key, value in entry.items() if key != "format"}
    assert parse_declared([without]) == parse_declared([entry])


def test_labelimg_folder(tmp_path):
    write_form(tmp_path / "d", "voc")
    images, xml = str(tmp_path / "d/JPEGImages"), str(tmp_path / "d/Annotations")
    assert guess_entry(xml, images) == {"format": "voc", "images": images, "annotations": xml}
    assert parse_declared([{"name": "a", "images": images, "annotations": xml}])["a"].format == "voc"


OTHERS = {
    "notes.txt": "hello\n",
    "a.json": '{"x": 1}',
    "b.json": "{",
    "a.xml": "<html/>",
    "b.xml": "<a",
    "a.yaml": "x: 1\n",
    "a.csv": "a,b\n1,2\n",
    "empty.csv": "",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_say_which_formats_are_read_and_how_each_looks(tmp_path, name):
    (tmp_path / name).write_text(OTHERS[name])
    with pytest.raises(ValueError) as error:
        guess_format(str(tmp_path / name))
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{tmp_path / name}: not of a format that is read")
    assert "; formats are coco: " in text and all(f"{form.name}: {form.layout}" in text for form in FORMATS.values())
    with pytest.raises(ValueError, match=r"DATASETS.DECLARED\[0\].format is not given, and .*formats are coco"):
        parse_declared([{"name": "a", "annotations": str(tmp_path / name)}])


def test_folders_without_annotations(tmp_path):
    with pytest.raises(ValueError, match="a folder with neither annotations nor images"):
        guess_entry(str(tmp_path))
    with pytest.raises(ValueError, match="images without annotations; .* DATASETS.IMAGE_FOLDERS"):
        guess_entry(str(write_images(tmp_path)))
    with pytest.raises(ValueError, match="an image, no annotations"):
        guess_entry(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="no file or folder"):
        guess_entry(str(tmp_path / "none"))


def test_a_folder_with_several_files_of_annotations_is_all_of_them(tmp_path):
    for split in ("train", "valid"):
        write_form(tmp_path / "d" / split, "csv")
    found = guess_entries(str(tmp_path / "d"))
    assert [entry["format"] for entry in found] == ["csv", "csv"]
    assert [Path(entry["annotations"]).relative_to(tmp_path / "d").parts[0] for entry in found] == ["train", "valid"]
    assert all(len(check_entry(entry)[1]["images"]) == len(IMAGES) for entry in found)


def test_files_that_say_where_the_images_are_one_folder_below(tmp_path):
    write_form(tmp_path / "darknet" / "data", "darknet")
    entry = guess_entry(str(tmp_path / "darknet"))
    assert entry["data"] == str(tmp_path / "darknet/data/obj.data") and entry["image_root"].endswith("darknet/data")
    assert len(check_entry(entry)[1]["images"]) == len(IMAGES)
    for name in ("a", "b"):
        write_yolo(tmp_path / "two" / name)
    found = guess_entries(str(tmp_path / "two"))
    assert [entry["yaml"] for entry in found] == [str(tmp_path / f"two/{name}/data.yaml") for name in "ab"]


def test_a_yolo_folder_without_a_data_yaml(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match="images with text files, as YOLO's, but no names of classes: write a classes"):
        guess_entry(str(tmp_path))
    for name in ("labels/classes.txt", "classes.txt"):
        (tmp_path / name).write_text("disc\ncross\n")
        entry = guess_entry(str(tmp_path))
        assert entry == {"format": "yolo", "yaml": str(tmp_path / name), "image_root": str(tmp_path)}
        assert len(check_entry(entry)[1]["annotations"]) == 3
        (tmp_path / name).unlink()
    (tmp_path / "data.yaml").write_text("nc: 2\ntrain: images/train\n")
    with pytest.raises(ValueError, match="data.yaml has no names of classes, as YOLO's"):
        guess_entry(str(tmp_path))


def test_images_beside_the_folder_of_annotations(tmp_path):
    write_images(tmp_path / "images/default")
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "annotations/instances_default.json").write_text(json.dumps(content))
    entry = guess_entry(str(tmp_path))
    assert entry["image_root"] == str(tmp_path / "images")
    report, usable = check_entry(entry)
    assert report.counts["image-elsewhere"] == 1 and usable["images"][0]["file_name"] == "default/a.png"


# name: (its content, what it is said to be)
OF_OTHER_TOOLS = {
    "studio.json": ([{"data": {"image": "a.png"}, "annotations": [{"result": []}]}], "Label Studio's own; export"),
    "min.json": ([{"image": "a.png", "label": [{"original_width": 1, "original_height": 1}]}], "JSON-MIN; export"),
    "createml.json": ([{"image": "a.png", "annotations": []}], "CreateML's; export the annotations as COCO JSON"),
    "found.json": ([{"image_id": 1, "category_id": 1, "bbox": [], "score": 1}], "detections, not annotations"),
    "supervisely.json": ({"size": {}, "objects": []}, "Supervisely's; export"),
    "test.json": ({"images": [], "categories": []}, "COCO's list of test images, without annotations"),
    "annotated.json": ({"images": [], "annotations": []}, "COCO JSON without its list 'categories'"),
    "vott.json": ({"name": "a", "assets": {}, "tags": []}, "VoTT's project; export"),
    "asset.json": ({"asset": {"name": "a.png"}, "regions": [], "version": "2.2.0"}, "VoTT's own; export"),
    "via3.json": ({"project": {}, "config": {}, "attribute": {}, "file": {}, "metadata": {}}, "VIA's of version 3"),
    "datumaro.json": ({"info": {}, "categories": {"label": {}}, "items": []}, "Datumaro's; export"),
    "bdd.json": ([{"name": "a.png", "labels": [{"category": "car", "box2d": {}}]}], "Scalabel's, as BDD100K has it"),
    "labelbox.ndjson": ('{"data_row": {"id": 1}}\n{"data_row": {"id": 2}}\n', "JSON lines, Labelbox's; export"),
    "metadata.jsonl": ('{"file_name": "a.png"}\n\n{"file_name": "b.png"}', "JSON lines, a record each; export"),
    "lines.json": ("{}\n[\n", "not JSON: Extra data"),
    "list.txt": ("[a]\n[b]", "not JSON: "),
    "pointer.json": ("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n", "'git lfs pull'"),
    "page.json": ("<!DOCTYPE html>\n<html></html>", "a web page"),
    "page.csv": ("<HTML>login</HTML>", "a web page"),
    "wheat.csv": ('image_id,width,height,bbox\na,64,48,"[5, 5, 20, 20]"\n', "a table with no column class, xmin"),
    "blank.csv": (" \n", "not of a format that is read, it is empty; "),
    "zeros.tfrecord": (b"a\0b", "not of a format that is read, it has characters of value 0"),
    "latin.csv": ("file;Bär".encode("latin-1"), "not text in UTF-8"),
    "other.xml": ("<html/>", "XML of <html>"),
    "cut.xml": ("<annotation", "not valid XML"),
}


@pytest.mark.parametrize("name", OF_OTHER_TOOLS)
def test_what_other_tools_wrote_is_told_with_the_way_out(tmp_path, name):
    content, words = OF_OTHER_TOOLS[name]
    data = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match="^.*not of a format that is read") as error:
        guess_entry(str(tmp_path / name))
    assert words in str(error.value) and "\n" not in str(error.value)
    if name.endswith(".json") and not isinstance(content, str):
        entry = {"json": str(tmp_path / name), "image_root": str(tmp_path)}
        report, _ = check_entry(entry)
        assert report.counts["file-format"] == 1 and words in report.text()
