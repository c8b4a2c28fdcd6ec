"""The examples in JavaScript and C++: from the end-to-end graph the detections of the runtime, without decoding."""

import os
import subprocess
from pathlib import Path

import debian
import numpy as np
import onnx
import onnxruntime
import other_machines
import pytest
from helpers import ROOT
from tiny_export import end_to_end_of, make_photo, write_sure_twin

from aqdet.runtime import Detector

EXAMPLES = ROOT / "tools" / "examples"
DOWNLOADS = Path(os.environ.get("AQDET_CACHE") or "~/.cache/aqdet").expanduser() / "machines"
HEADERS = "usr/include/onnxruntime"


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """``(folder, image.ppm, detections of the runtime)``."""
    folder = write_sure_twin(tmp_path_factory.mktemp("example") / "twin", test_score_thresh=0.05)
    onnx.save(end_to_end_of(folder), folder / "model.end_to_end.onnx")
    photo = make_photo(70, 90)
    (folder / "image.ppm").write_bytes(b"P6\n90 70\n255\n" + photo[:, :, ::-1].tobytes())
    expected = Detector(folder, threads=1)(photo)
    assert len(expected) > 3
    return folder, folder / "image.ppm", expected


def check(command, detector, cwd=None, environment=None):
    """Runs an example, and compares what it prints with the runtime's detections."""
    folder, image, expected = detector

    def run(*arguments):
        words = [str(word) for word in (*command, *arguments)]
        return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)

    done = run(folder / "model.end_to_end.onnx", image)
    assert done.returncode == 0, done.stderr
    rows = np.array([line.split() for line in done.stdout.splitlines()], float)
    np.testing.assert_array_equal(rows[:, 0], expected.classes)
    np.testing.assert_allclose(rows[:, 1], expected.scores, rtol=2e-6)
    np.testing.assert_allclose(rows[:, 2:], expected.boxes, rtol=1e-5, atol=1e-3)
    assert run(folder / "model.end_to_end.onnx").returncode == 2
    no_image = run(folder / "model.end_to_end.onnx", folder / "detector.json")
    assert no_image.returncode == 2 and "detector.json is no binary PPM" in no_image.stderr


def test_javascript(detector):
    try:
        node = debian.program("node", package="nodejs")
        place = other_machines.javascript_packages(DOWNLOADS, "onnxruntime-node")
    except debian.NotHere as reason:
        pytest.skip(str(reason))
    check([node, EXAMPLES / "detect.mjs"], detector, place)


def onnxruntime_headers():
    """Folder with ONNX Runtime's C++ headers: of this machine, or Debian's, unpacked into the cache."""
    for root in (Path("/"), DOWNLOADS / "onnxruntime-dev"):
        if (root / HEADERS / "onnxruntime_cxx_api.h").is_file():
            return root / HEADERS
    debian.unpack(["libonnxruntime-dev"], DOWNLOADS / "onnxruntime-dev", "amd64", suite="trixie", alone=True)
    return DOWNLOADS / "onnxruntime-dev" / HEADERS


def test_cpp(detector, tmp_path):
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*"))
    if not libraries:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    try:
        compiler, headers = debian.program("g++", package="g++"), onnxruntime_headers()
    except debian.NotHere as reason:
        pytest.skip(str(reason))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(libraries[-1])
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", EXAMPLES / "detect.cpp", "-isystem", headers]
    built = subprocess.run([*command, "-L", tmp_path, "-lonnxruntime", "-o", tmp_path / "detect"], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "ORT_DISABLE_TELEMETRY": "1"}
    check([tmp_path / "detect"], detector, environment=environment)
