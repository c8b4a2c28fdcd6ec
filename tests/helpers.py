"""Small detectors and batches for the tests."""

import importlib.util
import logging
import os
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import aqdet  # noqa: F401  (registers)
from aqdet.config import load_config
from aqdet.quantization import set_quantization

ROOT = Path(__file__).resolve().parent.parent
QUANT = ("MODEL.QUANT.ENABLED", "True")
AUX = ("MODEL.AUX.ENABLED", "True", "MODEL.AUX.TAPS", "fpn")
SMALL = (
    "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 "
    "MODEL.RESNETS.OUT_FEATURES ['res3','res4','res5'] MODEL.FPN.IN_FEATURES ['res3','res4','res5'] "
    "MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN MODEL.RETINANET.NORM BN MODEL.FPN.OUT_CHANNELS 16 "
    "MODEL.RETINANET.NUM_CONVS 1 MODEL.BACKBONE.FREEZE_AT 0 MODEL.RETINANET.NUM_CLASSES 3 "
    "MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]]"
).split()


FCOS = (
    "MODEL.META_ARCHITECTURE QuantFCOS MODEL.FCOS.NUM_CLASSES 3 MODEL.FCOS.NUM_CONVS 1 MODEL.FCOS.NORM BN "
    "MODEL.FCOS.SCORE_THRESH_TEST 0.0"
).split()


CLASSIFIER = (
    "MODEL.META_ARCHITECTURE QuantClassifier MODEL.BACKBONE.NAME build_quant_classifier_backbone "
    "MODEL.CLASSIFIER.NUM_CLASSES 3 MODEL.AUX.TAPS backbone DATALOADER.ASPECT_RATIO_GROUPING False"
).split()


def warnings_in(caplog):
    """Messages of at least a warning; an earlier training in this process may have made Detectron2 log the rest too."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def process_environment(**variables):
    """Of another Python: the checkout comes first, then what this one finds (another Detectron2, for one)."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def load_tool(name):
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_cfg(*overrides, theirs=False, seed_weights=""):
    names = ("RetinaNet", "build_retinanet_resnet_fpn_backbone")
    if not theirs:
        names = ("QuantRetinaNet", "build_quant_retinanet_resnet_fpn_backbone")
    arch = ["MODEL.META_ARCHITECTURE", names[0], "MODEL.BACKBONE.NAME", names[1]]
    return load_config("", [*SMALL, *arch, "MODEL.WEIGHTS", seed_weights, *overrides])


def make_model(*overrides, theirs=False, seed=0):
    torch.manual_seed(seed)
    return build_model(make_cfg(*overrides, theirs=theirs))


def write_weights(path, *overrides):
    """A checkpoint of a new full-precision detector whose FPN ends in ReLU, with these overrides; its path as text."""
    torch.save({"model": make_model("MODEL.FPN.RELU", "True", *overrides).state_dict()}, path)
    return str(path)


def make_batch(num_images=2, size=64, empty=()):
    generator = torch.Generator().manual_seed(0)
    batch = []
    for index in range(num_images):
        instances = Instances((size, size))
        boxes = [] if index in empty else [[4.0, 5, 40, 38], [20.0, 10, 60, 61]]
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.tensor([] if index in empty else [0, 2]).long()
        image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        sizes = {"height": size, "width": size}
        batch.append({"image": image, "instances": instances, "label": index % 3, **sizes})
    return batch


def losses_of(model, batch, iteration=0):
    with EventStorage(iteration):
        return model(batch)


def gradients(model, batch, keys=None, iteration=0):
    """Losses and gradients by name, from the same loss normalizer each time."""
    model.zero_grad()
    model.loss_normalizer = 100.0
    losses = losses_of(model, batch, iteration)
    sum(v for k, v in losses.items() if keys is None or k in keys).backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def outputs_of(model, batch):
    """Losses, gradients by name and detections, with the same normalizer and the same anchors and regions sampled."""
    model.train()
    model.loss_normalizer = 100.0
    torch.manual_seed(7)
    losses = losses_of(model, batch)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    grads = dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))
    model.eval()
    with torch.no_grad():
        found = [output["instances"] for output in model(batch)]
    return losses, grads, found


def assert_off_is_off(theirs, model, batch):
    """With quantization off, losses and gradients of a model with a scaffold are those of one without, to the bit."""
    model.load_state_dict(theirs.state_dict(), strict=False)
    set_quantization(model, False)
    for _ in range(3):
        gradients(theirs, batch)
    expected, expected_gradients = gradients(theirs, batch)
    losses, grads = gradients(model, batch, keys=set(expected))
    assert all(torch.equal(losses[key], value) for key, value in expected.items())
    assert set(grads) == set(expected_gradients)
    assert all(torch.equal(grads[key], value) for key, value in expected_gradients.items())


def calibrated(model, batch):
    from aqdet.modeling.scaffold import aligning
    from aqdet.quantization import calibrate

    def run():
        with torch.no_grad(), aligning(model):
            losses_of(model, batch)

    calibrate(model, run, method="minmax")  # quicker than the search of "mse"
    return model
