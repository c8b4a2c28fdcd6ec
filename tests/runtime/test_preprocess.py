"""The input of the network is, byte for byte, what Detectron2 would give it."""

import dataclasses

import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import read_description
from aqdet.runtime.preprocess import make_batch, output_size, resize


def theirs(image, height, width):
    return T.ResizeTransform(*image.shape[:2], height, width, Image.Resampling.BILINEAR).apply_image(image)


def test_resize_equals_detectron2_at_many_sizes():
    rng = np.random.default_rng(0)
    for number in range(300):
        height, width = rng.integers(1, 120, 2)
        new_height, new_width = rng.integers(1, 150, 2)
        new_height = height if number % 5 == 0 else new_height
        new_width = width if number % 7 == 0 else new_width
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(image, new_height, new_width)
        for given in (image, image[:, ::-1].copy()[:, ::-1]):  # the second is no contiguous array
            np.testing.assert_array_equal(resize(given, new_height, new_width), expected)


@pytest.mark.parametrize("old, new", [((480, 640), (240, 320)), ((480, 640), (800, 1067)), ((900, 300), (447, 149))])
def test_resize_equals_detectron2_at_usual_sizes(old, new):
    image = np.random.default_rng(1).integers(0, 256, (*old, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(image, *new), theirs(image, *new))


def test_resize_by_hand():
    # To a third: each result weighs 5 pixels by 1, 2, 3, 2, 1, fewer at the ends.
    row = np.array([0, 30, 60, 90, 120, 150], np.uint8)
    image = np.repeat(row[None, :, None], 3, axis=2)
    expected = [(0 * 2 + 30 * 3 + 60 * 2 + 90 * 1) / 8, (60 * 1 + 90 * 2 + 120 * 3 + 150 * 2) / 8]
    np.testing.assert_array_equal(resize(image, 1, 2)[0, :, 0], np.floor(np.add(expected, 0.5)))


def test_output_size_equals_detectron2():
    rng = np.random.default_rng(2)
    for _ in range(2000):
        height, width, min_size, max_size = (int(v) for v in rng.integers(1, 1500, 4))
        theirs = T.ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
        assert output_size(height, width, min_size, max_size) == theirs
    assert output_size(31, 17, 0, 10) == (31, 17)


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    return read_description(write_folder(tmp_path_factory.mktemp("pre") / "twin", make_twin()))


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_make_batch_orders_and_pads(description, channels):
    description = dataclasses.replace(description, channels=channels, pad_value=(1, 2, 3))
    images = [make_photo(64, 70), make_photo(90, 64)]
    batch, sizes = make_batch(images, description)
    assert sizes == [(64, 70), (90, 64)] and batch.shape == (2, 3, 96, 80) and batch.dtype == np.uint8
    for pixels, image, (height, width) in zip(batch, images, sizes, strict=True):
        ordered = image if channels == "BGR" else image[:, :, ::-1]
        np.testing.assert_array_equal(pixels[:, :height, :width].transpose(1, 2, 0), ordered)
        for channel, value in zip(pixels, (1, 2, 3), strict=True):
            assert (channel[height:] == value).all() and (channel[:, width:] == value).all()


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 4), np.uint8), r"got uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), r"got float32 \(4, 4, 3\)"),
        ([[0]], "got list"),
        (np.zeros((0, 4, 3), np.uint8), r"must have pixels, got the shape \(0, 4, 3\)"),
        (np.zeros((1, 400, 3), np.uint8), r"would be resized to \(0, 100\): too narrow"),
    ],
)
def test_make_batch_refuses(description, image, words):
    with pytest.raises(ValueError, match=words):
        make_batch([image], description)
