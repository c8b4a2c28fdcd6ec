"""A detector of a few convs twice: as a Detectron2 RetinaNet, and as an exported folder with the same weights."""

import math

import numpy as np
import onnx
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from aqdet.export.end_to_end import build_end_to_end
from aqdet.runtime import read_description, write_description

CLASSES = ("disc", "cross", "ring")
STRIDES = (8, 16)
SIZES = [[20.0, 28.0], [48.0, 64.0]]
RATIOS = [[0.5, 1.0, 2.0]] * 2
WEIGHTS = (1.0, 1.0, 2.0, 2.0)
OPSET = 17


class Patches(Backbone):
    """The image itself, for each level: what the head reads with convs as large as their stride."""

    size_divisibility = 16

    def forward(self, x):
        return {f"p{stride}": x for stride in STRIDES}

    def output_shape(self):
        return {f"p{stride}": ShapeSpec(channels=3, stride=stride) for stride in STRIDES}


class PatchHead(nn.Module):
    """A conv a level and output."""

    def __init__(self):
        super().__init__()
        anchors = len(SIZES[0]) * len(RATIOS[0])
        self.logits = nn.ModuleList(nn.Conv2d(3, anchors * len(CLASSES), s, s) for s in STRIDES)
        self.deltas = nn.ModuleList(nn.Conv2d(3, anchors * 4, s, s) for s in STRIDES)
        with torch.no_grad():
            for convs, scale, bias in ((self.logits, 0.2, -3.0), (self.deltas, 0.05, 0.0)):
                for conv in convs:
                    nn.init.normal_(conv.weight, std=scale / math.sqrt(conv.weight[0].numel()))
                    nn.init.constant_(conv.bias, bias)

    def forward(self, features):
        return [[c(x) for c, x in zip(convs, features, strict=True)] for convs in (self.logits, self.deltas)]


class Anchors(DefaultAnchorGenerator):
    """Detectron2's, for features that are still images."""

    def forward(self, features):
        return super().forward([x[..., ::s, ::s] for x, s in zip(features, STRIDES, strict=True)])


def make_twin(seed=0, **decode):
    """A Detectron2 RetinaNet in evaluation; ``decode`` are its ``test_...`` arguments."""
    torch.manual_seed(seed)
    return RetinaNet(
        backbone=Patches(),
        head=PatchHead(),
        head_in_features=[f"p{s}" for s in STRIDES],
        anchor_generator=Anchors(sizes=SIZES, aspect_ratios=RATIOS, strides=STRIDES, offset=0.5),
        box2box_transform=Box2BoxTransform(weights=WEIGHTS),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1]),
        num_classes=len(CLASSES),
        pixel_mean=[128.0] * 3,
        pixel_std=[64.0] * 3,
        **decode,
    ).eval()


def write_folder(folder, model, *, channels="BGR", min_size=64, max_size=100, classes=CLASSES, layers=()):
    """Writes the exported folder of :func:`make_twin`'s model; the graph is float, as the runtime does not mind.

    Its second file is one that the runtime does not execute, as exports had before the graph itself was packed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(make_graph(model), folder / "model.onnx")
    (folder / "model.safetensors").write_bytes(bytes(64))
    content = make_content(model, channels, min_size, max_size, classes, layers)
    write_description(folder, content, ("model.onnx", "model.safetensors"))
    return folder


def write_sure_twin(folder, *, channels="BGR", **decode):
    """Writes a twin whose scores can be told apart, and that leaves images as large as they are."""
    model = make_twin(**decode)
    with torch.no_grad():
        for conv in (*model.head.logits, *model.head.deltas):
            conv.weight.mul_(6)
    return write_folder(folder, model, channels=channels, min_size=0)


def end_to_end_of(folder):
    """The graph from pixels to detections of a twin's folder."""
    network = onnx.load(folder / "model.onnx")
    network.opset_import[0].version, network.ir_version = 21, 10  # the twin's few nodes are the same in both
    return build_end_to_end(network, read_description(folder))


def make_graph(model):
    constants = {"mean": np.float32(128), "scale": np.float32(1 / 64)}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["normalised"]),
    ]
    outputs = []
    for kind in ("logits", "deltas"):
        for stride, conv in zip(STRIDES, getattr(model.head, kind), strict=True):
            name = f"{kind}_p{stride}"
            constants[f"{name}.weight"] = conv.weight.detach().numpy()
            constants[f"{name}.bias"] = conv.bias.detach().numpy()
            inputs = ["normalised", f"{name}.weight", f"{name}.bias"]
            nodes.append(helper.make_node("Conv", inputs, [name], strides=[stride] * 2))
            shape = ["N", conv.out_channels, f"h{stride}", f"w{stride}"]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 3, "H", "W"])
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "twin", [image], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def make_content(model, channels="BGR", min_size=64, max_size=100, classes=CLASSES, layers=()):
    return {
        "architecture": "RetinaNet",
        "classes": list(classes),
        "category_ids": [i + 1 for i in range(len(classes))],
        "input": {
            "format": channels,
            "min_size": min_size,
            "max_size": max_size,
            "size_divisibility": Patches.size_divisibility,
            "pad_value": [128, 128, 128],
        },
        "anchors": {"sizes": SIZES, "aspect_ratios": RATIOS, "strides": list(STRIDES), "offset": 0.5},
        "decode": {
            "box_weights": list(WEIGHTS),
            "scale_clamp": math.log(1000 / 16),
            "score_threshold": model.test_score_thresh,
            "topk_candidates": model.test_topk_candidates,
            "nms_threshold": model.test_nms_thresh,
            "max_detections": model.max_detections_per_image,
        },
        "outputs": [{"logits": f"logits_p{s}", "deltas": f"deltas_p{s}", "stride": s} for s in STRIDES],
        "layers": list(layers),
        "source": {"config": "twin.yaml", "weights_sha256": "0" * 64, "aqdet_version": "0.1.0"},
    }


def make_photo(height=90, width=120, seed=0):
    """Blocks of colour and some noise, ``(H, W, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    image = np.kron(blocks, np.ones((6, 6, 1), np.uint8))[:height, :width]
    return image + rng.integers(0, 50, image.shape, dtype=np.uint8)
