"""Decoding against Detectron2's RetinaNet and FCOS on the same predictions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from tiny_export import CLASSES, RATIOS, SIZES, STRIDES, Patches, make_content, make_twin, write_folder

from aqdet.runtime import Detections, read_description, write_description
from aqdet.runtime.decode import decode, suppress

ANCHORS = len(SIZES[0]) * len(RATIOS[0])


def make_predictions(height, width, num_images=1, seed=0, mean=-3.0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    logits, deltas = [], []
    for stride in STRIDES:
        shape = (height // stride, width // stride)
        logits.append(torch.randn(num_images, ANCHORS * len(CLASSES), *shape, generator=generator) * spread + mean)
        deltas.append(torch.randn(num_images, ANCHORS * 4, *shape, generator=generator))
        deltas[-1][:, ::4] *= 3  # some boxes leave the image
        deltas[-1][:, 2::4, 0] = 9.0  # and some are clamped
    return [logits, deltas]


def theirs(model, predictions, padded, sizes, original_sizes):
    num_images = len(sizes)
    images = ImageList(torch.zeros(num_images, 3, *padded), sizes)
    features = [torch.zeros(num_images, 3, *padded)] * len(STRIDES)
    with torch.no_grad():
        copies = [[x.clone() for x in kind] for kind in predictions]
        results = model.forward_inference(images, features, copies)
    return [detector_postprocess(r, *size) for r, size in zip(results, original_sizes, strict=True)]


def ours(folder, predictions, sizes, original_sizes):
    description = read_description(folder)
    levels = [[x.numpy() for x in level] for level in zip(*predictions, strict=True)]
    return [
        decode([[x[i] for x in level] for level in levels], size, original, description)
        for i, (size, original) in enumerate(zip(sizes, original_sizes, strict=True))
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    np.testing.assert_array_equal(found.classes, expected.pred_classes.numpy())
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), rtol=1e-5, atol=1e-3)
    assert (found.boxes.dtype, found.scores.dtype, found.classes.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize(
    "decode_arguments",
    [
        {},
        {"test_topk_candidates": 50, "max_detections_per_image": 7},
        {"test_nms_thresh": 0.3, "test_score_thresh": 0.4},
        {"test_nms_thresh": 1.0, "max_detections_per_image": 500},
        {"test_score_thresh": 0.0, "test_topk_candidates": 100},
        {"test_score_thresh": 1.0},
    ],
)
def test_equals_detectron2(tmp_path, decode_arguments):
    model = make_twin(**decode_arguments)
    folder = write_folder(tmp_path, model)
    sizes, original_sizes = [(96, 128), (90, 117)], [(300, 401), (45, 58)]
    predictions = make_predictions(96, 128, num_images=2)
    expected = theirs(model, predictions, (96, 128), sizes, original_sizes)
    found = ours(folder, predictions, sizes, original_sizes)
    assert (sum(len(e) for e in expected) == 0) == (decode_arguments.get("test_score_thresh") == 1.0)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_exponentials_are_rounded_once_whatever_the_processor(tmp_path):
    """NumPy's exponential of float32 has another last bit with AVX512 than on ARM; Python's of float64 is the truth."""
    folder = write_folder(tmp_path, make_twin(test_score_thresh=0.0, test_nms_thresh=1.0, test_topk_candidates=10**6))
    logits, deltas = make_predictions(96, 128)
    levels = [[x[0].numpy(), 0 * y[0].numpy()] for x, y in zip(logits, deltas, strict=True)]  # boxes that are anchors
    description = dataclasses.replace(read_description(folder), max_detections=10**6)
    found = decode(levels, (96, 128), (96, 128), description)
    exponentials = [math.exp(-logit) for level in logits for logit in level.ravel().tolist()]
    expected = np.sort(1 / (1 + np.array(exponentials, np.float32)))[::-1]
    np.testing.assert_array_equal(found.scores, expected)


def make_fcos(folder, **decode):
    """Detectron2's FCOS without a network, and the folder of one with the same decoding."""
    model = FCOS(
        backbone=Patches(),
        head=torch.nn.Identity(),
        head_in_features=[f"p{s}" for s in STRIDES],
        num_classes=len(CLASSES),
        pixel_mean=[128.0] * 3,
        pixel_std=[64.0] * 3,
        **decode,
    ).eval()
    content = make_content(model)
    for key in ("box_weights", "scale_clamp"):
        del content["decode"][key]
    (folder / "model.onnx").write_bytes(b"")
    anchors = {"sizes": [[s] for s in STRIDES], "aspect_ratios": [[1.0]] * 2, "strides": list(STRIDES), "offset": 0.5}
    outputs = [{**output, "centerness": f"centerness_p{output['stride']}"} for output in content["outputs"]]
    write_description(
        folder, {**content, "architecture": "FCOS", "anchors": anchors, "outputs": outputs}, files=("model.onnx",)
    )
    return model, folder


def make_fcos_predictions(height, width, num_images):
    generator = torch.Generator().manual_seed(3)
    kinds = []
    for channels, spread, mean in ((len(CLASSES), 2.0, -1.0), (4, 3.0, 2.0), (1, 1.5, 0.0)):
        shapes = [(num_images, channels, height // stride, width // stride) for stride in STRIDES]
        kinds.append([torch.randn(*shape, generator=generator) * spread + mean for shape in shapes])
    return kinds


@pytest.mark.parametrize(
    "decode_arguments",
    [
        {},
        {"test_topk_candidates": 50, "max_detections_per_image": 7, "test_nms_thresh": 0.3},
        {"test_score_thresh": 0.0, "test_nms_thresh": 1.0, "max_detections_per_image": 1000},
        {"test_score_thresh": 0.7},
        {"test_score_thresh": 1.0},
    ],
)
def test_fcos_equals_detectron2(tmp_path, decode_arguments):
    model, folder = make_fcos(tmp_path, **decode_arguments)
    sizes, original_sizes = [(96, 128), (90, 117)], [(300, 401), (45, 58)]
    predictions = make_fcos_predictions(96, 128, 2)
    assert all((deltas < 0).any() for deltas in predictions[1])  # which are no distances
    images = ImageList(torch.zeros(2, 3, 96, 128), sizes)
    features = [torch.zeros(2, 3, 96 // stride, 128 // stride) for stride in STRIDES]
    with torch.no_grad():
        copies = [[x.clone() for x in kind] for kind in predictions]
        results = model.forward_inference(images, features, copies)
    expected = [detector_postprocess(r, *size) for r, size in zip(results, original_sizes, strict=True)]
    found = ours(folder, predictions, sizes, original_sizes)
    assert (sum(len(e) for e in expected) == 0) == (decode_arguments.get("test_score_thresh") == 1.0)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_an_fcos_box_by_hand(tmp_path):
    # Stride 8, location (1, 2): the point (12, 20), and 0.5, 1, 2 and 0.25 strides from it; -1 is none.
    _, folder = make_fcos(tmp_path, test_score_thresh=0.3)
    description = read_description(folder)
    logits = np.full((3, 4, 4), -20, np.float32)
    logits[1, 2, 1] = np.log(4)  # probability 0.8
    deltas, centerness = np.full((4, 4, 4), -1, np.float32), np.zeros((1, 4, 4), np.float32)
    deltas[:3, 2, 1] = [0.5, 1, 2]
    alone = dataclasses.replace(description, levels=description.levels[:1])
    found = decode([(logits, deltas, centerness)], (32, 32), (32, 32), alone)
    np.testing.assert_allclose(found.boxes, [[8, 12, 28, 20]])
    np.testing.assert_allclose(found.scores, [np.sqrt(0.8 * 0.5)], rtol=1e-6)
    assert found.classes.tolist() == [1]
    # Without a centerness the class's score is all; boxes are distances all the same.
    level = dataclasses.replace(alone.levels[0], centerness="")
    plain = decode([(logits, deltas)], (32, 32), (32, 32), dataclasses.replace(alone, levels=(level,)))
    np.testing.assert_allclose(plain.boxes, [[8, 12, 28, 20]])
    np.testing.assert_allclose(plain.scores, [0.8], rtol=1e-6)


def test_equal_scores_come_in_the_order_of_the_flattened_predictions(tmp_path):
    # As in Detectron2 0.6; main may pick others among equals.
    description = read_description(write_folder(tmp_path, make_twin(test_nms_thresh=1.0, test_topk_candidates=40)))
    for logits, level in zip(make_predictions(96, 128)[0], description.levels, strict=True):
        logits = torch.round(logits)
        flat = logits[0].view(ANCHORS, len(CLASSES), *logits.shape[2:]).permute(2, 3, 0, 1).reshape(-1)
        best = sorted(range(len(flat)), key=lambda i: (-flat[i].item(), i))[:40]
        alone = dataclasses.replace(description, levels=(level,))
        deltas = np.zeros((ANCHORS * 4, *logits.shape[2:]), np.float32)
        found = decode([(logits[0].numpy(), deltas)], (96, 128), (96, 128), alone)
        np.testing.assert_array_equal(found.classes, [i % len(CLASSES) for i in best])
        assert len(set(found.scores.tolist())) < 10


def test_nothing_found(tmp_path):
    model = make_twin()
    predictions = make_predictions(32, 32, mean=-50.0)
    found = ours(write_folder(tmp_path, model), predictions, [(32, 32)], [(32, 32)])[0]
    assert len(found) == 0 and found.boxes.shape == (0, 4)


def slow_suppress(boxes, scores, classes, threshold):
    def area(box):
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        for j in kept:
            low, high = np.maximum(boxes[i][:2], boxes[j][:2]), np.minimum(boxes[i][2:], boxes[j][2:])
            shared = area([*low, *high]) if (high > low).all() else 0
            union = area(boxes[i]) + area(boxes[j]) - shared
            if classes[i] == classes[j] and union > 0 and shared / union > threshold:
                break
        else:
            kept.append(i)
    return kept


def test_suppress_equals_the_slow_reference():
    rng = np.random.default_rng(0)
    corner = rng.uniform(-20, 60, (200, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 50, (200, 2))], axis=1).astype(np.float32)
    boxes[::40, 2:] = boxes[::40, :2]  # empty ones
    candidates = Detections(boxes, rng.permutation(200).astype(np.float32), rng.integers(0, 3, 200))
    expected = slow_suppress(candidates.boxes, candidates.scores, candidates.classes, 0.4)
    assert 20 < len(expected) < 180
    np.testing.assert_array_equal(suppress(candidates, 0.4, 1000), expected)
    np.testing.assert_array_equal(suppress(candidates, 0.4, 10), expected[:10])


def test_suppress_at_the_threshold_keeps():
    # Of 2 x 1 and 1 x 1 the overlap is exactly a half.
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float32)
    candidates = Detections(boxes, np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64))
    assert suppress(candidates, 0.5, 10).tolist() == [0, 1]
    assert suppress(candidates, 0.49, 10).tolist() == [0]
