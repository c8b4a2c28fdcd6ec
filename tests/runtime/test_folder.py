"""What may be loaded: a folder as it was written, and nothing else."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from tiny_export import RATIOS, SIZES, make_content, make_photo, make_twin, write_folder

from aqdet.runtime import Detector, read_description, write_description


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "twin", make_twin())


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def refused(folder, kind=ValueError):
    with pytest.raises(kind) as stop:
        Detector(folder)
    message = str(stop.value)
    assert "\n" not in message and str(folder) in message
    return message


def rewrite(folder, change):
    """Changes the description and seals it again."""
    content = json.loads((folder / "detector.json").read_text())
    change(content)
    write_description(folder, content, tuple(content["files"]))


def test_reads_what_was_written(folder):
    description = read_description(folder)
    assert description.classes == ("disc", "cross", "ring") and description.category_ids == (1, 2, 3)
    assert (description.min_size, description.max_size, description.size_divisibility) == (64, 100, 16)
    assert description.scale_clamp == math.log(1000 / 16) and description.anchor_offset == 0.5
    assert [level.stride for level in description.levels] == [8, 16]
    assert not list(folder.glob("*.part"))


def test_anchors_equal_detectron2s(folder):
    theirs = DefaultAnchorGenerator(sizes=SIZES, aspect_ratios=RATIOS, strides=[8, 16]).cell_anchors
    for level, cell in zip(read_description(folder).levels, theirs, strict=True):
        half = np.array(level.anchors) / 2
        np.testing.assert_array_equal(np.concatenate([-half, half], axis=1).astype(np.float32), cell.numpy())


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "detector.json"])
def test_a_flipped_byte_is_refused(folder, name):
    data = bytearray((folder / name).read_bytes())
    for position in range(5, len(data), len(data) // 12):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (folder / name).write_bytes(flipped)
        assert name in refused(folder)
    (folder / name).write_bytes(data)
    Detector(folder)


def test_white_space_in_the_description_does_not_matter(folder):
    content = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps(content, sort_keys=True))
    Detector(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "detector.json"])
def test_a_file_of_another_model_is_refused(folder, tmp_path, name):
    other = write_folder(tmp_path / "other", make_twin(seed=1))
    (other / "model.safetensors").write_bytes(bytes(63) + b"1")
    rewrite(other, lambda content: None)
    shutil.copy(other / name, folder / name)
    assert "of another model than detector.json" in refused(folder)


@pytest.mark.parametrize("name", ["model.onnx", "detector.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    assert f"{name} does not exist" in refused(folder, FileNotFoundError)


def test_only_what_is_executed_has_to_be_there(folder, original):
    (folder / "model.safetensors").unlink()
    image = make_photo()
    np.testing.assert_array_equal(Detector(folder)(image).boxes, Detector(original)(image).boxes)


def test_the_graph_alone_is_a_whole_folder(folder):
    (folder / "model.safetensors").unlink()
    write_description(folder, json.loads((folder / "detector.json").read_text()))
    assert list(json.loads((folder / "detector.json").read_text())["files"]) == ["model.onnx"]
    Detector(folder)


def test_a_missing_folder_is_refused(tmp_path):
    assert "is not the folder of a finished export" in refused(tmp_path / "nowhere", FileNotFoundError)


@pytest.mark.parametrize(
    "key, value, words", [("version", 2, "version 2, this aqdet reads version 1"), ("format", "x", "'format' is not")]
)
def test_another_version_or_format_is_refused(folder, key, value, words):
    content = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**content, key: value}))
    assert words in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"aqdet-detector"', "[" * 100000])
def test_something_else_is_refused(folder, text):
    (folder / "detector.json").write_text(text)
    assert "detector.json" in refused(folder)


def set_in(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


def centerness_at_the_first(content):
    content["architecture"] = "FCOS"
    content["anchors"].update(sizes=[[8], [16]], aspect_ratios=[[1.0]] * 2)
    content["outputs"][0]["centerness"] = "centerness_p8"


@pytest.mark.parametrize(
    "change, words",
    [
        (set_in("classes", value=None), "KeyError('classes')"),
        (set_in("classes", value=["disc"]), "1 classes, 3 category_ids"),
        (set_in("input", "format", value="L"), "'L'"),
        (set_in("input", "pad_value", value=[0, 0, 300]), "300"),
        (set_in("decode", "score_threshold", value="high"), "'high'"),
        (set_in("decode", "box_weights", value=[1, 1]), "box_weights"),
        (set_in("anchors", "strides", value=[8]), "zip()"),
        (set_in("architecture", value="SSD"), "'SSD' is not one of RetinaNet, FCOS"),
        (set_in("architecture", value="FCOS"), "of FCOS"),
        (centerness_at_the_first, "a centerness at some levels alone"),
    ],
)
def test_a_description_that_lacks_something_is_refused(folder, change, words):
    rewrite(folder, change)
    assert words in refused(folder)


def test_a_graph_that_does_not_fit_is_refused(folder):
    rewrite(folder, set_in("outputs", 0, "logits", value="logits_p4"))
    assert "output 'logits_p4' should have 18 channels by detector.json, has None" in refused(folder)


def test_a_graph_that_does_not_load_is_refused(folder):
    graph = onnx.load(folder / "model.onnx")
    graph.graph.node[-1].op_type = "Convolve"
    onnx.save(graph, folder / "model.onnx")
    rewrite(folder, lambda content: None)
    assert "cannot load it" in refused(folder) and "Convolve" in refused(folder)


def test_files_outside_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"1")
    write_description(folder, make_content(make_twin()), files=("model.onnx", "../secret"))
    assert "'files' must be names in this folder" in refused(folder)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"provider": "Quick"}, "provider must be one of .*CPU.*'Quick'"),
        ({"score_threshold": 1.5}, "score_threshold must be from 0 to 1, got 1.5"),
        ({"nms_threshold": float("nan")}, "nms_threshold must be from 0 to 1, got nan"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
        ({"size": -1}, "size must be at least 0, .* got -1"),
        ({"size": (100, 64)}, r"size must be .* got \(100, 64\)"),
    ],
)
def test_arguments(folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        Detector(folder, **arguments)
