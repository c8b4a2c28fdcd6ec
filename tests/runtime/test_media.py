"""The media loop with a detector whose answers are known."""

import http.server
import threading
import time

import cv2
import numpy as np
import pytest
from tiny_export import make_photo

from aqdet.runtime import Detections
from aqdet.runtime.media import MediaLoop
from aqdet.runtime.sources import PictureSource, find_sources, output_paths

NUM_FRAMES = 7


class Known:
    """Finds two objects everywhere, and draws by turning the image dark where it found something."""

    def __init__(self, fail_at=None, seconds=0.0):
        self.batches, self.videos, self._fail_at, self._seconds = [], [], fail_at, seconds

    def detect(self, images):
        self.batches.append(len(images))
        time.sleep(self._seconds)
        if self._fail_at == len(self.batches):
            raise KeyboardInterrupt
        boxes = np.array([[8, 8, 40, 48], [1, 1, 9, 9]], np.float32)
        return [Detections(boxes, np.array([0.75, 0.3], np.float32), np.array([0, 1])) for _ in images]

    def drawer(self, is_video):
        self.videos.append(is_video)

        def draw(image, found):
            drawn = image.copy()
            for box in found.boxes.astype(int):
                drawn[box[1] : box[3], box[0] : box[2]] = 0
            return drawn

        return draw


class Kept:
    def __init__(self):
        self.rows = []

    def add(self, source, frame, image, found):
        self.rows.append((source.name.rpartition("/")[2], frame, image.shape[:2], len(found)))


def write_video(path, num_frames=NUM_FRAMES, size=64, codec="MJPG"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (size, size))
    assert writer.isOpened()
    for index in range(num_frames):
        writer.write(np.full((size, size, 3), 30 * index % 250, np.uint8))
    writer.release()


def frames_of(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return frames


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), make_photo(60 + index, 80, seed=index))
    write_video(folder / "film.avi")
    return folder


def written(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_images_and_videos_in_batches(folder, tmp_path):
    model, kept = Known(), Kept()
    sources, _ = find_sources([str(folder)])
    out = tmp_path / "out"
    summary = MediaLoop(model, threshold=0.5, records=[kept], batch=2).run(sources, output_paths(sources, str(out)))
    assert model.batches == [2, 1, 2, 2, 2, 1] and model.videos == [False, True]
    assert (summary.images, summary.videos, summary.frames, summary.detections) == (3, 1, NUM_FRAMES, 10)
    assert (summary.unreadable, summary.notes, summary.stopped) == ([], [], False)
    assert summary.highest == 0.75
    assert written(out) == ["0.png", "1.png", "2.png", "film.mp4"]
    for index in range(3):
        drawn, image = cv2.imread(str(out / f"{index}.png")), make_photo(60 + index, 80, seed=index)
        assert not drawn[8:48, 8:40].any()
        np.testing.assert_array_equal(drawn[:8], image[:8])  # the second box is below the threshold
    frames = frames_of(out / "film.mp4")
    assert len(frames) == NUM_FRAMES and frames[0].shape == (64, 64, 3)
    assert frames[-1][10:46, 12:36].max() < 20 and abs(frames[-1][:, 50:].astype(int) - 180).max() < 20
    # Records keep what is below the threshold too.
    assert kept.rows[:3] == [(f"{index}.png", None, (60 + index, 80), 2) for index in range(3)]
    assert kept.rows[3:] == [("film.avi", frame, (64, 64), 2) for frame in range(NUM_FRAMES)]


def test_without_output_nothing_is_drawn(folder, tmp_path):
    model = Known()
    before = written(tmp_path)
    summary = MediaLoop(model, threshold=0.5).run(find_sources([str(folder / "film.avi")])[0])
    assert summary.frames == NUM_FRAMES and model.videos == [] and written(tmp_path) == before


def test_what_cannot_be_read_is_named_and_the_rest_is_done(folder, tmp_path):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "film.avi").write_bytes(b"no video")
    sources, _ = find_sources([str(folder)])
    summary = MediaLoop(Known(), threshold=0.5).run(sources, output_paths(sources, str(tmp_path / "out")))
    assert (summary.images, summary.videos) == (2, 0) and written(tmp_path / "out") == ["0.png", "2.png"]
    first, second = summary.unreadable
    assert "1.png: not an image" in first and "film.avi: not a video" in second


def test_an_image_that_the_detector_refuses_is_named_and_the_rest_is_done(folder, tmp_path):
    """As one that is too narrow to be resized."""

    class Choosy(Known):
        def detect(self, images):
            if any(image.shape[0] == 61 for image in images):
                raise ValueError("too narrow")
            return super().detect(images)

    sources, _ = find_sources([str(folder / f"{index}.png") for index in range(3)])
    summary = MediaLoop(Choosy(), threshold=0.5, batch=2).run(sources, output_paths(sources, str(tmp_path / "out")))
    assert summary.images == 2 and written(tmp_path / "out") == ["0.png", "2.png"]
    assert summary.unreadable == [f"{folder / '1.png'}: too narrow"]


def test_a_video_that_breaks_off_is_noted(folder):
    write_video(folder / "film.avi", num_frames=40, codec="XVID")
    data = (folder / "film.avi").read_bytes()
    (folder / "film.avi").write_bytes(data[: len(data) * 2 // 3])
    summary = MediaLoop(Known(), threshold=0.5).run(find_sources([str(folder / "film.avi")])[0])
    assert 0 < summary.frames < 40
    assert f"film.avi: read {summary.frames} of the 40 frames" in summary.notes[0]


@pytest.mark.parametrize("name, output", [("0.png", "out.png"), ("film.avi", "out.mp4")])
def test_an_interrupt_leaves_nothing_half_done(folder, tmp_path, name, output):
    before = written(tmp_path)
    sources, _ = find_sources([str(folder / name)])
    with pytest.raises(KeyboardInterrupt):
        loop = MediaLoop(Known(fail_at=1 if name == "0.png" else 3), threshold=0.5)
        loop.run(sources, [tmp_path / output])
    assert written(tmp_path) == before


@pytest.fixture
def server():
    """An HTTP server that sends JPEG frames as cameras do, 20 ms apart, until nobody listens; its URL."""
    frames = [cv2.imencode(".jpg", np.full((48, 64, 3), value, np.uint8))[1].tobytes() for value in range(0, 250, 5)]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for data in frames:
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                time.sleep(0.02)

        def log_message(self, *arguments):
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/live"
        running.shutdown()


def test_a_live_stream_passes_over_frames_and_keeps_time(server, tmp_path):
    model, kept = Known(seconds=0.08), Kept()
    sources, _ = find_sources([server])
    assert sources[0].kind == "stream"
    summary = MediaLoop(model, threshold=0.5, records=[kept], batch=4).run(sources, [tmp_path / "live.mp4"])
    indices = [frame for _, frame, _, _ in kept.rows]
    assert summary.videos == 1 and summary.frames == len(indices) == len(model.batches)
    assert 3 <= len(indices) < 50 and indices == sorted(set(indices)) and max(indices) < 50
    # What was passed over is filled with the frames that were seen: the film is as long as the stream.
    assert len(frames_of(tmp_path / "live.mp4")) == indices[-1] + 1


def test_ctrl_c_ends_a_live_stream_and_keeps_what_was_written(server, tmp_path):
    sources, _ = find_sources([server])
    summary = MediaLoop(Known(fail_at=4), threshold=0.5).run(sources, [tmp_path / "live.mp4"])
    assert summary.stopped and summary.frames == 3
    assert len(frames_of(tmp_path / "live.mp4")) >= 3 and written(tmp_path) == ["live.mp4"]


@pytest.mark.parametrize("key, images", [(27, 1), (ord("x"), 3)])
def test_escape_in_the_window_stops(folder, monkeypatch, key, images):
    shown = []
    monkeypatch.setattr(cv2, "namedWindow", lambda *arguments: None)
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda wait: key)
    sources, _ = find_sources([str(folder)])
    summary = MediaLoop(Known(), threshold=0.5, show=True).run(sources)
    assert summary.images == images and summary.stopped == (key == 27)
    assert len(shown) == (1 if key == 27 else 3 + NUM_FRAMES) and not shown[0][8:48, 8:40].any()


def test_without_opencv_images_work_and_videos_say_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    sources, _ = find_sources([str(folder / "*.png")])
    assert MediaLoop(Known(), threshold=0.5).run(sources, output_paths(sources, str(tmp_path / "o"))).images == 3
    with pytest.raises(ValueError, match="need OpenCV: pip install"):
        MediaLoop(Known(), threshold=0.5).run([PictureSource(str(folder / "film.avi"), "video", tmp_path)])
