"""The whole runtime against a Detectron2 model with the same weights, and without torch."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from helpers import process_environment
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import Detector

DECODE = {"test_score_thresh": 0.06, "test_nms_thresh": 0.4}
BLOCKED = ("torch", "torchvision", "detectron2", "cv2", "fvcore", "yacs", "onnx", "pycocotools")


@pytest.fixture(scope="module")
def model():
    return make_twin(**DECODE)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("detector") / "twin", model)


def theirs(model, images, rgb=False):
    """As Detectron2's DefaultPredictor, for a batch."""
    batch = []
    for image in images:
        ordered = image[:, :, ::-1] if rgb else image
        resized = T.ResizeShortestEdge(64, 100).get_transform(ordered).apply_image(np.ascontiguousarray(ordered))
        tensor = torch.as_tensor(resized.transpose(2, 0, 1).copy())
        batch.append({"image": tensor, "height": image.shape[0], "width": image.shape[1]})
    with torch.no_grad():
        return [output["instances"] for output in model(batch)]


def assert_same(found, expected):
    assert len(found) == len(expected) > 3
    np.testing.assert_array_equal(found.classes, expected.pred_classes.numpy())
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)


@pytest.mark.parametrize("size", [(90, 120), (300, 200), (64, 64), (40, 200)])
def test_one_image(model, folder, size):
    image = make_photo(*size)
    assert_same(Detector(folder, threads=1)(image), theirs(model, [image])[0])


def resized(model, image, shorter, longer):
    """Detections of Detectron2 in an image, which is resized to these edges."""
    pixels = T.ResizeShortestEdge(shorter, longer).get_transform(image).apply_image(image) if shorter else image
    tensor = torch.as_tensor(pixels.transpose(2, 0, 1).copy())
    with torch.no_grad():
        return model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])[0]["instances"]


@pytest.mark.parametrize(
    "size, edges", [(96, (96, 150)), ((80, 90), (80, 90)), (0, (0, 0)), (32, (32, 50)), (None, (64, 100))]
)
def test_another_size(model, folder, size, edges):
    image = make_photo(90, 170)
    assert_same(Detector(folder, size=size)(image), resized(model, image, *edges))


def test_other_thresholds(folder):
    image, arguments = make_photo(), {"test_score_thresh": 0.055, "test_nms_thresh": 0.2}
    found = Detector(folder, score_threshold=0.055, nms_threshold=0.2, max_detections=5)(image)
    expected = theirs(make_twin(**arguments, max_detections_per_image=5), [image])[0]
    assert_same(found, expected)
    assert len(found) == 5 < len(Detector(folder)(image))


def test_a_batch_of_several_sizes(model, folder):
    images = [make_photo(90, 120), make_photo(120, 90, seed=1), make_photo(50, 51, seed=2)]
    found = Detector(folder).detect(images)
    for one, other in zip(found, theirs(model, images), strict=True):
        assert_same(one, other)
    assert Detector(folder).detect([]) == []


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 64, 40), np.uint8),
        np.zeros((1, 3, 64, 64), np.float32),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((1, 1, 64, 64), np.uint8),
    ],
)
def test_a_batch_that_the_network_does_not_take_is_refused_in_a_line(folder, batch):
    with pytest.raises(ValueError, match=r"H and W multiples of 16, got \w+ \(.*\)$"):
        Detector(folder).run(batch)


def test_rgb(model, tmp_path):
    image = make_photo()
    detector = Detector(write_folder(tmp_path / "rgb", model, channels="RGB"))
    assert_same(detector(image), theirs(model, [image], rgb=True)[0])


def test_a_file(folder, tmp_path):
    image = make_photo()
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    detector = Detector(folder)
    found, expected = detector(tmp_path / "photo.png"), detector(image)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert detector.classes == ("disc", "cross", "ring")


SCRIPT = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from aqdet.runtime import Detector
found = Detector(sys.argv[1], threads=1)(sys.argv[2])
print(json.dumps([found.boxes.tolist(), found.scores.tolist(), found.classes.tolist()]))
import aqdet
try:
    aqdet.load_config
except ImportError as error:
    print(error)
assert not set(BLOCKED) & set(sys.modules), sys.modules
"""


def without_torch(*command, **variables):
    environment = process_environment(**variables)
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_torch(model, folder, tmp_path):
    image = make_photo(110, 75)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    script = f"BLOCKED = {BLOCKED}\n{SCRIPT}"
    (tmp_path / "home").mkdir()
    detections, refusal = without_torch("-c", script, folder, tmp_path / "photo.png", HOME=str(tmp_path / "home"))
    # ONNX Runtime's telemetry, which is off, would keep a database and an id there.
    assert list((tmp_path / "home").rglob("*")) == []
    boxes, scores, classes = (np.array(v) for v in json.loads(detections))
    expected = theirs(model, [image])[0]
    assert len(expected) > 3
    np.testing.assert_array_equal(classes, expected.pred_classes.numpy())
    np.testing.assert_allclose(scores, expected.scores.numpy(), rtol=1e-4)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)
    assert refusal.startswith("aqdet.load_config needs Detectron2 and PyTorch, and detectron2 is not installed here")
