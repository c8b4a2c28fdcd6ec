import shutil
import zlib

import pytest
from detectron2.data.detection_utils import read_image
from helpers import ROOT
from PIL import Image

from aqdet.data.check.cache import check_declaration
from aqdet.data.check.records import find_shared_images
from aqdet.data.declaration import Declaration
from aqdet.data.declared import parse_declared

BCCD = ROOT.parent / "shared" / "data" / "BCCD"


def add(root, stem, objects, *, size=(40, 30), declared=None, ending=".jpg", split="train", exif=None):
    """Adds an image with objects (name, corners[, further XML]) to a VOC folder."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with open(root / f"ImageSets/Main/{split}.txt", "a") as file:
        file.write(f"{stem}\n")
    xml, image = root / f"Annotations/{stem}.xml", root / f"JPEGImages/{stem}{ending}"
    for path in (xml, image):
        path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if exif is None else {"exif": exif}
    # Each its own colour, so that no two images are the same.
    Image.new("RGB", size, zlib.crc32(stem.encode()) & 0xFFFFFF).save(image, **options)
    width, height = declared or size
    items = "".join(
        f"<object><name>{name}</name>{''.join(more)}<bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
        + "</bndbox></object>"
        for name, corners, *more in objects
    )
    size_xml = f"<size><width>{width}</width><height>{height}</height></size>"
    xml.write_text(f"<annotation>{size_xml}{items}</annotation>")
    return root


def check_voc(root, split="train", **options):
    declaration = Declaration("mine", "voc", str(root), str(root / "JPEGImages"), split, **options)
    report, usable, _ = check_declaration(declaration, pixels=True)
    return report, usable


def boxes_of(usable):
    return [annotation["bbox"] for annotation in usable["annotations"]]


def test_boxes_are_one_based_and_inclusive(tmp_path):
    objects = [("dog", (1, 1, 40, 30)), ("cat", (5, 7, 5, 8)), ("dog", (2.5, 3, 10, 5))]
    report, usable = check_voc(add(tmp_path, "a", objects))
    assert [c["name"] for c in usable["categories"]] == ["cat", "dog"]
    assert boxes_of(usable) == [[0, 0, 40, 30], [4, 6, 1, 2], [1.5, 2, 8.5, 3]]
    assert [a["area"] for a in usable["annotations"]] == [1200, 2, 25.5]
    assert [a["category_id"] for a in usable["annotations"]] == [2, 1, 2]
    assert report.counts == {"box-thin": 1}


def test_repairs_and_drops_are_counted(tmp_path):
    objects = [
        ("cat", (31, 21, 45, 30)),
        ("dog", (0, 0, 10, 10)),
        ("dog", (9, 9, 4, 12)),
        ("dog", (50, 1, 60, 5)),
        ("dog", (2, 2, 9, 9)),
        ("dog", (2, 2, 9, 9)),
    ]
    add(tmp_path, "a", objects)
    add(tmp_path, "b", [])
    with open(tmp_path / "ImageSets/Main/train.txt", "a") as file:
        file.write("a\n")
    report, usable = check_voc(tmp_path)
    assert boxes_of(usable) == [[30, 20, 10, 10], [0, 0, 10, 10], [1, 1, 8, 8], [1, 1, 8, 8]]
    assert [image["id"] for image in usable["images"]] == [1, 2]
    assert report.counts == {
        "line-repeated": 1,
        "box-clipped": 1,
        "box-edge": 1,
        "box-negative": 1,
        "box-outside": 1,
        "box-twice": 1,
        "image-without-boxes": 1,
    }


def test_all_splits_get_the_same_class_ids(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5)), ("cow", (1, 1, 10, 5))])
    add(tmp_path, "b", [("cat", (1, 1, 10, 5))], split="val")
    usable = [check_voc(tmp_path, split)[1] for split in ("train", "val")]
    assert usable[0]["categories"] == usable[1]["categories"]
    assert [c["name"] for c in usable[1]["categories"]] == ["cat", "cow", "dog"]
    (tmp_path / "Annotations/b.xml").write_text("<annotation>")
    report, usable = check_voc(tmp_path)
    assert report.counts == {"file-skipped": 1} and len(usable["categories"]) == 2


def test_parts_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    _, usable = check_voc(add(tmp_path, "a", [("dog", (1, 1, 10, 5), part)]))
    assert len(usable["annotations"]) == 1 and len(usable["categories"]) == 1


def test_other_names_and_endings(tmp_path):
    stems = {"über 1": ".png", "sub/b": ".JPG", "c.d": ".jpeg"}
    for stem, ending in stems.items():
        add(tmp_path, stem, [("dog", (1, 1, 10, 5))], ending=ending)
    _, usable = check_voc(tmp_path)
    assert [i["file_name"] for i in usable["images"]] == [s + e for s, e in stems.items()]


def test_images_turned_by_exif_have_the_size_detectron2_reads(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    report, usable = check_voc(add(tmp_path, "a", [], declared=(30, 40), exif=exif), classes=("dog",))
    height, width = read_image(str(tmp_path / "JPEGImages/a.jpg"), "RGB").shape[:2]
    assert (usable["images"][0]["width"], usable["images"][0]["height"]) == (width, height) == (30, 40)
    assert report.counts["image-turned"] == 1


def test_a_doctype_in_another_encoding_is_refused(tmp_path):
    xml = add(tmp_path, "a", [("dog", (1, 1, 10, 5))]) / "Annotations/a.xml"
    text = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE x []>' + xml.read_text()
    xml.write_bytes(text.encode("utf-16"))
    report, _ = check_voc(tmp_path)
    assert report.counts["file-unreadable"] == 1 and "has a DOCTYPE" in report.text()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"a  1\nb -1\n", "marks the images of one class"),
        (b"../q\n", "names files outside of the folder: ../q"),
        (b"a\n/etc/passwd\n", "names files outside of the folder: /etc/passwd"),
        (b"\n", "it is empty"),
        (b"\xff\xfea", "not text in UTF-8"),
        ("a".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_bad_split_files(tmp_path, content, words):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5))])
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(content)
    report, _ = check_voc(tmp_path)
    assert report.counts == {"file-unreadable": 1}
    assert report.findings[0].file.endswith("train.txt") and words in report.findings[0].value


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "a.xml", "JPEGImages/a.jpg", "./a", "..\\JPEGImages\\a.JPG", "/home/me/VOC/JPEGImages/a.jpg", "x/a"],
)
def test_lines_of_a_split_with_endings_and_folders(tmp_path, line):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5))])
    add(tmp_path, "b.jpg", [("dog", (1, 1, 10, 5))])  # a record that has such a name
    (tmp_path / "ImageSets/Main/train.txt").write_text(f"{line}\nb.jpg\n")
    report, usable = check_voc(tmp_path)
    assert report.counts == {"line-name": 1} and report.findings[0].value == f"{line}; used: a"
    assert [image["file_name"] for image in usable["images"]] == ["a.jpg", "b.jpg.jpg"]


def test_a_split_file_in_utf_16_is_read(tmp_path):
    add(tmp_path, "über", [("dog", (1, 1, 10, 5))])
    (tmp_path / "ImageSets/Main/train.txt").write_bytes("über\r\n".encode("utf-16"))
    report, usable = check_voc(tmp_path)
    assert report.counts == {"file-encoding": 1} and len(usable["annotations"]) == 1


@pytest.mark.parametrize("text, difficult", [("True", 1), ("TRUE", 1), ("1", 1), ("0", 0), ("false", 0), ("", 0)])
def test_words_for_difficult(tmp_path, text, difficult):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5), f"<difficult>{text}</difficult>")])
    _, usable = check_voc(tmp_path, difficult_as_crowd=True)
    assert [a["iscrowd"] for a in usable["annotations"]] == [difficult]


@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda text: '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + text, "file-unreadable"),
        (lambda text: text[:-5], "file-unreadable"),
        (lambda text: text.replace(">1<", ">?<"), "object-malformed"),
        (lambda text: text.replace("dog", " "), "object-malformed"),
        (lambda text: text.replace(">10<", ">nan<"), "object-malformed"),
        (lambda text: text.replace(">10<", ">1e999<"), "object-malformed"),
        (lambda text: text.replace("bndbox", "box"), "object-malformed"),
        (lambda text: text.replace("</name>", "</name><difficult>perhaps</difficult>"), "object-malformed"),
        (lambda text: text.replace("annotation>", "annotations>"), "file-format"),
        (lambda text: "", "file-unreadable"),
        (lambda text: text.replace(">40<", ">80<"), "image-size"),
        (lambda text: text.replace("<width>40</width>", ""), "image-size-absent"),
        (lambda text: text.replace(">10<", ">0<"), "box-empty"),
        (lambda text: text.replace(">10<", ">-7<"), "box-negative"),
    ],
)
def test_faults_of_a_folder(tmp_path, change, kind):
    add(tmp_path, "b", [("dog", (2, 2, 20, 20))])
    xml = add(tmp_path, "a", [("dog", (1, 1, 10, 5))]) / "Annotations/a.xml"
    xml.write_text(change(xml.read_text()))
    report, _ = check_voc(tmp_path)
    consequences = set() if kind.startswith("file") else {"image-without-boxes"}  # a file that is not read is one fault
    assert {k: n for k, n in report.counts.items() if k not in consequences} == {kind: 1}
    assert report.findings[0].file == str(xml)


def test_what_a_folder_lacks(tmp_path):
    for stem in "abc":
        add(tmp_path, stem, [("dog", (1, 1, 10, 5), "<difficult>1</difficult>")])
    (tmp_path / "JPEGImages/a.jpg").unlink()
    (tmp_path / "Annotations/b.xml").unlink()
    report, _ = check_voc(tmp_path)
    counts = report.counts
    assert counts["image-missing"] == counts["file-unreadable"] == 1 and counts["difficult"] == 2
    report, _ = check_voc(tmp_path, "val")
    assert report.counts == {"file-unreadable": 1} and "splits there: train" in report.findings[0].value


def test_classes_and_difficult_objects_as_declared(tmp_path):
    add(tmp_path, "a", [("dog", (1, 1, 10, 5), "<difficult>1</difficult>"), ("cat", (1, 1, 9, 9))])
    report, usable = check_voc(tmp_path, classes=("dog", "cat"), difficult_as_crowd=True)
    assert [c["name"] for c in usable["categories"]] == ["dog", "cat"]
    assert [a["iscrowd"] for a in usable["annotations"]] == [1, 0] and report.counts["ignore-region"] == 1
    report, _ = check_voc(tmp_path, classes=("cow", "cat"))
    assert report.counts["class-unknown"] == 1


@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not beside the repository, at ../shared/data/BCCD")
def test_bccd_as_it_is():
    reports = [check_voc(BCCD, split)[0] for split in ("train", "val", "test")]
    assert [report.facts["boxes"] for report in reports] == [2805, 1138, 945]
    assert [dict(report.counts) for report in reports] == [{"box-thin": 1}, {"box-thin": 1}, {}]
    find_shared_images(reports[0], reports[1])
    assert not reports[1].counts["image-in-two-sets"]


def flat(root, one_folder=False, **options):
    """A folder of labelImg's layout: an object an image; returns its entry."""
    images, annotations = (root, root) if one_folder else (root / "images", root / "annotations")
    for stem in "abcdef":
        add(root / "voc", stem, [("dog", (1, 1, 10, 5))])
    for folder in (images, annotations):
        folder.mkdir(exist_ok=True)
    for path in sorted((root / "voc/JPEGImages").iterdir()):
        path.rename(images / path.name)
    for path in sorted((root / "voc/Annotations").iterdir()):
        path.rename(annotations / path.name)
    shutil.rmtree(root / "voc")
    return {"name": "mine", "format": "voc", "images": str(images), "annotations": str(annotations), **options}


def check_entry(entry):
    (declaration,) = parse_declared([entry]).values()
    report, usable, _ = check_declaration(declaration, pixels=True)
    return report, usable


@pytest.mark.parametrize("one_folder", [True, False])
@pytest.mark.parametrize("by_root", [True, False])
def test_folders_of_labelimg(tmp_path, one_folder, by_root):
    entry = flat(tmp_path, one_folder=one_folder)
    (tmp_path / "images").mkdir(exist_ok=True)
    if one_folder:
        (tmp_path / "images").rmdir()
    if by_root:
        entry = {"name": "mine", "format": "voc", "root": str(tmp_path)}
    report, usable = check_entry(entry)
    assert not report.counts, report.text()
    assert [image["file_name"] for image in usable["images"]] == [f"{stem}.jpg" for stem in "abcdef"]
    assert len(usable["annotations"]) == 6


def test_images_and_xml_in_one_folder_of_the_root(tmp_path):
    flat(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        path.rename(tmp_path / "images" / path.name)
    (tmp_path / "annotations").rmdir()
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    report, usable = check_entry({"name": "mine", "format": "voc", "root": str(tmp_path)})
    assert report.counts == {"file-junk": 2} and len(usable["images"]) == 6, report.text()


def test_the_filename_counts_where_the_own_name_has_no_image(tmp_path):
    entry = flat(tmp_path)
    folder = tmp_path / "annotations"

    def change(old, new, filename):
        text = (folder / f"{old}.xml").read_text()
        (folder / f"{old}.xml").unlink()
        (folder / f"{new}.xml").write_text(text.replace("<size>", f"<filename>{filename}</filename><size>"))

    change("a", "0005", "a.jpg")
    change("b", "0006", "b.png")  # the image was converted since
    change("c", "0007", "c")
    change("d", "0008", "..\\..\\upload\\d.jpg")
    report, usable = check_entry(entry)
    assert report.counts == {"image-by-filename": 3, "image-elsewhere": 1}, report.text()
    assert sorted(image["file_name"] for image in usable["images"]) == [f"{stem}.jpg" for stem in "abcdef"]
    change("e", "e", "f.jpg")
    report, _ = check_entry(entry)
    assert report.counts["image-of-other-name"] == 1 and report.number("error") == 0
    change("f", "0009", "gone.jpg")
    report, _ = check_entry(entry)
    assert report.counts["image-missing"] == 1 and "gone.jpg" in report.text()


def test_xml_that_is_named_by_the_whole_name_of_its_image(tmp_path):
    entry = flat(tmp_path)
    (tmp_path / "annotations/a.xml").rename(tmp_path / "annotations/a.jpg.xml")
    report, usable = check_entry(entry)
    assert not report.counts and "a.jpg" in [image["file_name"] for image in usable["images"]]
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/z.jpg")
    report, _ = check_entry(entry)
    assert report.counts == {"image-missing": 1, "image-unlabelled": 1} and "file_name = a.jpg" in report.text()


@pytest.mark.parametrize("filename", ["a%20b.jpg", "http://host/data/a%20b.jpg?x=1", "/data/local-files/?d=up/a b.jpg"])
def test_an_image_under_another_name_is_not_called_unlabelled(tmp_path, filename):
    entry = flat(tmp_path)
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/a b.jpg")
    xml = tmp_path / "annotations/a.xml"
    xml.write_text(xml.read_text().replace("<size>", f"<filename>{filename}</filename><size>"))
    report, usable = check_entry(entry)
    assert report.counts == {"image-elsewhere": 1} and len(usable["images"]) == 6, report.text()


def test_what_lies_beside_is_counted(tmp_path):
    entry = flat(tmp_path)
    for name in (
        "images/._a.jpg",
        "images/Thumbs.db",
        "annotations/._a.xml",
        "annotations/.DS_Store",
        "images/~$a.jpg",
    ):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "annotations/classes.txt").write_text("dog")
    (tmp_path / "annotations/f.xml").unlink()
    report, usable = check_entry(entry)
    assert report.counts == {"file-junk": 5, "image-unlabelled": 1}, report.text()
    assert len(usable["images"]) == 5
    for path in (tmp_path / "annotations").glob("*.xml"):
        path.unlink()
    report, _ = check_entry(entry)
    assert report.counts["file-format"] == 1 and "no XML file in it" in report.text()


def test_named_splits_are_those_of_a_root(tmp_path):
    entry = flat(tmp_path)
    with pytest.raises(ValueError, match=r"DECLARED\[0\].split must be a share as 0.8: only a root has named splits"):
        check_entry({**entry, "split": "train"})
    report, _ = check_entry({"name": "mine", "format": "voc", "root": str(tmp_path), "split": "train"})
    assert "no split file; splits there: none; a share as 0.8 needs none" in report.text()
