"""The graph from pixels to detections against aqdet.runtime: the same detections in the same order."""

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import FCOS
from programs import shared
from tiny_export import end_to_end_of, make_photo, make_twin, write_folder
from tiny_export import write_sure_twin as twin

from aqdet.export.end_to_end import largest_float32_below
from aqdet.runtime import Detector


def session_of(folder):
    return onnxruntime.InferenceSession(end_to_end_of(folder).SerializeToString(), providers=["CPUExecutionProvider"])


def detect(session, *images):
    """Detections of images in BGR, as the runtime takes them."""
    pixels = np.stack([image[:, :, ::-1] for image in images])
    return session.run(["boxes", "scores", "classes", "image_indices"], {"images": pixels})


def assert_same(found, expected, index=0):
    boxes, scores, classes, images = found
    own = images == index
    np.testing.assert_array_equal(classes[own], expected.classes)
    np.testing.assert_allclose(scores[own], expected.scores, rtol=2e-6)
    np.testing.assert_allclose(boxes[own], expected.boxes, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"test_score_thresh": 0.05},
        {"test_score_thresh": 0.05, "channels": "RGB"},
        {"test_score_thresh": 0.0, "max_detections_per_image": 7},
        {"test_score_thresh": 0.05, "test_topk_candidates": 20, "test_nms_thresh": 0.6},
        {"test_score_thresh": 0.3, "test_nms_thresh": 0.1, "max_detections_per_image": 1},
    ],
    ids=["plain", "rgb", "seven", "twenty candidates", "one"],
)
def test_the_detections_of_the_runtime_in_its_order(tmp_path, options):
    folder = twin(tmp_path / "twin", **options)
    detector, session = Detector(folder, threads=1), session_of(folder)
    total = 0
    for seed, (height, width) in enumerate(((64, 96), (90, 121), (33, 40), (16, 16))):
        photo = make_photo(height, width, seed=seed)
        expected = detector(photo)
        assert_same(detect(session, photo), expected)
        total += len(expected)
    assert total >= 4


def test_a_batch_is_its_images(tmp_path):
    folder = twin(tmp_path / "twin", test_score_thresh=0.05, max_detections_per_image=9)
    detector, session = Detector(folder, threads=1), session_of(folder)
    photos = [make_photo(70, 90, seed=seed) for seed in range(3)]
    found = detect(session, *photos)
    assert np.all(np.diff(found[3]) >= 0)
    for index, photo in enumerate(photos):
        expected = detector(photo)
        assert 0 < len(expected) <= 9
        assert_same(found, expected, index)


def test_nothing_found_is_empty(tmp_path):
    folder = twin(tmp_path / "twin", test_score_thresh=0.99999)
    boxes, scores, classes, images = detect(session_of(folder), make_photo(40, 50), make_photo(40, 50))
    assert boxes.shape == (0, 4) and len(scores) == len(classes) == len(images) == 0
    assert (boxes.dtype, scores.dtype, classes.dtype, images.dtype) == (np.float32, np.float32, np.int64, np.int64)


def test_equal_scores_keep_the_runtimes_order(tmp_path):
    # Predictions that are the same everywhere: only the place decides.
    model = make_twin(test_score_thresh=0.01)
    with torch.no_grad():
        for conv in (*model.head.logits, *model.head.deltas):
            conv.weight.zero_()
    folder = write_folder(tmp_path / "twin", model, min_size=0)
    photo = make_photo(48, 64)
    expected = Detector(folder, threads=1)(photo)
    assert len(expected) > 20 and len(np.unique(expected.scores)) == 1
    assert_same(detect(session_of(folder), photo), expected)


def test_a_threshold_is_compared_as_the_runtime_does():
    for threshold in (0.5, 0.6, 0.1, 0.3, 1.0, 0.0):
        below = np.float32(largest_float32_below(threshold))
        assert float(below) <= threshold < float(np.nextafter(below, np.float32(2)))


@pytest.mark.parametrize("loss, threshold", [("focal", "0.02"), ("quality", "0.005")])
def test_fcos_and_the_folder_that_is_written(tmp_path, monkeypatch, loss, threshold):
    from helpers import make_cfg
    from programs import OVERRIDES

    from aqdet.export import folder as module
    from aqdet.export import parts

    arch = (*FCOS, "MODEL.FCOS.CLASS_LOSS", loss)
    model, _ = shared(*arch)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    monkeypatch.setattr(parts, "compare", lambda *args, **options: [])
    cfg = make_cfg(*OVERRIDES, *arch, "MODEL.FCOS.SCORE_THRESH_TEST", threshold)
    module.export_detector(cfg, str(tmp_path / "model.pth"), tmp_path / "detector", end_to_end=True)
    file = tmp_path / "detector" / "model.end_to_end.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert said["architecture"] == "FCOS" and [o.name for o in session.get_outputs()][:3] == [
        "boxes",
        "scores",
        "classes",
    ]
    detector = Detector(tmp_path / "detector", threads=1, size=0)
    for height, width in ((64, 64), (50, 83)):
        photo = make_photo(height, width)
        expected = detector(photo)
        boxes, scores, classes, _ = detect(session, photo)
        assert len(expected) == len(scores) > 10
        # Untrained: scores lie so close that the last bit may order them.
        np.testing.assert_allclose(scores, expected.scores, rtol=2e-6)
        same = classes == expected.classes
        assert same.mean() > 0.9
        np.testing.assert_allclose(boxes[same], expected.boxes[same], rtol=1e-5, atol=1e-2)
