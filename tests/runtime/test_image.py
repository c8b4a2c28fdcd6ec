"""Image files are read as Detectron2 reads them, and what cannot be read is one line."""

import io

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as their_read_image
from PIL import Image
from tiny_export import make_photo

from aqdet.runtime.image import decode_image, read_image


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_turns_as_exif_says(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(make_photo(30, 44)).save(path, exif=exif)
    np.testing.assert_array_equal(read_image(path), their_read_image(path, "BGR"))
    np.testing.assert_array_equal(read_image(path, "RGB"), their_read_image(path, "RGB"))


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
        ("print.jpg", "CMYK", {}),
        ("grey and transparent.png", "LA", {}),
        ("moving.gif", "P", {"save_all": True, "append_images": [Image.new("P", (61, 45))]}),
    ],
)
def test_read_image_decodes_as_detectron2(tmp_path, name, mode, options):
    Image.fromarray(make_photo(45, 61)).convert(mode).save(tmp_path / name, **options)
    np.testing.assert_array_equal(read_image(tmp_path / name), their_read_image(tmp_path / name, "BGR"))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path, name):
    deep = np.arange(0, 60000, 11, dtype=np.uint16)[:5400].reshape(60, 90)
    Image.fromarray(deep).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat((deep >> 8)[:, :, None], 3, axis=2))


def test_a_turn_that_exif_does_not_know_is_none(tmp_path):
    exif = Image.Exif()
    exif[274] = 9
    Image.fromarray(make_photo(30, 44)).save(tmp_path / "odd.jpg", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "odd.jpg"), their_read_image(tmp_path / "odd.jpg", "BGR"))


def test_damaged_exif_data_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(make_photo(30, 44)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    pixels = decode_image(io.BytesIO(buffer.getvalue()))
    assert pixels.shape == (30, 44, 3) and pixels.flags.c_contiguous


def test_read_image_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg does not exist"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="is a folder, not an image"):
        read_image(tmp_path)
    Image.fromarray(make_photo()).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.jpg").write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.jpg: not an image that Pillow can read") as error:
            read_image(tmp_path / f"{name}.jpg")
        assert "\n" not in str(error.value)
    Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)).save(tmp_path / "real.tif")
    with pytest.raises(ValueError, match="real.tif: .* mode 'F', whose values have no known range"):
        read_image(tmp_path / "real.tif")
