"""The input of the network is, byte for byte, what Detectron2 would give it."""

import dataclasses

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image as their_read_image
from PIL import Image
from tiny_export import make_photo, make_twin, write_folder

from aqdet.runtime import read_description
from aqdet.runtime.preprocess import make_batch, output_size, read_image, resize


def pillow(image, height, width):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def test_resize_equals_pillow_at_many_sizes():
    rng = np.random.default_rng(0)
    for number in range(300):
        height, width = rng.integers(1, 120, 2)
        new_height, new_width = rng.integers(1, 150, 2)
        new_height = height if number % 5 == 0 else new_height
        new_width = width if number % 7 == 0 else new_width
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = resize(image, new_height, new_width)
        np.testing.assert_array_equal(ours, pillow(image, new_height, new_width), f"{image.shape} to {ours.shape}")


@pytest.mark.parametrize("old, new", [((480, 640), (240, 320)), ((480, 640), (800, 1067)), ((900, 300), (447, 149))])
def test_resize_equals_pillow_over_several_blocks(old, new):
    image = np.random.default_rng(1).integers(0, 256, (*old, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(image, *new), pillow(image, *new))


@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_resize_keeps_a_flat_image(value):
    image = np.full((331, 77, 3), value, np.uint8)
    assert (resize(image, 7, 300) == value).all()


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


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_turns_as_exif_says(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(make_photo(30, 44)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), their_read_image(path, "BGR"))


@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("sampled.jpg", "RGB", {"subsampling": 2, "quality": 60}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("grey.jpg", "L", {}),
        ("palette.png", "P", {}),
        ("transparent.png", "RGBA", {}),
        ("black and white.png", "1", {}),
        ("bitmap.bmp", "RGB", {}),
        ("lossy.webp", "RGB", {}),
    ],
)
def test_read_image_decodes_as_detectron2(tmp_path, name, mode, options):
    Image.fromarray(make_photo(45, 61)).convert(mode).save(tmp_path / name, **options)
    np.testing.assert_array_equal(read_image(tmp_path / name), their_read_image(tmp_path / name, "BGR"))


def test_read_image_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg does not exist"):
        read_image(tmp_path / "none.jpg")
    Image.fromarray(make_photo()).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.jpg").write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.jpg: not an image that OpenCV can read"):
            read_image(tmp_path / f"{name}.jpg")


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
