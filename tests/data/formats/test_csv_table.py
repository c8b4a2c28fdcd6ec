import pytest
from data_forms import check_entry, csv_text, expect, write_images

ROW = ("a.png", 64, 48, "cat", 3, 4, 23, 14)


def check(folder, text, **entry):
    """An image, and a table."""
    images = write_images(folder / "images", ["a.png", "sub/d.png"])
    path = folder / "boxes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check_entry({"format": "csv", "annotations": str(path), "images": str(images), **entry})


# Each is the same box of a cat, and has no finding.
TABLES = {
    "TensorFlow": "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,64,48,cat,3,4,23,14\n",
    "order": "class,xmax,ymax,xmin,ymin,height,width,filename\ncat,23,14,3,4,48,64,a.png\n",
    "no size": "image_path,x1,y1,x2,y2,label\na.png,3,4,23,14,cat\n",
    "case and spaces": "File Name, Class Name, X Min, Y Min, X Max, Y Max\na.png, cat, 3, 4, 23, 14\n",
    "width and height": "image,label,x,y,w,h\na.png,cat,3,4,20,10\n",
    "bbox": "image_name,label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_width,image_height\n"
    "a.png,cat,3,4,20,10,64,48\n",
    "x, y, width, height": "image,x,y,width,height,category\na.png,3,4,20,10,cat\n",
    "corners": "img,left,top,right,bottom,category_name\na.png,3,4,23,14,cat\n",
    "semicolons": "filename;class;xmin;ymin;xmax;ymax\na.png;cat;3;4;23;14\n",
    "tabs": "filename\tclass\txmin\tymin\txmax\tymax\na.png\tcat\t3\t4\t23\t14\n",
    "bars": "filename|class|xmin|ymin|xmax|ymax\na.png|cat|3|4|23|14\n",
    "quotes": '"filename","class","xmin","ymin","xmax","ymax"\r\n"a.png","cat","3","4","23","14"\r\n',
    "floats": "filename,class,xmin,ymin,xmax,ymax\na.png,cat,3.0,4.0,23.0,14.0\n",
    "more columns": "id,filename,source,class,xmin,ymin,xmax,ymax,score\n7,a.png,x,cat,3,4,23,14,1\n",
    "Excel's mark": "sep=;\r\nfilename;class;xmin;ymin;xmax;ymax\r\na.png;cat;3;4;23;14\r\n",
    "RetinaNet": "a.png,3,4,23,14,cat\n",
    "RetinaNet, a negative first": "sub/d.png,,,,,\na.png,3,4,23,14,cat\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_columns(tmp_path, table):
    report, usable = check(tmp_path, TABLES[table])
    expect(report, {})
    (annotation,) = usable["annotations"]
    assert annotation["bbox"] == [3, 4, 20, 10]
    assert usable["categories"] == [{"id": 1, "name": "cat"}]
    file = next(i for i in usable["images"] if i["id"] == annotation["image_id"])
    assert (file["file_name"], file["width"], file["height"]) == ("a.png", 64, 48)


NONE = {"no-boxes": 1}
ROWS = {
    "reversed": ((*ROW[:4], 23, 4, 3, 14), {"box-negative": 1, **NONE, "class-without-boxes": 1}, "line 2"),
    "no width": ((*ROW[:4], 3, 4, 3, 14), {"box-empty": 1, **NONE, "class-without-boxes": 1}, ""),
    "outside": ((*ROW[:4], 70, 4, 90, 14), {"box-outside": 1, **NONE, "class-without-boxes": 1}, "in 64x48"),
    "reaches outside": ((*ROW[:4], 3, 4, 90, 14), {"box-clipped": 1}, ""),
    "NaN": ((*ROW[:4], "nan", 4, 23, 14), {"box-not-finite": 1, **NONE}, "nan 4 23 14"),
    "infinity": ((*ROW[:4], "inf", 4, 23, 14), {"box-not-finite": 1, **NONE}, ""),
    "words": ((*ROW[:4], "x", 4, 23, 14), {"box-malformed": 1, **NONE}, "x 4 23 14"),
    "a number is absent": ((*ROW[:4], "", 4, 23, 14), {"box-malformed": 1, **NONE}, "(empty) 4 23 14"),
    "no class": ((*ROW[:3], "", 3, 4, 23, 14), {"object-malformed": 1, **NONE}, "an object without a class"),
    "a class alone": ((*ROW[:4], "", "", "", ""), {"box-malformed": 1, **NONE}, ""),
    "too few fields": (ROW[:6], {"record-malformed": 1}, "6 fields, 8 are needed"),
    "wrong size": (("a.png", 640, 480, *ROW[3:]), {"image-size": 1}, "640x480 stated, 64x48 read"),
    "no size": (("a.png", "", "", *ROW[3:]), {"image-size-absent": 1}, ""),
    "a missing image": (("c.png", *ROW[1:]), {"image-missing": 1}, "c.png"),
    "no image": (("", *ROW[1:]), {"image-name": 1, "class-without-boxes": 1}, ""),
    "another folder": (("C:\\photos\\d.png", *ROW[1:]), {"image-elsewhere": 1}, "sub/d.png"),
    "outside the root": (("../boxes.csv", *ROW[1:]), {"image-outside": 1}, "../boxes.csv"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_wrong(tmp_path, case):
    row, counts, words = ROWS[case]
    report, _ = check(tmp_path, csv_text([row]))
    assert {k: v for k, v in report.counts.items() if k in counts} == counts, report.text()
    assert set(report.counts) - set(counts) <= {"image-without-boxes", "no-boxes"}, report.text()
    assert words in report.text()


def test_rows_against_each_other(tmp_path):
    report, usable = check(tmp_path, csv_text([ROW, ROW, ("a.png", 60, 48, "dog", 1, 2, 3, 4)]))
    expect(report, {"box-twice": 1, "image-size": 1}, "line 4: width, height = 60x48 stated, 64x48 in a row before")
    assert len(usable["images"]) == 1 and len(usable["annotations"]) == 3


def test_classes(tmp_path):
    text = csv_text([ROW, ("a.png", 64, 48, "ape", 1, 2, 3, 4)])
    assert [c["name"] for c in check(tmp_path, text)[1]["categories"]] == ["ape", "cat"]
    report, usable = check(tmp_path, text, classes=["cat", "ape", "dog"])
    assert [a["category_id"] for a in usable["annotations"]] == [1, 2]
    report, _ = check(tmp_path, text, classes=["cat"])
    expect(report, {"class-unknown": 1}, "ape: not among the classes")


def test_decimal_commas_are_repaired_where_they_separate_nothing(tmp_path):
    report, usable = check(tmp_path, "filename;class;xmin;ymin;xmax;ymax\na.png;cat;3,5;4;23;14,25\n")
    expect(report, {"box-text": 2}, "3,5")
    assert usable["annotations"][0]["bbox"] == [3.5, 4, 19.5, 10.25]
    report, _ = check(tmp_path, 'filename,class,xmin,ymin,xmax,ymax\na.png,cat,"3,5",4,23,14\n')
    assert report.counts["box-malformed"] == 1


def test_difficult(tmp_path):
    text = "filename,class,xmin,ymin,xmax,ymax,difficult\na.png,cat,3,4,23,14,True\na.png,cat,1,1,9,9,0\n"
    report, _ = check(tmp_path, text)
    expect(report, {"difficult": 1})
    report, usable = check(tmp_path, text, difficult_as_crowd=True)
    assert [a["iscrowd"] for a in usable["annotations"]] == [1, 0]


GOOD = csv_text([ROW])
FILES = {
    "empty": ("", {"file-unreadable": 1}, "it is empty"),
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), {"file-bom": 1}, ""),
    "UTF-16": (GOOD.encode("utf-16"), {"file-encoding": 1}, ""),
    "Latin-1": (GOOD.replace("cat", "kätzchen").encode("latin-1"), {"file-unreadable": 1}, "save it as such"),
    "no class": (GOOD.replace("class", "kind"), {"file-format": 1}, "no column class; got 'filename,width,height,kind"),
    "two spellings": (GOOD.replace("width", "Class"), {"file-format": 1}, "two columns 'Class': rename the one that"),
    "two classes": (
        GOOD.replace("width", "class"),
        {"file-format": 1},
        "two columns 'class': rename the one that does",
    ),
    "no xmax": (GOOD.replace("xmax", "q"), {"file-format": 1}, "no column xmax; got"),
    "separators": (",,,\n;;\n", {"file-format": 1}, "no table; got"),
    "a text": ("hello\nworld\n", {"file-format": 1}, "no table; got 'hello', wanted a header with filename, class"),
    "YOLO": ("0 0.5 0.5 0.1 0.1\n", {"file-format": 1}, "path,x1,y1,x2,y2,class"),
    "a header alone": (GOOD.splitlines()[0], {"no-images": 1}, ""),
    "truncated": (GOOD.encode()[:-9], {"record-malformed": 1}, "line 2"),
    "a field beyond measure": (GOOD + "x" * 200_000, {"file-format": 1}, "line 3"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_wrong(tmp_path, case):
    text, counts, words = FILES[case]
    report, usable = check(tmp_path, text)
    assert {k: v for k, v in report.counts.items() if not k.startswith("no-") or k in counts} == counts, report.text()
    assert words in report.text()
    assert len(usable["annotations"]) == (0 if report.refused(strict=False) else 1)
