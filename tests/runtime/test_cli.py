"""``python -m aqdet.runtime``: files in, drawn files out, and what it refuses."""

import os
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from helpers import ROOT
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import Detections, Detector, cli
from aqdet.runtime.draw import draw

NUM_FRAMES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "twin", make_twin(test_score_thresh=0.05))


@pytest.fixture
def photos(tmp_path):
    """A folder with images, one of them in a subfolder, a video, and a text file."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    cv2.imwrite(str(root / "one.png"), make_photo())
    cv2.imwrite(str(root / "more" / "two.JPG"), make_photo(seed=1))
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
    found = found.select(found.scores >= 0.08)
    assert len(found) >= 3 and f"{len(found)} objects" in out
    drawn = cv2.imread(str(tmp_path / "new" / "out.png"))
    np.testing.assert_array_equal(drawn, draw(image, found, ("disc", "cross", "ring")))
    assert written(tmp_path / "new") == ["out.png"]


def test_folders_keep_their_structure_and_videos_their_frames(command, photos, tmp_path):
    status, out, _ = command(photos, "--output", tmp_path / "out", "--threshold", 0.08)
    assert status == 0 and "3 of 3 files" in out and "1 files that are neither image nor video" in out
    assert written(tmp_path / "out") == ["film.mp4", "more/two.JPG", "one.png"]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    frames = 0
    while (frame := capture.read())[0]:
        assert frame[1].shape == (64, 96, 3)
        frames += 1
    assert frames == NUM_FRAMES and capture.get(cv2.CAP_PROP_FPS) == 10


def test_unreadable_files_are_named_and_the_rest_is_done(command, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"not a jpeg")
    (photos / "broken.mp4").write_bytes(b"not a video")
    status, out, err = command(photos, "--output", tmp_path / "out")
    assert status == 1 and "3 of 5 files" in out
    last = err.strip().splitlines()[-3:]
    assert last[0] == "error: 2 files could not be read:"
    assert "broken.jpg: not an image" in last[1] and "broken.mp4: not a video" in last[2]
    assert written(tmp_path / "out") == ["film.mp4", "more/two.JPG", "one.png"]


def test_nothing_drawn_is_said(command, photos, tmp_path):
    status, out, _ = command(photos / "one.png", "--output", tmp_path / "out.png", "--threshold", 1)
    assert status == 0 and "nothing was drawn: the highest score was 0." in out
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out.png")), make_photo())


def test_a_video_that_breaks_off_is_noted(command, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "count_frames", lambda job: 100)
    out = command(photos / "film.avi", "--output", tmp_path / "out.mp4")[1]
    assert f"film.avi: read {NUM_FRAMES} of the 100 frames" in out


@pytest.mark.parametrize("name", ["one.png", "film.avi"])
def test_an_interrupt_leaves_nothing_half_done(photos, tmp_path, name):
    calls = []

    def annotate(image):
        calls.append(image)
        if len(calls) == 3 or name == "one.png":
            raise KeyboardInterrupt
        return image

    job = cli.Job(photos / name, tmp_path / f"out{'.mp4' if name == 'film.avi' else '.png'}")
    with pytest.raises(KeyboardInterrupt):
        (cli.draw_video if job.is_video else cli.draw_image)(job, annotate)
    assert written(tmp_path) == sorted(f"photos/{n}" for n in written(photos))


@pytest.mark.parametrize(
    "inputs, output, words",
    [
        (["photos/one.png"], "photos/one.png", "would replace the input"),
        (["photos/one.png"], "link.png", "would replace the input"),
        (["photos"], "photos/out", "lies in the input"),
        (["photos", "other/one.png"], "out", "several inputs would be written to"),
        (["photos/one.png"], "out.mp4", "is an image"),
        (["photos/film.avi"], "out.png", "is a video"),
        (["nowhere.png"], "out.png", "nowhere.png does not exist"),
        (["empty"], "out", "no image or video in"),
        (["photos/one.png", "--threshold", "0.01"], "out.png", "must be from 0.05"),
        (["photos/one.png", "--threads", "0"], "out.png", "threads must be at least 1"),
        (["photos/one.png"], "photos/notes.txt/out.png", "File exists: 'photos/notes.txt'"),
    ],
)
def test_refusals(command, photos, tmp_path, monkeypatch, inputs, output, words):
    monkeypatch.chdir(tmp_path)
    os.link(photos / "one.png", tmp_path / "link.png")
    for name in ("other", "empty"):
        (tmp_path / name).mkdir()
    shutil.copy(photos / "one.png", tmp_path / "other" / "one.png")
    before = written(tmp_path)
    status, _, err = command(*inputs, "--output", output)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and words in last
    assert written(tmp_path) == before


def test_a_damaged_folder_is_one_line(command, folder, photos, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[10] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    status, out, err = command(photos, "--output", tmp_path / "out", detector=damaged)
    assert status == 2 and out == "" and err.count("\n") == 1 and "model.safetensors: damaged" in err


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = cli.make_progress(100)
    clock = iter([1.0, 6.0, 7.0, 12.0])
    progress._start = progress._printed = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for steps in (1, 1, 1, 17):
        progress.update(steps)
    progress.close()
    assert capsys.readouterr().err == "2 of 100, ETA 4:54 min\n20 of 100, ETA 0:48 min\n"


def test_draw_leaves_its_input_alone():
    image = np.zeros((50, 60, 3), np.uint8)
    boxes = np.array([[5.4, 6.4, 30.2, 40.1], [-3, -3, 70, 70]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8], np.float32), np.array([1, 0]))
    drawn = draw(image, found, ("a", "b"))
    assert not image.any() and drawn.shape == image.shape
    assert drawn[39:42, 5:31].any() and not drawn[45:48, 33:57].any()


def test_as_a_module_without_torch(folder, photos, tmp_path):
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'detectron2', 'torchvision', 'tqdm'): sys.modules[name] = None\n"
        "runpy.run_module('aqdet.runtime', run_name='__main__')"
    )
    arguments = [folder, photos, "--output", tmp_path / "out", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "out") == ["film.mp4", "more/two.JPG", "one.png"]
