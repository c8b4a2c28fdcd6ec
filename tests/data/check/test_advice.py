"""Advice on hand-made statistics, and matching against Detectron2's own anchors, matcher and points."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances, pairwise_iou
from helpers import FCOS as FCOS_CONFIG
from helpers import make_cfg
from PIL import Image
from tiny_data import write_dataset

from aqdet.data import check_datasets, register_declared
from aqdet.data.check.advice import advise
from aqdet.data.check.findings import Report
from aqdet.data.check.matching import Matcher, resize
from aqdet.data.check.statistics import Statistics, colours_of

STRIDES = (8, 16, 32, 64, 128)


def config(*overrides):
    return make_cfg("DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)", *overrides)


def report(name, objects=(), *, size=(400, 400), classes=("cat", "dog"), number=20, colours=()):
    """A report of `number` images of a size, with objects (class, x, y, width, height) each `number` times."""
    found = Report(name)
    found.categories = dict(enumerate(classes, 1))
    found.statistics = Statistics(
        objects=[[*item, *size] for item in objects] * number,
        per_class=[number * sum(item[0] == index for item in objects) for index in range(len(classes))],
        per_image=[[len(objects), number]] if objects else [],
        fullest="full.jpg",
        sizes=[list(size)] * number,
        colours=[list(values) for values in colours],
    )
    return found


def random_boxes(number, size):
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 1, (number, 2)), 10 ** rng.uniform(0, np.log10(min(size)), (number, 2))
    return np.concatenate([corner * np.maximum(np.array(size) - side, 0), side], axis=1)


def as_boxes(boxes):
    return Boxes(torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)))


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("ratios", [[[0.5, 1.0, 2.0]], [[1.0]]])
def test_best_overlap_is_that_of_all_anchors(offset, ratios):
    cfg = config("MODEL.ANCHOR_GENERATOR.OFFSET", str(offset), "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str(ratios))
    width, height = 256, 192
    boxes = random_boxes(300, (width, height))
    generator = DefaultAnchorGenerator(cfg, [ShapeSpec(stride=stride) for stride in STRIDES])
    features = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    anchors = Boxes.cat(generator(features)).tensor.double()
    expected = pairwise_iou(as_boxes(boxes), Boxes(anchors)).max(dim=1).values.numpy()
    matcher = Matcher.from_config(cfg)
    sizes = np.full((300, 2), (width, height))
    np.testing.assert_allclose(matcher.best_overlap(boxes, sizes), expected, atol=1e-5)
    assert matcher.threshold == 0.4
    np.testing.assert_array_equal(matcher.is_matched(boxes, sizes), expected >= 0.4)
    assert 0 < (expected >= 0.4).sum() < 300


ATSS = ("MODEL.FCOS.ASSIGNMENT", "atss")


@pytest.mark.parametrize("size", [(256, 192), (520, 20)])
@pytest.mark.parametrize(
    "rule", [(), ATSS, (*ATSS, "MODEL.FCOS.ATSS_CANDIDATES", "4"), (*ATSS, "MODEL.FCOS.ATSS_SIDE", "4.0")]
)
def test_points_are_those_that_fcos_gives_an_object(rule, size):
    cfg = config(*FCOS_CONFIG, *rule)
    width, height = size
    boxes = random_boxes(300, (width, height))
    generator = DefaultAnchorGenerator(
        sizes=[[stride] for stride in STRIDES], aspect_ratios=[1.0], strides=list(STRIDES)
    )
    features = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    model = build_model(cfg)
    anchors, expected = generator(features), []
    for box in boxes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(as_boxes(box[None]).tensor.float())
        instances.gt_classes = torch.zeros(1, dtype=torch.long)
        (labels,), _ = model.label_anchors(anchors, [instances])
        expected.append(bool((labels == 0).any()))
    found = Matcher.from_config(cfg).is_matched(boxes, np.full((300, 2), (width, height)))
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.sum() < 300
    assert Matcher.from_config(cfg).is_matched(boxes[:0], np.zeros((0, 2))).shape == (0,)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 100), (33, 77)])
@pytest.mark.parametrize("shortest, longest", [(240, 1333), (800, 900), (0, 900)])
def test_resize_is_detectron2s(size, shortest, longest):
    boxes, sizes = resize(np.array([[1.0, 2, 30, 40]]), np.array([size], dtype=float), shortest, longest)
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    transform = ResizeShortestEdge([shortest], longest, "choice").get_transform(image)
    assert transform.apply_image(image).shape[1::-1] == tuple(sizes[0])
    expected = transform.apply_box(np.array([[1.0, 2, 31, 42]]))[0]
    np.testing.assert_allclose(boxes[0], [*expected[:2], *(expected[2:] - expected[:2])], rtol=1e-6)


def test_small_objects_and_what_would_help():
    # After the resize to 200, half of 8 px: no anchor of 32 px has an IoU of 4 * 4 / (32 * 32).
    small, large = (0, 108, 108, 8, 8), (1, 100, 100, 100, 100)
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(200,)", "INPUT.MAX_SIZE_TRAIN", "1000", "DATASETS.TEST", "()")
    (line,) = advise(cfg, {"a": report("a", [small, large])})
    assert line.startswith("a: 50% of the objects are too small or too thin to be learnt well (no anchor has IoU 0.4")
    assert "at INPUT.MIN_SIZE_TRAIN (200,)): 100% of 20 cat; change one: " in line and "dog" not in line
    # 24 px at 1200, and anchors of 5.3 px at 200, have an IoU of 0.56; twice as far the other way it is 0.25.
    assert "INPUT.MIN_SIZE_TRAIN (1200,) with MAX_SIZE_TRAIN 6000 leaves 0%" in line
    assert "MODEL.ANCHOR_GENERATOR.SIZES divided by 6 leaves 0%" in line
    assert "ASPECT_RATIOS" not in line
    assert advise(cfg, {"a": report("a", [large, (0, 100, 100, 90, 90)])}) == []


def test_thin_objects_need_ratios():
    thin = [(0, 10, 100, 380, 24), (1, 10, 100, 380, 24)]
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(400,)", "DATASETS.TEST", "()")
    (line,) = advise(cfg, {"a": report("a", thin)})
    assert line.startswith("a: 100% of the objects are too small or too thin")
    assert "change one: MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[0.0625, 0.125, 0.25, 0.5, 1, 2]] leaves 0%" in line


def test_objects_of_less_than_a_hundredth_of_a_pixel(recwarn):
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(400,)", "DATASETS.TEST", "()")
    (line,) = advise(cfg, {"a": report("a", [(0, 10, 10, 0.0, 5), (1, 10, 10, 5, 0.0)])})
    assert line.startswith("a: 100% of the objects") and not recwarn.list


def test_remedies_of_many_objects_are_tried_on_some(monkeypatch):
    rows = [(0, 108, 108, 8, 8), (1, 100, 100, 100, 100)] * 3
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(200,)", "INPUT.MAX_SIZE_TRAIN", "1000", "DATASETS.TEST", "()")
    whole = advise(cfg, {"a": report("a", rows)})
    monkeypatch.setattr("aqdet.data.check.advice.REMEDY_OBJECTS", 41)
    assert advise(cfg, {"a": report("a", rows)}) == whole


def test_points_have_no_anchors_to_change():
    # Between the points, which are 8 px apart from 4 px on.
    cfg = config(*FCOS_CONFIG, "INPUT.MIN_SIZE_TRAIN", "(400,)", "DATASETS.TEST", "()")
    (line,) = advise(cfg, {"a": report("a", [(0, 101, 101, 2, 2), (1, 100, 100, 60, 60)])})
    assert "(no point of FCOS lies in them at INPUT.MIN_SIZE_TRAIN (400,)): 100% of 20 cat" in line
    assert "ANCHOR_GENERATOR" not in line


def test_of_several_sizes_each_has_its_share():
    # 10 px at 400 become 20 at 800: an anchor of 32 has an IoU of 0.39 at best; 30 at 1200 of 0.88.
    objects = [(0, 91, 91, 10, 10)]
    for sizes, sampling, share in (
        ("(400, 1200)", "choice", "50%"),
        ("(400, 1200)", "range", "67%"),
        ("(1200,)", "choice", None),
    ):
        cfg = config("INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling, "DATASETS.TEST", "()")
        lines = advise(cfg, {"a": report("a", objects, classes=("cat",))})
        assert len(lines) == (share is not None)
        assert share is None or lines[0].startswith(f"a: {share} of")


def test_other_architectures():
    cfg = config("MODEL.META_ARCHITECTURE", "QuantClassifier")
    assert Matcher.from_config(cfg) is None
    two_stages = get_cfg()
    two_stages.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    two_stages.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64]]
    matcher = Matcher.from_config(two_stages)
    assert matcher.threshold == 0.3 and [level.stride for level in matcher.levels] == [4, 8]
    two_stages.MODEL.RPN.IN_FEATURES = ["mine"]
    assert Matcher.from_config(two_stages) is None
    with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS need one list, or 2"):
        two_stages.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
        two_stages.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128]]
        Matcher.from_config(two_stages)


LARGE = [(0, 100, 100, 100, 100), (1, 200, 200, 90, 90)]


def test_rare_classes_of_all_training_sets_together():
    cfg = make_cfg("DATASETS.TRAIN", "('a', 'b')", "INPUT.MIN_SIZE_TRAIN", "(400,)")
    lines = advise(cfg, {"a": report("a", LARGE, number=9), "b": report("b", LARGE[:1], number=9)})
    assert lines == [
        "DATASETS.TRAIN: 1 of 2 classes have fewer than 10 objects: dog 9; they will hardly be learnt: label more of "
        "them, or leave the classes out"
    ]
    assert advise(cfg, {"a": report("a", LARGE, number=10)}) == []
    many = tuple(f"c{index}" for index in range(20))
    (line,) = advise(cfg, {"a": report("a", [], classes=many)})
    assert "20 of 20 classes" in line and line.count(" 0,") == 7 and "c7 0 and" not in line and "and 12 more" in line


def test_more_objects_than_detections():
    cfg = config("TEST.DETECTIONS_PER_IMAGE", "1", "INPUT.MIN_SIZE_TRAIN", "(400,)", "INPUT.MIN_SIZE_TEST", "400")
    lines = advise(cfg, {"b": report("b", LARGE, number=3)})
    assert lines == [
        "b: 3 images have more objects than TEST.DETECTIONS_PER_IMAGE 1, up to 2 (full.jpg): the rest cannot be found; "
        "set TEST.DETECTIONS_PER_IMAGE 2 or more"
    ]
    assert advise(config("TEST.DETECTIONS_PER_IMAGE", "2"), {"b": report("b", LARGE, number=3)}) == []


def test_sets_that_differ():
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(400,)", "INPUT.MIN_SIZE_TEST", "400", "INPUT.MAX_SIZE_TEST", "1333")
    dark = [(20.0 + i, 20.0, 20.0, 10.0, 5.0) for i in range(5)]
    bright = [(200.0 + i, 30.0, 20.0, 10.0, 5.0) for i in range(5)]
    first = report("a", LARGE, colours=dark)
    (line,) = advise(cfg, {"a": first, "b": report("b", LARGE, colours=bright)})
    assert line.startswith("a and b: images of very different colours (means, of 255): red 22 and 202; is one")
    wide = [(value, 20.0, 20.0, 10.0, 5.0) for value in (0.0, 250.0, 0.0, 250.0, 125.0)]
    assert advise(cfg, {"a": first, "b": report("b", LARGE, colours=wide)}) == []
    assert advise(cfg, {"a": first, "b": report("b", LARGE, colours=bright[:4])}) == []
    huge = [(c, 10 * x, 10 * y, 10 * w, 10 * h) for c, x, y, w, h in LARGE]
    (line,) = advise(cfg, {"a": first, "b": report("b", huge, size=(4000, 4000))})
    assert (
        line
        == "a and b: images of very different size, 400x400 and 4000x4000 in the middle: is one of them scaled or cut?"
    )
    (line,) = advise(cfg, {"a": first, "b": report("b", [(0, 9, 9, 20, 20)])})
    assert "objects of very different size after the resize, 95 and 20 pixels in the middle" in line
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(400,)", "INPUT.MIN_SIZE_TEST", "100", "INPUT.MAX_SIZE_TEST", "1333")
    (line,) = advise(cfg, {"a": first, "b": report("b", LARGE)})
    assert "95 and 24 pixels" in line and "INPUT.MIN_SIZE_TEST" in line


def test_statistics_count_all_and_keep_a_sample():
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 10, "height": 20} for i in range(3)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3.126, 5], "iscrowd": 0},
            {"image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1},
            {"image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        ],
    }
    found = Statistics.of(content, [(1, 2, 3, 4, 5.04)])
    assert found.objects == [[1, 1, 2, 3, 4, 10, 20], [1, 1, 2, 3.13, 5, 10, 20], [0, 1, 2, 3, 4, 10, 20]]
    assert found.per_class == [1, 2] and found.per_image == [[1, 1], [2, 1]] and found.fullest == "1.png"
    assert found.sizes == [[10, 20]] * 3 and found.colours == [[1, 2, 3, 4, 5.0]]
    content["annotations"] = content["annotations"][:1] * 130_000
    found = Statistics.of(content)
    assert len(found.objects) == 43_334 and found.per_class == [0, 130_000]
    assert Statistics.of({"images": [], "annotations": [], "categories": []}) == Statistics()


def test_colours():
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[..., 0], pixels[:, 64:, 2] = 30, 90
    # Brightness 10 and 40: 15 from their mean; largest less smallest channel 30 and 90.
    assert colours_of(pixels) == pytest.approx((30, 0, 45, 15, 60))
    assert colours_of(np.full((1, 1, 3), 7, dtype=np.uint8)) == pytest.approx((7, 7, 7, 0, 0))


def test_a_training_logs_it_also_from_the_cache(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("AQDET_CACHE", str(tmp_path / "cache"))
    train = write_dataset(tmp_path / "train", "advice_train", num_images=6)
    test = write_dataset(tmp_path / "test", "advice_test", num_images=6)
    for path in (tmp_path / "test").glob("*.png"):
        Image.new("RGB", (64, 64), (255, 0, int(path.stem))).save(path)
    cfg = make_cfg(
        *("DATASETS.DECLARED", str([train, test]), "DATASETS.TRAIN", "('advice_train',)"),
        *("DATASETS.TEST", "('advice_test',)", "OUTPUT_DIR", str(tmp_path / "out"), "TEST.DETECTIONS_PER_IMAGE", "1"),
        *("INPUT.MIN_SIZE_TRAIN", "(16,)", "INPUT.MIN_SIZE_TEST", "64"),
    )
    register_declared(cfg)
    for _ in range(2):
        caplog.clear()
        check_datasets(cfg).write(tmp_path / "out")
        lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        advice = [line for line in lines if line.startswith(("advice_", "DATASETS.TRAIN"))]
        assert [line.split(":")[0] for line in advice] == [
            *("advice_train", "DATASETS.TRAIN", "advice_train", "advice_test"),
            *("advice_train and advice_test", "advice_train and advice_test"),
        ]
        # Noise around 127, and red.
        assert "colours (means, of 255): red 1" in advice[-1] and " and 255, green 1" in advice[-1]
        assert not any("\n" in line for line in advice)
    content = json.loads((tmp_path / "out/dataset_check.json").read_text())
    assert content["advice"] == advice and "statistics" not in content["datasets"][0]
    assert all(f"advice: {line}" in (tmp_path / "out/dataset_check.txt").read_text() for line in advice)
