"""Config files: Detectron2's own and its zoo's names, bases, tags, files of earlier versions."""

import copy
import json
import os
from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from PIL import Image

from aqdet.config import add_aqdet_config, load_config

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
FOLDER = Path(model_zoo.__file__).parent / "configs"
ZOO = sorted(file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*.yaml"))


def theirs(name):
    """A zoo config as Detectron2 reads it, with aqdet's defaults."""
    cfg = get_cfg()
    add_aqdet_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    return cfg


@pytest.mark.parametrize("name", [name for name in ZOO if "Panoptic-DeepLab" not in name])
def test_every_zoo_config_is_read_as_detectron2_reads_it(name):
    assert load_config(name) == theirs(name)


def test_there_is_a_zoo():
    assert RETINANET in ZOO and len(ZOO) > 40


def test_a_zoo_config_by_path_by_name_and_as_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = theirs(RETINANET)
    for name in (f"detectron2://{RETINANET}", model_zoo.get_config_file(RETINANET)):
        assert load_config(name) == wanted
    wanted.MODEL.QUANT.ENABLED = True
    for base in (RETINANET, f"detectron2://{RETINANET}", model_zoo.get_config_file(RETINANET)):
        (tmp_path / "own.yaml").write_text(f"_BASE_: {base}\nMODEL: {{QUANT: {{ENABLED: True}}}}\n")
        assert load_config("own.yaml") == wanted
    (tmp_path / "COCO-Detection").mkdir()
    (tmp_path / RETINANET).write_text("SEED: 5\n")
    assert load_config(RETINANET).SEED == load_config("own.yaml", ["SEED", "5"]).SEED == 5
    assert load_config(f"detectron2://{RETINANET}") == theirs(RETINANET)


def test_the_nearest_base_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nMODEL: {MASK_ON: True, LOAD_PROPOSALS: True}\n")
    (tmp_path / "b.yaml").write_text("SEED: 2\nMODEL: {MASK_ON: False}\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml, empty.yaml]\nVIS_PERIOD: 3\n")
    cfg = load_config(tmp_path / "c.yaml")
    assert (cfg.SEED, cfg.MODEL.MASK_ON, cfg.MODEL.LOAD_PROPOSALS, cfg.VIS_PERIOD) == (2, False, True, 3)


@pytest.mark.parametrize(
    "text, words",
    [
        ("_BASE_: none.yaml", r"'none.yaml' \(a _BASE_ of .*c.yaml\) does not exist$"),
        ("_BASE_: COCO-Detection/retinanet_R_50_FPN_1.yaml", f"did you mean {RETINANET}"),
        ("_BASE_: detectron2://COCO-Detection/none_R_50.yaml", "'COCO-Detection/none_R_50.yaml' .* does not exist"),
        ("_BASE_: /none/c.yaml", "'/none/c.yaml' .* does not exist$"),
        ("_BASE_: .", r"is a folder: name a file in it"),
        (f"_BASE_: {os.devnull}", r"is a pipe or a device: write it to a file first"),
        ("_BASE_: c.yaml", "it is a _BASE_ of itself, by way of"),
        ("_BASE_: [[a]]", "_BASE_ must be a file name or a list of them"),
        ("_BASE_: b.yaml\nMODEL: {MASK_ON: {A: 1}}", "c.yaml: MODEL.MASK_ON has keys below it, and is a value in"),
        ("[1, 2]", "it must hold KEY: VALUE, and is a list"),
        ("just text", "it must hold KEY: VALUE, and is a str"),
        ("VERSION: 7", "c.yaml: VERSION 7 is not known, the latest is 2"),
        ("VERSION: x", "c.yaml: VERSION 'x' is not known"),
        ("A: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_config_is_one_line(tmp_path, text, words):
    (tmp_path / "b.yaml").write_text("MODEL: {MASK_ON: True}\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_a_picture_is_no_config(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")
    with pytest.raises(ValueError, match="c.yaml: not valid YAML") as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        """!!python/object/apply:eval ["__import__('os').system('touch harmed')"]""",
        """!!python/object/apply:eval ["open('harmed', 'w')"]""",
        """!!python/object/apply:eval {args: ["1+1"]}""",
        """!!python/object/apply:eval ["1", "2"]""",
        """!!python/object/apply:eval [1]""",
        """!!python/object/apply:eval "1" """,
        """!!python/object/apply:os.system ["touch harmed"]""",
        """!!python/object/new:os.system ["touch harmed"]""",
        """!!python/object/apply:exec ["1"]""",
        """!!python/name:os.system""",
        """!!python/tuple [1]""",
        """!own 1""",
    ],
)
@pytest.mark.parametrize("as_base", [False, True])
def test_any_other_tag_is_refused(tmp_path, monkeypatch, value, as_base):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(f"SEED: 1\nOUTPUT_DIR: {value}\n")
    Path("c.yaml").write_text("_BASE_: bad.yaml\n")
    with pytest.raises(
        ValueError, match=r"bad.yaml, line 2: refused, it has an object tag that could run code"
    ) as error:
        load_config("c.yaml" if as_base else "bad.yaml")
    assert "\n" not in str(error.value) and not Path("harmed").exists()


def test_arithmetic_is_computed(tmp_path):
    (tmp_path / "c.yaml").write_text('SEED: !!python/object/apply:eval ["2**5 - 1"]\n')
    assert load_config(tmp_path / "c.yaml").SEED == 31


def test_the_first_version_of_detectron2s_config_files_is_upgraded(tmp_path):
    (tmp_path / "old.yaml").write_text("MODEL: {WEIGHT: a.pkl}\n")
    assert load_config(tmp_path / "old.yaml").MODEL.WEIGHTS == "a.pkl"


def test_a_runs_own_config_is_read_again(tmp_path):
    cfg = load_config(RETINANET, ["MODEL.QUANT.ENABLED", "True", "MODEL.QUANT.RULES", "[['stem', {'ENABLED': False}]]"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(tmp_path / "config.yaml")
    assert json.dumps(again) == json.dumps(cfg)  # tuples inside tuples come back as lists


OLD = """
MODEL:
  QUANT:
    ENABLED: true
    WEIGHT: {QUANTIZER: lsq, NUM_BITS: 4, PER_CHANNEL: true}
    INPUT: {QUANTIZER: lsq, NUM_BITS: 4}
    BOUNDARY_NUM_BITS: 8
    RULES: []
    RESIDUAL_NUM_BITS: 8
    RESIDUAL_QUANTIZER: pact
    CALIBRATION: {NUM_BATCHES: 8, METHOD: mse}
    SCALE_LR_FACTOR: 1.0
    PACT_ALPHA_DECAY: 0.0001
    OSCILLATION:
      {TRACK: false, DAMPENING: 0.0, FREEZE_THRESHOLD: 0.0, FREEZE_THRESHOLD_START: 0.1, MOMENTUM: 0.01}
  AUX: {ENABLED: true, TAPS: both, LOSS_WEIGHT: 1.0, SCHEDULE: constant, NORM: BN, INIT: head}
  EXTRA_LOSS: {ENABLED: false, LOSS_WEIGHT: 1.0}
  DISTILL: {ENABLED: false, WEIGHTS: '', FEATURE_WEIGHT: 1.0, LOGIT_WEIGHT: 1.0}
  FPN: {RELU: true, TOP_BLOCK_IN_FEATURE: res5}
  FCOS:
    {NUM_CLASSES: 80, IN_FEATURES: [p3, p4, p5, p6, p7], NUM_CONVS: 4, NORM: GN, PRIOR_PROB: 0.01,
     CENTER_SAMPLING_RADIUS: 1.5, FOCAL_LOSS_ALPHA: 0.25, FOCAL_LOSS_GAMMA: 2.0, SCORE_THRESH_TEST: 0.2,
     TOPK_CANDIDATES_TEST: 1000, NMS_THRESH_TEST: 0.6}
  CLASSIFIER: {NUM_CLASSES: 1000}
INPUT: {CLASSIFIER: {CROP_SIZE: 224, MIN_AREA: 0.08}}
SOLVER: {OPTIMIZER: SGD, EMA_DECAY: 0.0, FREEZE_BN_ITER: -1, DETERMINISTIC: false}
DATASETS: {DECLARED: [], IMAGE_FOLDERS: [], CHECK_IMAGES: true, STRICT: false, CACHE_DIR: ''}
TEST: {COCO_EVAL: pycocotools}
CHECKPOINT: {ALLOW_KEYS: [], ALLOW_PICKLE: false, KEEP: 3}
"""
"""Every key that the config of a run had in the first version, at its value in a quantized training."""


def test_the_config_of_a_run_of_the_first_version_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text(OLD)
    cfg = load_config(tmp_path / "config.yaml")
    wanted = copy.deepcopy(yaml.safe_load(OLD))
    del wanted["MODEL"]["QUANT"]["SCALE_LR_FACTOR"]  # deprecated: what it was relative to is gone

    def check(values, node):
        for key, value in values.items():
            if isinstance(value, dict):
                check(value, node[key])
            else:
                assert node[key] == value, key

    check(wanted, cfg)


def test_datasets_are_declared_on_a_command_line_as_in_a_file():
    python = "[{'name': 'a', 'format': 'voc', 'root': 'photos', 'split': -0.2}]"
    for text in (python, "[{name: a, format: voc, root: photos, split: -0.2}]"):
        cfg = load_config("", ["DATASETS.DECLARED", text])
        assert cfg.DATASETS.DECLARED == [{"name": "a", "format": "voc", "root": "photos", "split": -0.2}]
    assert load_config("", ["DATASETS.IMAGE_FOLDERS", "[{name: a, root: b}]"]).DATASETS.IMAGE_FOLDERS[0]["root"] == "b"
    for text in ("[{name: a", "!!python/object/apply:os.getcwd []"):
        with pytest.raises(ValueError, match="override: DATASETS.DECLARED must be a list of entries, got") as error:
            load_config("", ["DATASETS.DECLARED", text])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("MODEL: 5", "MODEL is a section: write KEY: VALUE below it, got 5"),
        ("MODEL:", "MODEL is a section: write KEY: VALUE below it, got None"),
        ("MODEL: {QUANT: true}", "MODEL.QUANT is a section: write KEY: VALUE below it, got True"),
        ("SOLVER: [1]", "SOLVER is a section: write KEY: VALUE below it, got [1]"),
    ],
)
def test_a_value_in_place_of_a_section_of_a_file_is_named(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value) == f"{tmp_path / 'c.yaml'}: {words}"


@pytest.mark.parametrize(
    "key, words",
    [
        ("MODEL", "MODEL is a section: name one of its keys, as MODEL."),
        ("MODEL.QUANT", "MODEL.QUANT is a section: name one of its keys, as MODEL.QUANT.ENABLED"),
        ("MODEL.QUANT.ENABLED.X", "MODEL.QUANT.ENABLED is a value, and has no key 'X'"),
        ("MODEL.NONE.X", "Non-existent key: MODEL.NONE.X"),
    ],
)
def test_an_override_of_no_value_is_named(key, words):
    with pytest.raises(ValueError) as error:
        load_config("", [key, "5"])
    assert str(error.value).startswith(f"override: {words}") and "\n" not in str(error.value)


def test_an_image_as_config_is_one_line(tmp_path):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match=r"c.jpg: not valid YAML, it is no text in UTF-8$"):
        load_config(tmp_path / "c.jpg")


@pytest.mark.parametrize(
    "text, words",
    [
        ("MODEL: {DEVICE: cpu}\nSEED: 1\nMODEL: {MASK_ON: True}\n", "MODEL is there twice, in lines 1 and 3"),
        ("SOLVER:\n  BASE_LR: 0.1\n  MAX_ITER: 5\n  BASE_LR: 0.2\n", "BASE_LR is there twice, in lines 2 and 4"),
        ("SOLVER: {MAX_ITER: 5, MAX_ITER: 6}\n", "MAX_ITER is there twice, in line 1"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value) == f"{tmp_path / 'c.yaml'}: not valid YAML: {words}: keep one, with all below it"


def test_keys_of_different_sections_and_yamls_merge_are_no_repetition(tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL: {FPN: &a {NORM: BN}, RETINANET: {<<: *a, NUM_CONVS: 2}}\nSEED: 3\n")
    cfg = load_config(tmp_path / "c.yaml")
    assert (cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM, cfg.MODEL.RETINANET.NUM_CONVS) == ("BN", "BN", 2)


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.MAX_ITER", "DATASETS.TRAIN"])
def test_none_is_no_value(tmp_path, key):
    words = f"{key} needs a value, got none: leave the key out for the default, "
    with pytest.raises(ValueError) as error:
        load_config("", [key, "None"])
    assert str(error.value).startswith(f"override: {words}")
    content = None
    for part in reversed(key.split(".")):
        content = {part: content}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: {words}")
    assert load_config("", ["SOLVER.WEIGHT_DECAY_BIAS", "None"]).SOLVER.WEIGHT_DECAY_BIAS is None


def test_the_way_out_of_a_lazy_config_and_of_another_case(tmp_path):
    (tmp_path / "c.py").write_text("model = 1\n")
    with pytest.raises(ValueError, match=r"c.py: a LazyConfig is Python, which this does not run: give a YAML file"):
        load_config(tmp_path / "c.py")
    with pytest.raises(ValueError, match=r"did you mean SOLVER.MAX_ITER\?$"):
        load_config("", ["solver.max_iter", "3"])
