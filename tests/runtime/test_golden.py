"""Golden vectors: they hold what was computed, and a self-test sees any other value."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import Detector, write_description
from aqdet.runtime.golden import GOLDEN, self_test, write_golden


@pytest.fixture
def folder(tmp_path):
    folder = write_folder(tmp_path / "twin", make_twin(test_score_thresh=0.06))
    write_golden(folder, make_photo(), layers=["float", "normalised"])
    return folder


def change(folder, **arrays):
    with np.load(folder / GOLDEN) as file:
        content = {**file, **arrays}
    np.savez(folder / GOLDEN, **{name: value for name, value in content.items() if value is not None})


def failed(folder):
    return {check.what: check.text for check in self_test(folder, threads=1) if not check.passed}


def test_what_is_written_is_what_the_detector_computes(folder):
    detector, image = Detector(folder, size=0), make_photo()
    with np.load(folder / GOLDEN) as golden:
        found = detector(image)
        np.testing.assert_array_equal(golden["boxes"], found.boxes)
        np.testing.assert_array_equal(golden["image"], image)
        np.testing.assert_array_equal(golden["outputs/deltas_p16"], detector.run(golden["input"])[1][1])
        np.testing.assert_array_equal(golden["codes/float"], golden["input"])  # the image, cast to float32
        np.testing.assert_array_equal(golden["codes/normalised"], (golden["input"] - np.float32(128)) / 64)
    checks = self_test(folder)
    assert all(check.passed for check in checks)
    assert [check.what for check in checks] == [
        *("files", "network input", "codes of float", "codes of normalised"),
        *("output logits_p8", "output deltas_p8", "output logits_p16", "output deltas_p16", "detections"),
    ]
    assert not list(folder.glob("*.part*"))


def test_a_changed_weight_is_seen_where_it_acts(folder):
    graph = onnx.load(folder / "model.onnx")
    weight = next(w for w in graph.graph.initializer if w.name == "logits_p8.bias")
    values = numpy_helper.to_array(weight).copy()
    values[0] = np.nextafter(values[0], np.float32(0))
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, folder / "model.onnx")
    write_description(folder, json.loads((folder / "detector.json").read_text()))
    different = failed(folder)
    assert list(different) == ["output logits_p8"] and "values differ, by at most" in different["output logits_p8"]


def test_each_value_that_differs_fails(folder):
    with np.load(folder / GOLDEN) as file:
        golden = dict(file)
    assert len(golden["scores"]) > 3
    one = {name: value.copy() for name, value in golden.items()}
    one["input"][0, 0, 0, 0] ^= 1
    change(folder, input=one["input"])
    assert "1 of" in failed(folder)["network input"]
    change(folder, **golden)
    assert failed(folder) == {}
    one["scores"][0] += 1e-3
    change(folder, scores=one["scores"])
    assert list(failed(folder)) == ["detections"]
    change(folder, **{**golden, "codes/float": None})
    assert failed(folder) == {}
    one["classes"][0] = (one["classes"][0] + 1) % 3
    change(folder, classes=one["classes"])
    assert "1 of another class" in failed(folder)["detections"]
    change(folder, boxes=golden["boxes"][1:], scores=golden["scores"][1:], classes=golden["classes"][1:])
    assert f"expected {len(golden['scores']) - 1}" in failed(folder)["detections"]
    change(folder, **{"codes/normalised": golden["codes/normalised"].astype(np.float64)})
    assert "expected float64" in failed(folder)["codes of normalised"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / GOLDEN).unlink(), "has no golden vectors"),
        (lambda folder: (folder / GOLDEN).write_bytes(b"PK\3\4"), "golden.npz: damaged"),
        (lambda folder: change(folder, scores=None), "golden.npz: lacks scores"),
        (lambda folder: change(folder, **{"outputs/deltas_p8": None}), "lacks outputs/deltas_p8"),
        (lambda folder: change(folder, **{"codes/nowhere": np.zeros(1)}), "cannot load it: .*nowhere"),
    ],
)
def test_what_cannot_be_compared_is_one_line(folder, spoil, words):
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
        self_test(folder)
    assert "\n" not in str(error.value)
