import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from helpers import load_tool
from PIL import Image


@pytest.fixture
def tool():
    return load_tool("crop_shapes")


def test_crops_are_squares_around_the_boxes_by_class(tool, tmp_path, monkeypatch, capsys):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[20:30, 10:30] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    annotations = [{"bbox": [10, 20, 20, 10], "category_id": 2}, {"bbox": [50, 50, 10, 10], "category_id": 0}]
    record = {"file_name": str(tmp_path / "scene.png"), "annotations": annotations}
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [record] * (2 if name.endswith("train") else 1))
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path / "out"), "--size", "40", "--margin", "0"])
    tool.main()
    assert "train: 4 images" in capsys.readouterr().out
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert files[:2] == ["train/circle/000001.png", "train/circle/000003.png"] and len(files) == 6
    with Image.open(tmp_path / "out" / "val" / "square" / "000000.png") as image:
        crop = np.asarray(image)
    assert crop.shape == (40, 40, 3) and crop[20, 20].tolist() == [200, 100, 50]
    assert crop[2, 20].tolist() == crop[37, 20].tolist() == [0, 0, 0]
    with pytest.raises(SystemExit, match="is not empty"):
        tool.main()
