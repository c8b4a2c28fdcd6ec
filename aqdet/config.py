"""aqdet's config keys, and config loading that refuses YAML object tags."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config
from detectron2.config.compat import guess_version

from .config_files import read_config_file
from .utils.plain_yaml import load_yaml


def add_aqdet_config(cfg: CfgNode) -> None:
    """Adds aqdet's keys to a Detectron2 config; Detectron2's own defaults are not changed."""
    # --- Quantization of the low-precision trunk and head ---
    cfg.MODEL.QUANT = CfgNode()
    # Whether the detector is quantized. If not, it computes what Detectron2's layers do, bit for bit.
    cfg.MODEL.QUANT.ENABLED = False
    cfg.MODEL.QUANT.WEIGHT = CfgNode()
    # Method for weights: "lsq", "pact" or "dorefa"; "lqnet", which is not uniform: it trains and evaluates, and is not
    # exported; "lsqplus", whose weights are LSQ's; or "lsqodd", which is LSQ on a symmetric grid without zero, for 1 to
    # 4 bits (layers with more bits, such as the predictions, have LSQ's).
    cfg.MODEL.QUANT.WEIGHT.QUANTIZER = "lsq"
    # Bits of most weights: 2 to 8, with "lsqodd" also 1.
    cfg.MODEL.QUANT.WEIGHT.NUM_BITS = 4
    # Whether each output channel has a scale of its own, or the whole tensor one.
    cfg.MODEL.QUANT.WEIGHT.PER_CHANNEL = True
    # Whether "lsqodd" first subtracts the mean of the weights that share a scale.
    cfg.MODEL.QUANT.WEIGHT.CENTERED = False
    cfg.MODEL.QUANT.INPUT = CfgNode()
    # Method for activations: "lsq", "pact" or "dorefa"; "lsqplus", LSQ with an offset where the input can be negative
    # (experimental, not measured here); "lqnet" (not uniform) or "n2uq" (learned thresholds, uniform values), which
    # train and evaluate, and are not exported. Activations always have one scale for the tensor.
    cfg.MODEL.QUANT.INPUT.QUANTIZER = "lsq"
    # Bits of most inputs: 2 to 8.
    cfg.MODEL.QUANT.INPUT.NUM_BITS = 4
    # Bits of the stem's weights and of the prediction convs' weights and inputs. The stem reads the uint8 image.
    cfg.MODEL.QUANT.BOUNDARY_NUM_BITS = 8
    # [[regex on the name of a layer, {key: value, ...}], ...]; the first rule that matches a layer wins, and a rule
    # that wins nowhere is an error. Keys: WEIGHT.QUANTIZER, WEIGHT.NUM_BITS, WEIGHT.PER_CHANNEL, WEIGHT.CENTERED,
    # INPUT.QUANTIZER, INPUT.NUM_BITS, and ENABLED: False to leave the layer in float.
    cfg.MODEL.QUANT.RULES = []
    # Bits of the tensors that more than one layer reads: the residual stream, the top-down sums, the pyramid levels.
    cfg.MODEL.QUANT.RESIDUAL_NUM_BITS = 8
    # Method for these tensors; "pact" keeps one byte an element for backward, where "lsq" keeps the whole sum.
    cfg.MODEL.QUANT.RESIDUAL_QUANTIZER = "pact"
    # Calibration gives quantizers their first ranges from training batches, before the first step. It is skipped if
    # the checkpoint has them.
    cfg.MODEL.QUANT.CALIBRATION = CfgNode()
    cfg.MODEL.QUANT.CALIBRATION.NUM_BATCHES = 8
    # Choice of a range from the values that were observed: "mse", "minmax", "percentile" or "mean".
    cfg.MODEL.QUANT.CALIBRATION.METHOD = "mse"
    # Largest share by which an iteration changes a scale, clipping range, offset or threshold, at the peak of the
    # schedule of SOLVER, with either optimizer and whatever SOLVER.BASE_LR. They get no weight decay.
    cfg.MODEL.QUANT.SCALE_LR = 0.002
    # Factor of that share for the quantizers of activations, shared tensors included.
    cfg.MODEL.QUANT.INPUT.SCALE_LR_FACTOR = 1.0
    cfg.register_deprecated_key("MODEL.QUANT.SCALE_LR_FACTOR")
    # Weight decay of PACT's alpha, the paper's L2 term.
    cfg.MODEL.QUANT.PACT_ALPHA_DECAY = 1e-4
    # Experimental, not measured here: weights that flip between two codes (2203.11086); for lsq, lsqplus and pact
    # weights of at most 4 bits.
    cfg.MODEL.QUANT.OSCILLATION = CfgNode()
    # Whether each layer's share of oscillating weights is logged; it always is with one of the remedies below.
    cfg.MODEL.QUANT.OSCILLATION.TRACK = False
    # Weight at the end of training, rising from 0, of a loss that pulls weights to their quantized values; 0 for none.
    cfg.MODEL.QUANT.OSCILLATION.DAMPENING = 0.0
    # A weight that flips back more often than this, as a share of the iterations, is frozen; 0 for none. The
    # paper's is 0.01 at the end of training; the threshold falls to it from FREEZE_THRESHOLD_START.
    cfg.MODEL.QUANT.OSCILLATION.FREEZE_THRESHOLD = 0.0
    cfg.MODEL.QUANT.OSCILLATION.FREEZE_THRESHOLD_START = 0.1
    # Momentum of the moving averages that detect oscillation.
    cfg.MODEL.QUANT.OSCILLATION.MOMENTUM = 0.01

    # --- The full-precision auxiliary path; training only ---
    cfg.MODEL.AUX = CfgNode()
    cfg.MODEL.AUX.ENABLED = False
    # The tensors that the path reads. "backbone": the sum of every residual block and the stem, aggregated into a
    # float pyramid of the path's own (image classifiers: without the pyramid); keeps every sum for backward. "fpn":
    # the pyramid levels, of any backbone and for the least memory. "both": the mean of the two.
    cfg.MODEL.AUX.TAPS = "backbone"
    # Factor of the auxiliary losses.
    cfg.MODEL.AUX.LOSS_WEIGHT = 1.0
    # Change of that factor over training: "constant", or (experimental, not measured here) "linear" or "cosine", which
    # end at 0.
    cfg.MODEL.AUX.SCHEDULE = "constant"
    # Norm of the adaptors and of the auxiliary head ("BN": one BN per level).
    cfg.MODEL.AUX.NORM = "BN"
    # Start of the path if the loaded weights have a head but no auxiliary path: "head" copies the detector's own head
    # (pyramid, projections) and aligns the adaptors, so that they pass the inputs that the copies know; or "random".
    cfg.MODEL.AUX.INIT = "head"
    # Whether the path of a two-stage detector has an RPN, and which of the detector's heads; they run on the same
    # sampled anchors and regions.
    cfg.MODEL.AUX.RPN = True
    # Some of "box", "mask" and "keypoint".
    cfg.MODEL.AUX.ROI_HEADS = ["box", "mask", "keypoint"]

    # --- Alternatives to the auxiliary path; training only, each alone or beside it ---
    # Deep supervision: a second head on the levels that the head reads, quantized as the head is, without adaptors,
    # from random weights; as a copy it would get the head's own gradients and be no more than a doubled loss.
    cfg.MODEL.EXTRA_LOSS = CfgNode()
    cfg.MODEL.EXTRA_LOSS.ENABLED = False
    # Factor of its losses, which are the head's.
    cfg.MODEL.EXTRA_LOSS.LOSS_WEIGHT = 1.0
    # Distillation from the same detector in full precision.
    cfg.MODEL.DISTILL = CfgNode()
    cfg.MODEL.DISTILL.ENABLED = False
    # Checkpoint of that detector. Read when training starts or resumes, not for evaluation.
    cfg.MODEL.DISTILL.WEIGHTS = ""
    # Factor of the squared distance of the levels that the head reads, relative to the teacher's size; 0 for none.
    cfg.MODEL.DISTILL.FEATURE_WEIGHT = 1.0
    # Factor of the divergence of the class (and centerness) probabilities, where the teacher sees objects; 0 for none.
    cfg.MODEL.DISTILL.LOGIT_WEIGHT = 1.0
    # Factor of the distance of the box deltas, weighted likewise; 0 for none.
    cfg.MODEL.DISTILL.BOX_WEIGHT = 0.0

    # --- Structure ---
    # A RegNetX (2003.13678; not measured here) in place of the ResNet: "200MF", "400MF", "600MF", "800MF", "1.6GF" or
    # "3.2GF", its multiply-adds at 224x224. Its stages are res2 to res5 too. Of MODEL.RESNETS only NORM and
    # OUT_FEATURES count then.
    cfg.MODEL.RESNETS.REGNETX = ""
    # ReLU after the norm of every FPN conv, P6 and P7 included, which makes what the head reads unsigned.
    cfg.MODEL.FPN.RELU = False
    # Whether the batch norms that the head of a RetinaNet or FCOS has for each level have an affine each, as in AQD
    # (2007.06919), or share one, as in Detectron2. Weights of the second load into the first. The auxiliary path's
    # head is alike.
    cfg.MODEL.HEAD_LEVEL_AFFINE = False
    # Input of P6: "res5" or "p5".
    cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = "res5"

    # --- FCOS (1904.01355), which Detectron2 has no keys for; the values are its defaults ---
    cfg.MODEL.FCOS = CfgNode()
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Norm of the head's convs, "" for none ("BN": one BN per level).
    cfg.MODEL.FCOS.NORM = "GN"
    # Foreground probability that the class logits start with.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Choice of the points that learn an object. "fcos": those near its centre, on a level chosen by its size. "atss"
    # (1912.02424): of the points nearest to its centre on every level, those whose square overlaps it more than
    # most do.
    cfg.MODEL.FCOS.ASSIGNMENT = "fcos"
    # "fcos": points are positive within this distance of a box's centre, in strides.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # "atss": points of each level that are considered, and the side of the square at a point, in strides.
    cfg.MODEL.FCOS.ATSS_CANDIDATES = 9
    cfg.MODEL.FCOS.ATSS_SIDE = 8.0
    # Target of the class scores. "focal": 1 at positive points. "quality" (2006.04388; no gain here, RESULTS.md): the
    # overlap of the predicted box; there is no centerness then, FOCAL_LOSS_GAMMA is the exponent and FOCAL_LOSS_ALPHA
    # has no part in it.
    cfg.MODEL.FCOS.CLASS_LOSS = "focal"
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Factors of the two losses that HQOD (2408.02561) adds at positive points, 1 there, 0 for none: one that pulls
    # boxes most that are nearly right, and one that pulls score and overlap up together. Both together gain AP in
    # short trainings (RESULTS.md).
    cfg.MODEL.FCOS.HARMONIOUS_IOU_WEIGHT = 0.0
    cfg.MODEL.FCOS.TASK_CORRELATION_WEIGHT = 0.0
    # Thresholds in evaluation; scores are sqrt(class probability x centerness), or without a centerness the class's.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

    # --- Image classification ---
    cfg.MODEL.CLASSIFIER = CfgNode()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    cfg.INPUT.CLASSIFIER = CfgNode()
    # Side of the square that is classified: a random crop in training, the centre in evaluation, where the shorter
    # side of the image is first resized to INPUT.MIN_SIZE_TEST.
    cfg.INPUT.CLASSIFIER.CROP_SIZE = 224
    # Smallest area of a random crop as a share of the image's.
    cfg.INPUT.CLASSIFIER.MIN_AREA = 0.08

    # --- Solver ---
    # "SGD" as Detectron2, or "AdamW", which needs fewer iterations from random weights; LR and WEIGHT_DECAY of one
    # do not suit the other.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Decay of a moving average of weights, scales and BN statistics, which evaluation and the final checkpoint
    # get; 0 for none. TEST.PRECISE_BN, Detectron2's key, then estimates the average's BN statistics.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Experimental, not measured here: iteration from which on BN uses its running statistics and leaves them as they
    # are; -1 for never.
    cfg.SOLVER.FREEZE_BN_ITER = -1
    # The same losses in every run with the same SEED, config and device. Slower on GPUs, where an operation that has
    # no deterministic form stops with an error that names it. CPUs need no such thing.
    cfg.SOLVER.DETERMINISTIC = False

    # --- Data ---
    # Datasets for DATASETS.TRAIN / TEST, a list of entries, each with a name and the fields of its format:
    #   {name: ..., json: COCO annotation file, image_root: folder}
    #   {name: ..., format: voc, root: VOC2007, split: train}: a folder of Pascal VOC
    #   {name: ..., format: voc, images: folder, annotations: folder}: labelImg's, in one folder or two
    #     either may have classes: [...] and difficult_as_crowd: True
    #   {name: ..., format: yolo, yaml: data.yaml, split: train}, and image_root: folder of images and labels
    # `tools/check_dataset.py --help` lists all formats. Any entry may take a part of its images, chosen by a hash of
    # each image's name, so that it stays in its part when others come or go:
    #   split: 0.8   the first 0.8 of the draw, and in another entry   split: -0.2   the 0.2 that 0.8 leaves
    #   split: [0.7, 0.9]   what lies between;   seed: 1   another draw;   share: 0.8   of a split that has a name
    # Relative paths are looked up under $DETECTRON2_DATASETS, then in the current folder. Nothing outside the
    # image root is read. MODEL.*.NUM_CLASSES: 0 takes the number of classes from the data. On a command line:
    #   DATASETS.DECLARED "[{name: mine, format: voc, root: photos, split: 0.8}]"
    cfg.DATASETS.DECLARED = []
    # [{name: ..., root: folder with a folder of images for each class}, ...], for image classification; split as above.
    cfg.DATASETS.IMAGE_FOLDERS = []
    # Whether the check before training decodes every image, once as long as no file changes.
    cfg.DATASETS.CHECK_IMAGES = True
    # Whether records that are repaired, dropped or only look wrong are refused, too (aqdet/data/check/findings.py).
    cfg.DATASETS.STRICT = False
    # Folder of the embedded dataset and of checks of declared ones; "" for $AQDET_CACHE or ~/.cache/aqdet.
    cfg.DATASETS.CACHE_DIR = ""

    # --- Evaluation ---
    # "pycocotools", or "faster-coco-eval": the same numbers in less time, if that package is installed.
    cfg.TEST.COCO_EVAL = "pycocotools"

    # --- Checkpoints ---
    cfg.CHECKPOINT = CfgNode()
    # Regexes of keys that may be missing, unexpected or of another shape when weights are loaded, e.g.
    # ["head\\.cls_score\\."] to start from a detector of other classes. Anything else stops with a list.
    cfg.CHECKPOINT.ALLOW_KEYS = []
    # A pickled file (.pkl) of Detectron2's model zoo is read only if this is True, and then as containers of arrays:
    # anything else in it is refused.
    cfg.CHECKPOINT.ALLOW_PICKLE = False
    # Number of model_<iteration>.pth that stay in OUTPUT_DIR, the newest ones; 0 for all. A resume needs the last one,
    # or the one before it if the last one is damaged.
    cfg.CHECKPOINT.KEEP = 3


def detector_only(cfg: CfgNode) -> CfgNode:
    """Returns a copy that is not frozen, without the auxiliary path and the other parts of training alone."""
    cfg = cfg.clone()
    cfg.defrost()
    for name in ("AUX", "EXTRA_LOSS", "DISTILL"):
        cfg.MODEL[name].ENABLED = False
    return cfg


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CfgNode:
    """Reads a config file with its ``_BASE_`` files, then applies ``KEY VALUE`` overrides.

    Args:
        path: A YAML file, or the name of one in Detectron2's model zoo, see
            :func:`aqdet.config_files.read_config_file`; ``""`` for the defaults.
        overrides: A flat list ``[KEY, VALUE, ...]``; lists of datasets may be written as in a config file.

    Returns:
        A config that is not frozen.

    Raises:
        FileNotFoundError: If the file or a base of it does not exist.
        ValueError: In one line, for YAML with object tags other than for arithmetic, other malformed YAML, or an
            unknown key.
    """
    cfg = get_cfg()
    add_aqdet_config(cfg)
    path = os.fspath(path)
    if path:
        content = read_config_file(path)
        try:
            _check_sections(cfg, content)
            cfg = _merged(cfg, CfgNode(content), path)
            _check_values_given(cfg)
        except (KeyError, AssertionError, ValueError) as error:
            raise ValueError(f"{path}: {_explained(cfg, error)}") from error
    if len(overrides) % 2:
        raise ValueError(f"overrides must be KEY VALUE pairs, got {' '.join(overrides)!r}")
    try:
        for key in overrides[::2]:
            _check_override(cfg, key)
        cfg.merge_from_list(_with_lists(overrides))
        _check_values_given(cfg)
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"override: {_explained(cfg, error)}") from error
    return cfg


def _with_lists(overrides: Sequence[str]) -> list[Any]:
    """Returns overrides whose lists of datasets were read as YAML, if they are no Python literals."""
    values: list[Any] = list(overrides)
    for index in range(0, len(values) - 1, 2):
        key, value = values[index : index + 2]
        if key not in ("DATASETS.DECLARED", "DATASETS.IMAGE_FOLDERS") or not isinstance(value, str):
            continue
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            try:
                values[index + 1] = load_yaml(value)
            except yaml.YAMLError as error:
                raise ValueError(
                    f"{key} must be a list of entries, got {value!r}: {' '.join(str(error).split())}"
                ) from error
    return values


def flatten(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of each key, as ``("MODEL.QUANT.ENABLED", True)``, in the config's order.

    Args:
        cfg: The config, or a section of it.
        prefix: The name of the section with a dot behind it.
    """
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_sections(cfg: CfgNode, content: Mapping[str, Any], prefix: str = "") -> None:
    """Checks that the config's sections are sections in a file, too, which yacs takes for granted."""
    for key, value in content.items():
        section = cfg.get(key)
        if not isinstance(section, CfgNode):
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{prefix}{key} is a section: write KEY: VALUE below it, got {value!r}")
        _check_sections(section, value, f"{prefix}{key}.")


def _check_values_given(cfg: CfgNode) -> None:
    """Checks that no key is None whose default is a value; yacs takes None for a value of any type."""
    defaults = get_cfg()
    add_aqdet_config(defaults)
    for (key, default), (_, value) in zip(flatten(defaults), flatten(cfg), strict=True):
        if value is None and default is not None:
            raise ValueError(f"{key} needs a value, got none: leave the key out for the default, {default!r}")


def _check_override(cfg: CfgNode, name: str) -> None:
    """Checks that a name is not a section's, and does not go on below a value; yacs finds unknown names."""
    node: Any = cfg
    parts = name.split(".")
    for index, part in enumerate(parts):
        if not isinstance(node, CfgNode):
            raise ValueError(f"{'.'.join(parts[:index])} is a value, and has no key {part!r}")
        if part not in node:
            return
        node = node[part]
    if isinstance(node, CfgNode):
        raise ValueError(f"{name} is a section: name one of its keys, as {name}.{next(iter(node))}")


def _merged(cfg: CfgNode, loaded: CfgNode, path: str) -> CfgNode:
    """Returns a config with a file's values; the file may have Detectron2's first version of config files."""
    version = loaded.get("VERSION") or guess_version(loaded, path)
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return cfg
    if version not in range(1, cfg.VERSION):
        raise ValueError(f"VERSION {version!r} is not known, the latest is {cfg.VERSION}")
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    return upgrade_config(old)


def _explained(cfg: CfgNode, error: Exception) -> str:
    """Returns yacs's message on a key, with the way out if yacs does not name it."""
    text = str(error.args[0] if error.args else error)
    key = re.search(r"Non-existent (?:config )?key: ([\w.]+)", text)
    if key is not None:
        known = (name.split(".") for name, _ in flatten(cfg))
        names = dict.fromkeys(".".join(parts[:end]) for parts in known for end in range(1, len(parts) + 1))
        close = [name for name in names if name.lower() == key[1].lower()]
        close = close or difflib.get_close_matches(key[1], list(names), 3)
        return text + (f"; did you mean {' or '.join(close)}?" if close else "")
    if "<class 'float'> vs. <class 'int'>" in text:
        return f"{' '.join(text.split())}; write the number with a decimal point, as 2.0"
    single = re.search(r"<class 'tuple'> vs. <class '(str|int|float)'>.* vs\. (.*)\) for config key: ([\w.]+)", text)
    if single is not None:
        given = [name.strip(" \"'") for name in single[2].strip(" ()[]{},").split(",")]
        value = ", ".join(map(repr, given)) if single[1] == "str" else single[2]
        value = f"({value}{',' if len(given) == 1 else ''})"
        return f'{single[3]} takes several values, got {single[2]}: write {value}, in a shell "{value}"'
    return text
