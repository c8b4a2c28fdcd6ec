import pytest
from data_forms import FORMS, IMAGES, check_entry, write_form, write_images

from aqdet.data.declaration import parse_declared
from aqdet.data.formats import FORMATS
from aqdet.data.formats.guess import guess_entry, guess_format

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
    assert "\n" not in text and text.startswith(f"{tmp_path / name}: not of a format that is read; formats are coco: ")
    assert all(f"{form.name}: {form.layout}" in text for form in FORMATS.values())
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
