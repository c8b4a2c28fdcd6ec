"""``python -m aqdet.runtime``: files in, drawn files and records out, and what it refuses."""

import csv
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from helpers import process_environment
from pycocotools.coco import COCO
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import Detections, Detector, cli
from aqdet.runtime.draw import draw
from aqdet.runtime.golden import write_golden

NUM_FRAMES = 6
CLASSES = ("disc", "cross", "ring")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "twin", make_twin(test_score_thresh=0.05))


@pytest.fixture
def photos(tmp_path):
    """A folder with images, one of them in a subfolder, a video, and a text file."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    cv2.imwrite(str(root / "one.png"), make_photo())
    cv2.imwrite(str(root / "more" / "000017.JPG"), make_photo(seed=1))
    (root / "notes.txt").write_text("hello")
    writer = cv2.VideoWriter(str(root / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    assert writer.isOpened()
    for index in range(NUM_FRAMES):
        writer.write(make_photo(64, 96, seed=index))
    writer.release()
    return root


@pytest.fixture
def command(folder, capsys):
    def run(*arguments, detector=folder):
        status = 0
        try:
            cli.main([str(a) for a in (detector, *arguments)])
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def written(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_one_image(command, folder, photos, tmp_path):
    status, out, _ = command(photos / "one.png", "--output", tmp_path / "new" / "out.png", "--threshold", 0.08)
    assert status == 0 and f"written to {tmp_path / 'new' / 'out.png'}" in out
    image = make_photo()
    found = Detector(folder)(image)
    found = found[found.scores >= 0.08]
    assert len(found) >= 3 and f"{len(found)} objects" in out
    drawn = cv2.imread(str(tmp_path / "new" / "out.png"))
    np.testing.assert_array_equal(drawn, draw(image, found, CLASSES))
    assert written(tmp_path / "new") == ["out.png"]


def test_folders_keep_their_structure_and_videos_their_frames(command, photos, tmp_path):
    status, out, _ = command(photos, "--output", tmp_path / "out", "--threshold", 0.08)
    assert status == 0 and "3 of 3 inputs, 8 images" in out and "1 files that are neither image nor video" in out
    assert written(tmp_path / "out") == ["film.mp4", "more/000017.JPG", "one.png"]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    frames = 0
    while (frame := capture.read())[0]:
        assert frame[1].shape == (64, 96, 3)
        frames += 1
    assert frames == NUM_FRAMES and capture.get(cv2.CAP_PROP_FPS) == 10


def test_coco_results_have_all_that_the_detector_finds(command, folder, photos, tmp_path):
    status, _, _ = command(photos, "--json", tmp_path / "found.json")
    assert status == 0 and written(tmp_path) == sorted(["found.json", *(f"photos/{n}" for n in written(photos))])
    results = json.loads((tmp_path / "found.json").read_text())
    expected = Detector(folder)(photos / "more" / "000017.JPG")
    mine = [entry for entry in results if entry["image_id"] == 17]
    assert len(mine) == len(expected) > 3
    x1, y1, x2, y2 = expected.boxes[0].tolist()
    assert mine[0]["bbox"] == [x1, y1, x2 - x1, y2 - y1] and mine[0]["score"] == float(expected.scores[0])
    assert [entry["category_id"] for entry in mine] == (expected.classes + 1).tolist()
    ids = list(dict.fromkeys(entry["image_id"] for entry in results))
    film = [f"{photos / 'film.avi'}#{frame}" for frame in range(NUM_FRAMES)]
    assert ids == [*film, 17, str(photos / "one.png")]


def test_images_of_one_number_have_ids_of_their_own(command, photos, tmp_path):
    cv2.imwrite(str(photos / "17.png"), make_photo(seed=2))
    cv2.imwrite(str(photos / "18.png"), make_photo(seed=3))
    assert command(photos, photos / "one.png", "--json", tmp_path / "found.json")[0] == 0
    ids = {entry["image_id"] for entry in json.loads((tmp_path / "found.json").read_text())}
    expected = {18, *(str(photos / name) for name in ("17.png", "more/000017.JPG", "one.png"))}
    assert {number for number in ids if "#" not in str(number)} == expected


def test_image_ids_of_an_annotation_file(command, photos, tmp_path):
    images = [{"id": 4, "file_name": "one.png"}, {"id": 9, "file_name": "more/000017.JPG"}, {"id": 1, "file_name": "x"}]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": [], "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    given = (photos / "one.png", photos / "more", "--json", tmp_path / "found.json", "--threshold", 0.08)
    assert command(*given, "--annotations", tmp_path / "truth.json")[0] == 0
    results = json.loads((tmp_path / "found.json").read_text())
    assert {entry["image_id"] for entry in results} == {4, 9} and min(entry["score"] for entry in results) >= 0.08
    assert len(COCO(str(tmp_path / "truth.json")).loadRes(results).anns) == len(results)
    content["images"] = images[1:]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    status, _, err = command(*given, "--annotations", tmp_path / "truth.json")
    assert status == 2 and f"truth.json names no image {photos / 'one.png'}" in err.splitlines()[-1]
    content["images"] = [{"id": 4, "file_name": "one.png"}]
    (photos / "more" / "one.png").write_bytes((photos / "one.png").read_bytes())
    (photos / "more" / "000017.JPG").unlink()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    _, _, err = command(*given, "--annotations", tmp_path / "truth.json")
    assert f"'one.png' is the name of both {photos / 'one.png'} and {photos / 'more/one.png'}" in err
    (tmp_path / "truth.json").write_text("[]")
    assert "not an annotation file in COCO's format" in command(*given, "--annotations", tmp_path / "truth.json")[2]


def test_a_table(command, folder, photos, tmp_path):
    given = (photos / "one.png", photos / "film.avi", "--csv", tmp_path / "found.csv", "--threshold", 0.08)
    assert command(*given, "--max-detections", 2, "--batch", 4)[0] == 0
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    image = [row for row in rows if not row["frame"]]
    expected = Detector(folder, max_detections=2)(photos / "one.png")
    expected = expected[expected.scores >= 0.08]
    assert len(image) == len(expected) == 2
    for row, box, score, cls in zip(image, expected.boxes, expected.scores, expected.classes, strict=True):
        assert (row["filename"], row["width"], row["height"]) == (str(photos / "one.png"), "120", "90")
        assert row["class"] == CLASSES[cls] and float(row["score"]) == pytest.approx(score, abs=1e-5)
        edges = [float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")]
        np.testing.assert_allclose(edges, box, atol=0.006)
    assert {row["frame"] for row in rows if row["filename"].endswith("film.avi")} <= {str(n) for n in range(NUM_FRAMES)}


def test_a_threshold_below_that_of_the_export(command, photos, tmp_path):
    numbers, many = [], ("--max-detections", 5000)
    for threshold in (0.0, 0.05):
        assert command(photos / "one.png", "--json", tmp_path / "f.json", "--threshold", threshold, *many)[0] == 0
        numbers.append(len(json.loads((tmp_path / "f.json").read_text())))
    assert numbers[0] > numbers[1] > 3


def test_no_detection_is_an_empty_list(command, photos, tmp_path):
    files = ("--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv")
    status, out, _ = command(photos / "one.png", "--threshold", 1, *files)
    assert status == 0 and "nothing was found: the highest score was 0." in out
    assert json.loads((tmp_path / "f.json").read_text()) == []
    assert (tmp_path / "f.csv").read_text().count("\n") == 1


def test_unreadable_files_are_named_and_the_rest_is_done(command, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not a jpeg")
    (photos / "broken.mp4").write_bytes(b"not a video")
    status, out, err = command(photos, "--output", tmp_path / "out")
    assert status == 1 and "3 of 5 inputs" in out
    last = err.strip().splitlines()[-3:]
    assert last[0] == "error: 2 inputs could not be read:"
    assert "broken.jpg: not an image" in last[1] and "broken.mp4: not a video" in last[2]
    assert written(tmp_path / "out") == ["film.mp4", "more/000017.JPG", "one.png"]


def test_self_test(command, folder, tmp_path):
    status, _, err = command("--self-test")
    assert status == 2 and err.count("\n") == 1 and "has no golden vectors" in err
    tested = shutil.copytree(folder, tmp_path / "tested")
    write_golden(tested, make_photo())
    status, out, _ = command("--self-test", detector=tested)
    assert status == 0 and out.splitlines()[-1] == "7 of 7 checks passed"
    with np.load(tested / "golden.npz") as file:
        content = {**file, "scores": file["scores"] + np.float32(0.1)}
    np.savez(tested / "golden.npz", **content)
    status, out, _ = command("--self-test", detector=tested)
    assert status == 1 and "FAILED detections" in out and out.splitlines()[-1] == "6 of 7 checks passed"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["photos/one.png", "--output", "photos/one.png"], "would replace the input"),
        (["photos/one.png", "--output", "out.pdf"], "'out.pdf': pictures are written as"),
        (["photos/one.png", "--output", "out.mp4"], "is an image"),
        (["nowhere.png", "--output", "out.png"], "input 'nowhere.png': no such file"),
        (["photos/one.png", "--output", "photos/notes.txt/out.png"], "'photos/notes.txt' is a file, not a folder"),
        (["photos/one.png", "--output", "out.png", "--threshold", "7"], "--threshold: must be a number from 0 to 1"),
        (["photos/one.png", "--output", "out.png", "--nms-threshold", "nan"], "--nms-threshold: must be a number"),
        (["photos/one.png", "--output", "out.png", "--threads", "0"], "--threads: must be a whole number"),
        (["photos/one.png", "--output", "out.png", "--batch", "0"], "--batch: must be a whole number"),
        (["photos/one.png", "--output", "out.png", "--max-detections", "0"], "--max-detections: must be"),
        (["photos/one.png", "--output", "out.png", "--provider", "Quick"], "provider must be one of"),
        (["photos/one.png", "--json", "photos"], "--json: 'photos' is a folder"),
        (["photos/one.png", "--csv", "c.csv", "--annotations", "photos/notes.txt"], "which is not given"),
        (["photos/one.png", "--json", "a", "--csv", "./a"], "--json and --csv are both ./a"),
        (["photos/one.png", "--json", "photos/one.png"], "--json photos/one.png would replace a file that is read"),
        (["photos/one.png", "--json", "x.png", "--output", "x.png"], "--json and --output are both x.png"),
        (["photos/one.png", "--size", "100000000"], "--size: must be a whole number"),
        (["photos/one.png", "--output", "out.png", "--threads", "100000000"], "--threads: must be a whole number"),
        (["photos", "--csv", "photos/film.avi"], "--csv photos/film.avi would replace a file that is read"),
        (["photos/one.png", "--json", "t.json", "--annotations", "t.json"], "argument --annotations: 't.json' does"),
        (["photos/one.png"], "nothing would come out"),
        (["--output", "out"], "INPUT: name an image"),
        (["photos/one.png", "--show"], "--show: there is no display"),
    ],
)
def test_refusals(command, photos, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    before = written(tmp_path)
    status, out, err = command(*arguments)
    assert status == 2 and words in err.strip().splitlines()[-1] and out == ""
    assert written(tmp_path) == before


def test_a_damaged_folder_is_one_line(command, folder, photos, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[10] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    status, out, err = command(photos, "--output", tmp_path / "out", detector=damaged)
    assert status == 2 and out == "" and err.count("\n") == 1 and "model.safetensors: damaged" in err


def test_draw_leaves_its_input_alone():
    image = np.zeros((50, 60, 3), np.uint8)
    boxes = np.array([[5.4, 6.4, 30.2, 40.1], [-3, -3, 70, 70], [10, 10, 10, 9.9]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8, 0.7], np.float32), np.array([1, 0, 2]))
    drawn = draw(image, found, ("a", "b", "ü"))
    assert not image.any() and drawn.shape == image.shape and drawn.dtype == np.uint8
    assert drawn[39:41, 5:31].any() and not drawn[45:48, 33:57].any()
    # Colours are in BGR order: the first class is red.
    alone = draw(image, Detections(boxes[:1], np.ones(1, np.float32), np.array([0])), ("a",))
    assert alone[40, 20, 2] > alone[40, 20, 0]


def test_as_a_module_without_torch_and_opencv(folder, photos, tmp_path):
    (photos / "film.avi").unlink()
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'detectron2', 'torchvision', 'cv2', 'pycocotools', 'onnx'): sys.modules[name] = None\n"
        "runpy.run_module('aqdet.runtime', run_name='__main__')"
    )
    arguments = [folder, photos, "--output", tmp_path / "out", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=process_environment()
    )
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "out") == ["more/000017.JPG", "one.png"]
    assert "\r" not in done.stderr  # no bar where the output is no terminal


def test_the_exported_detector_is_not_replaced(command, photos, folder):
    before = (folder / "detector.json").read_bytes()
    status, _, err = command(photos / "one.png", "--csv", folder / "detector.json")
    assert status == 2 and "would replace a file that is read" in err
    assert (folder / "detector.json").read_bytes() == before
