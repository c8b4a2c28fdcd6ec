"""The demo on files written here, with a detector whose answers are known, and once with a real one."""

import sys

import cv2
import demo as tool
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, Instances
from helpers import CLASSIFIER, QUANT, calibrated, make_batch, make_cfg, make_model
from PIL import Image
from tiny_data import write_dataset

from aqdet.config import load_config
from aqdet.evaluation import demo


def write_video(path, num_frames=5, size=64):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (size, size))
    for index in range(num_frames):
        writer.write(np.full((size, size, 3), 40 * index, np.uint8))
    writer.release()


def frames_of(path):
    video, count = cv2.VideoCapture(str(path)), 0
    while video.read()[0]:
        count += 1
    return count


@pytest.fixture
def inputs(tmp_path):
    """A folder with images of several kinds, a video, and files that are damaged or no pictures."""
    folder = tmp_path / "in"
    (folder / "deep er").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.bmp")
    Image.fromarray(pixels).save(folder / "deep er" / "ü.png")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:400])
    (folder / "notes.txt").write_text("not for the demo")
    write_video(folder / "v.avi.mp4")
    (folder / "no.mov").write_text("no video")
    return folder


class Known:
    """Finds one object in everything: class 0, with a score of 0.75."""

    def __call__(self, image):
        found = Instances(image.shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[8.0, 8, 40, 48], [1, 1, 9, 9]]))
        found.scores, found.pred_classes = torch.tensor([0.75, 0.3]), torch.tensor([0, 1])
        return {"instances": found}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder of a small detector with and without ranges."""
    folder = tmp_path_factory.mktemp("weights")
    model = make_model(*QUANT)
    torch.save({"model": model.state_dict()}, folder / "raw.pth")
    torch.save({"model": calibrated(model, make_batch()).state_dict()}, folder / "x.pth")
    return folder


@pytest.fixture
def detector(tmp_path):
    """Folder with the config of the detector and the data that it names."""
    entry = write_dataset(tmp_path / "data", f"demo_of_{tmp_path.name}")
    names = ("DATASETS.DECLARED", str([entry]), "DATASETS.TEST", str((entry["name"],)), "INPUT.MIN_SIZE_TEST", "64")
    (tmp_path / "x.yaml").write_text(make_cfg(*QUANT, *names).dump())
    return tmp_path


@pytest.fixture
def command(detector, weights, monkeypatch, capsys):
    """Runs the tool; its exit code or message, and what it printed."""
    monkeypatch.chdir(detector)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(tool.logging, "basicConfig", lambda **kwargs: None)

    def run(*arguments, name="x.pth"):
        opts = ["--opts", "MODEL.WEIGHTS", name and str(weights / name)]
        monkeypatch.setattr(sys, "argv", ["demo.py", "--config-file", "x.yaml", *map(str, arguments), *opts])
        try:
            tool.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_a_folder_with_everything(inputs, command, detector, monkeypatch):
    monkeypatch.setattr(demo.Predictor, "__call__", Known().__call__)
    code, printed = command("--input", inputs, "--output", "out")
    passed_over = "1 files that are neither image nor video are passed over"
    assert printed == f"{passed_over}\n8 detections in 3 images and 1 videos (5 frames) to out\n"
    first, *lines = code.split("\n")
    assert first == "2 inputs could not be read:"
    assert [line.split(":")[0] for line in lines] == [f"  {inputs / 'cut.jpg'}", f"  {inputs / 'no.mov'}"]
    written = sorted(str(p.relative_to(detector / "out")) for p in (detector / "out").rglob("*.*"))
    assert written == ["a.jpg", "deep er/ü.png", "grey.bmp", "v.avi.mp4"]
    assert frames_of(detector / "out" / "v.avi.mp4") == 5
    before, after = (np.asarray(Image.open(x / "deep er" / "ü.png")).astype(int) for x in (inputs, detector / "out"))
    assert after.shape == before.shape
    # The box with enough score is drawn, and away from it and its label nothing is.
    assert abs(after - before)[20:44, 7:10].max() > 20 and abs(after - before)[52:, 44:].max() == 0


def test_a_real_detector_on_one_image(inputs, command, detector, weights):
    code, printed = command("--input", inputs / "a.jpg", "--output", "one.png", "--confidence-threshold", "0.0001")
    assert code == 0 and " in 1 images and 0 videos" in printed
    assert Image.open(detector / "one.png").size == (64, 64)
    expected = int(printed.split()[0])
    made = demo.Demo(load_config("x.yaml", ["MODEL.WEIGHTS", str(weights / "x.pth")]))
    (found,) = made.detect([read_image(str(inputs / "a.jpg"), format="BGR")])
    assert int((found.scores >= 0.0001).sum()) == expected


def test_the_number_of_classes_is_taken_from_the_test_set(inputs, command, detector):
    text = (detector / "x.yaml").read_text()
    (detector / "x.yaml").write_text(text.replace("NUM_CLASSES: 3", "NUM_CLASSES: 0"))
    code, printed = command("--input", inputs / "a.jpg", "--output", "one.png")
    assert code == 0 and " in 1 images" in printed


def test_a_classifier_has_no_boxes_to_draw(inputs, command, detector):
    (detector / "x.yaml").write_text(make_cfg(*CLASSIFIER).dump())
    code, printed = command("--input", inputs / "a.jpg", "--output", "one.png")
    assert code.startswith("error: MODEL.META_ARCHITECTURE is QuantClassifier: the demo draws boxes") and not printed


def test_video_input(inputs, command, detector):
    code, printed = command("--video-input", inputs / "v.avi.mp4", "--output", "v2.mp4")
    assert code == 0 and "1 videos (5 frames) to v2.mp4" in printed and frames_of(detector / "v2.mp4") == 5


def test_class_names_are_optional(inputs, command, detector, caplog):
    for path in (detector / "data").glob("*.json"):
        path.unlink()
    code, _ = command("--input", inputs / "a.jpg", "--output", "out")
    # Another test may have registered the same name; the declaration is checked all the same.
    assert code == 0 and "Class names are not known, their numbers are drawn: DATASETS.DECLARED[0].json" in caplog.text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--input", "none.jpg", "--output", "o"], "error: input 'none.jpg': no such file"),
        (["--input", "in", "--output", "o.png"], "error: --output 'o.png' is one file, for 6 inputs"),
        (["--input", "in/a.jpg", "--output", "o.mp4"], "error: --output 'o.mp4': in/a.jpg is an image"),
        (["--input", "in", "--output", "in"], "would replace the input 'in/a.jpg'"),
        (["--input", "in/a.jpg", "data/../in/deep er/a.jpg", "--output", "o"], "no such file"),
        (["--input", "in/a.jpg", "twin/a.jpg", "--output", "o"], "would both be written to 'a.jpg'"),
        (["--input", "in/a.jpg"], "error: there is no display to open a window on"),
        (["--input", "in/a.jpg", "--output", "o.pdf"], "error: --output 'o.pdf': pictures are written as"),
    ],
)
def test_wrong_input_is_one_line(inputs, command, detector, arguments, words):
    (detector / "twin").mkdir()
    Image.new("RGB", (8, 8)).save(detector / "twin" / "a.jpg")
    code, printed = command(*arguments)
    assert words in code and "\n" not in code and printed == ""


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "MODEL.WEIGHTS is empty"),
        ("none.pth", "none.pth' does not exist"),
        ("raw.pth", "quantizers are not calibrated"),
    ],
)
def test_weights_that_do_not_do(inputs, command, name, words):
    code, _ = command("--input", inputs / "a.jpg", "--output", "o", name=name)
    assert code.startswith("error: ") and words in code and "\n" not in code
