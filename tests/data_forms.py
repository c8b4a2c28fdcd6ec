"""The same six images in every format that datasets are read in."""

import csv
import io
import json
from xml.sax.saxutils import quoteattr

import numpy as np
import yaml
from PIL import Image

from aqdet.data.check.cache import check_declaration
from aqdet.data.declared import parse_declared

CLASSES = ("cat", "dog")
# name: size as the reader sees it, objects (class, x, y, width, height). One turned by EXIF, one in a folder, one
# without objects, and names with a space and beyond ASCII.
IMAGES = {
    "a.png": ((64, 48), [("cat", 3, 4, 20, 10)]),
    "b c.png": ((64, 48), [("dog", 0, 0, 64, 48), ("cat", 10, 12, 8, 30)]),
    "über.png": ((32, 48), [("dog", 5, 5, 16, 24)]),
    "sub/d.png": ((64, 48), [("cat", 40, 8, 24, 40), ("cat", 1, 2, 3, 4)]),
    "turned.jpg": ((48, 64), [("dog", 8, 16, 24, 32)]),
    "empty.png": ((64, 48), []),
}
FORMS = ("coco", "voc", "yolo", "labelme", "via", "via_project", "via_csv", "cvat", "csv", "retinanet", "darknet")


def write_images(folder, names=tuple(IMAGES)):
    """Images of noise."""
    rng = np.random.default_rng(0)
    for name in IMAGES:
        (width, height), _ = IMAGES[name]
        options = {}
        if name.startswith("turned"):
            width, height = height, width
            exif = Image.Exif()
            exif[0x0112] = 6
            options = {"exif": exif}
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in names:
            Image.fromarray(pixels).save(path, **options)
    return folder


def labelme(name, size, shapes, **fields):
    """The text of a labelme JSON; shapes are (label, shape_type, points[, more fields])."""
    listed = []
    for shape in shapes:
        if isinstance(shape, tuple):
            label, kind, points, *more = shape
            shape = {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
            shape.update(*more)
        listed.append(shape)
    content = {"version": "5.4.1", "flags": {}, "shapes": listed, "imagePath": name, "imageData": None}
    return json.dumps({**content, "imageHeight": size[1], "imageWidth": size[0], **fields})


def via_entries(images=None, key="class"):
    """VIA's entries of images: name -> list of (class, shape_attributes)."""
    if images is None:
        images = {
            name: [(c, {"name": "rect", "x": x, "y": y, "width": w, "height": h}) for c, x, y, w, h in objects]
            for name, (_, objects) in IMAGES.items()
        }
    return {
        f"{name}1234": {
            "filename": name,
            "size": 1234,
            "regions": [
                {"shape_attributes": shape, "region_attributes": {} if label is None else {key: label}}
                for label, shape in regions
            ],
            "file_attributes": {},
        }
        for name, regions in images.items()
    }


def cvat(images, labels=CLASSES):
    """The text of CVAT's XML; images are (name, size, [XML of shapes])."""
    names = "".join(f"<label><name>{label}</name><attributes/></label>" for label in labels)
    items = "".join(
        f'<image id="{index}" name={quoteattr(name)} width="{size[0]}" height="{size[1]}">{"".join(shapes)}</image>'
        for index, (name, size, shapes) in enumerate(images)
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>'
        f"<meta><task><labels>{names}</labels></task></meta>{items}</annotations>"
    )


def cvat_box(label, x, y, width, height, more='occluded="0"'):
    corners = f'xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}"'
    return f'<box label="{label}" {corners} source="manual" {more} z_order="0"></box>'


def csv_text(rows, header=True, separator=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    if header:
        writer.writerow("filename width height class xmin ymin xmax ymax".split())
    writer.writerows(rows)
    return text.getvalue()


def write_form(folder, form):
    """Writes the six images and their annotations in a format; returns an entry of DATASETS.DECLARED."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"name": f"mine_{form}", **_WRITERS[form](folder)}


def _coco(folder):
    images, annotations = [], []
    for name, (size, objects) in IMAGES.items():
        images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
        for label, *box in objects:
            record = {"id": len(annotations) + 1, "image_id": len(images), "category_id": CLASSES.index(label) + 1}
            annotations.append({**record, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return {"json": str(folder / "coco.json"), "image_root": str(write_images(folder / "images"))}


def _voc(folder):
    write_images(folder / "JPEGImages")
    for name, (size, objects) in IMAGES.items():
        items = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for label, x, y, w, h in objects
        )
        path = (folder / "Annotations" / name).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{items}</annotation>"
        )
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(name.rpartition(".")[0] for name in IMAGES))
    return {"format": "voc", "root": str(folder), "split": "train"}


def yolo_lines(size, objects):
    """The text of a YOLO label file."""
    width, height = size
    return "\n".join(
        f"{CLASSES.index(c)} {(x + w / 2) / width!r} {(y + h / 2) / height!r} {w / width!r} {h / height!r}"
        for c, x, y, w, h in objects
    )


def _write_yolo_labels(folder):
    for name, (size, objects) in IMAGES.items():
        path = (folder / name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yolo_lines(size, objects))


def _yolo(folder):
    write_images(folder / "images/train")
    _write_yolo_labels(folder / "labels/train")
    (folder / "train.txt").write_text("\n".join(f"images/train/{name}" for name in IMAGES))
    (folder / "data.yaml").write_text(yaml.safe_dump({"train": "train.txt", "names": list(CLASSES)}))
    return {"format": "yolo", "yaml": str(folder / "data.yaml"), "split": "train"}


def _darknet(folder):
    write_images(folder / "obj")
    _write_yolo_labels(folder / "obj")
    (folder / "train.txt").write_text("\n".join(f"{folder.name}/obj/{name}" for name in IMAGES))
    (folder / "obj.names").write_text("\n".join(CLASSES) + "\n")
    data = (
        f"classes = {len(CLASSES)}\ntrain  = {folder.name}/train.txt\nnames = {folder.name}/obj.names\nbackup = backup/"
    )
    (folder / "obj.data").write_text(data)
    return {"format": "darknet", "data": str(folder / "obj.data"), "split": "train"}


def _labelme(folder):
    write_images(folder)
    for name, (size, objects) in IMAGES.items():
        shapes = [(label, "rectangle", [[x, y], [x + w, y + h]]) for label, x, y, w, h in objects]
        (folder / name).with_suffix(".json").write_text(labelme(name.rpartition("/")[2], size, shapes))
    return {"format": "labelme", "images": str(folder)}


def _exported(folder, form, file, text):
    (folder / file).write_text(text)
    images = str(write_images(folder / "images"))
    return {"format": form, "annotations": str(folder / file), "images": images}


def _via_project(folder):
    options = {"type": "dropdown", "options": dict.fromkeys(CLASSES, "")}
    project = {
        "_via_settings": {},
        "_via_img_metadata": via_entries(),
        "_via_attributes": {"region": {"class": options}},
    }
    return _exported(folder, "via", "via_project.json", json.dumps(project))


def _via_csv(folder):
    rows = []
    for entry in via_entries().values():
        regions = entry["regions"] or [{"shape_attributes": {}, "region_attributes": {}}]
        for index, region in enumerate(regions):
            pair = (json.dumps(region["shape_attributes"]), json.dumps(region["region_attributes"]))
            rows.append([entry["filename"], 1234, "{}", len(entry["regions"]), index, *pair])
    columns = "filename file_size file_attributes region_count region_id region_shape_attributes region_attributes"
    text = io.StringIO()
    csv.writer(text).writerows([columns.split(), *rows])
    return _exported(folder, "via", "via.csv", text.getvalue())


def _cvat(folder):
    images = [(name, size, [cvat_box(*item) for item in objects]) for name, (size, objects) in IMAGES.items()]
    return _exported(folder, "cvat", "annotations.xml", cvat(images))


def _csv(folder):
    rows = [
        (name, *size, *((c, x, y, x + w, y + h) if c else ("", "", "", "", "")))
        for name, (size, objects) in IMAGES.items()
        for c, x, y, w, h in objects or [("", 0, 0, 0, 0)]
    ]
    return _exported(folder, "csv", "boxes.csv", csv_text(rows))


def _retinanet(folder):
    rows = [
        (f"images/{name}", *((x, y, x + w, y + h, c) if c else ("", "", "", "", "")))
        for name, (_, objects) in IMAGES.items()
        for c, x, y, w, h in objects or [("", 0, 0, 0, 0)]
    ]
    entry = _exported(folder, "csv", "annotations.csv", csv_text(rows, header=False))
    return {key: value for key, value in entry.items() if key != "images"}


_WRITERS = {
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "darknet": _darknet,
    "labelme": _labelme,
    "via": lambda folder: _exported(folder, "via", "via.json", json.dumps(via_entries())),
    "via_project": _via_project,
    "via_csv": _via_csv,
    "cvat": _cvat,
    "csv": _csv,
    "retinanet": _retinanet,
}


def check_entry(entry, pixels=True):
    """The report on a dataset that is declared so, and its records."""
    (declaration,) = parse_declared([{"name": "mine", **entry}]).values()
    report, usable, _ = check_declaration(declaration, pixels=pixels)
    return report, usable


def expect(report, counts, words=""):
    """The counts of findings but for what the tests' own images give, and words that are in one of them."""
    found = {
        kind: count for kind, count in report.counts.items() if kind not in ("image-without-boxes", "image-turned")
    }
    assert found == counts, report.text()
    assert words in report.text(), report.text()
