"""Files with the key names of Detectron2's and Caffe2's model zoos, made here, in the models that they are for."""

import logging
import pickle
import re
import urllib.request

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from helpers import AUX, FCOS, QUANT, make_cfg, make_model, warnings_in

from aqdet.checkpoint import AqdetCheckpointer, convert_torchvision_resnet
from aqdet.checkpoint.files import cache_file_of
from aqdet.config import load_config

R50 = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
NORM = "MODEL.RESNETS.NORM"
BOTTOM_UP = "backbone.bottom_up."


def load(model, path, **kwargs):
    AqdetCheckpointer(model, allow_pickle=True, **kwargs).load(str(path))


def error_of(model, path):
    with pytest.raises(ValueError) as error:
        load(model, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def dump(path, content):
    path.write_bytes(pickle.dumps(content, 2))
    return path


def trained(model, seed=0):
    """The model with weights and statistics that look trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point():
                value.normal_(std=0.05, generator=generator)
    return model


# --- Caffe2's ImageNet models ---


def caffe2_name(key):
    """The name that MSRA's R-50.pkl has for a key of Detectron2's ResNet."""
    key = key.replace("stem.conv1.norm.", "res_conv1_bn.").replace("stem.conv1.", "conv1.")
    for ours, theirs in (("shortcut", "branch1"), ("conv1", "branch2a"), ("conv2", "branch2b"), ("conv3", "branch2c")):
        key = re.sub(rf"^(res\d\.\d+\.){ours}\b", rf"\1{theirs}", key)
    key = re.sub(r"\.norm\.", "_bn.", key)
    key = re.sub(r"bn\.weight$", "bn.s", key)
    return re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", key)).replace(".", "_")


@pytest.fixture(scope="module")
def msra(tmp_path_factory):
    """A file of MSRA's form, norms folded, and the arrays of it under Detectron2's names."""
    model = trained(make_model(*R50, NORM, "FrozenBN", theirs=True))
    state = {
        key.removeprefix(BOTTOM_UP): value.numpy()
        for key, value in model.state_dict().items()
        if key.startswith(BOTTOM_UP) and "running" not in key
    }
    named = {caffe2_name(key): value for key, value in state.items()}
    named.update({f"{key}_momentum": value for key, value in named.items()})
    named.update(fc1000_w=np.zeros((10, 2048), np.float32), fc1000_b=np.zeros(10, np.float32))
    path = tmp_path_factory.mktemp("msra") / "R-50.pkl"
    return dump(path, named), state


def test_the_names_are_msras(msra):
    names = set(pickle.loads(msra[0].read_bytes()))
    assert {
        *("conv1_w", "res_conv1_bn_s", "res_conv1_bn_b", "res2_0_branch1_w", "res2_0_branch1_bn_s"),
        *("res5_2_branch2c_w", "res5_2_branch2c_bn_b", "res4_5_branch2a_bn_s", "fc1000_w", "conv1_w_momentum"),
    } <= names


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN"])
@pytest.mark.parametrize("extra", [(), (*QUANT, *AUX, "MODEL.AUX.TAPS", "both")])
def test_msras_resnet_50(msra, caplog, norm, extra):
    caplog.set_level(logging.INFO, "aqdet")
    path, arrays = msra
    model = make_model(*R50, NORM, norm, *extra)
    load(model, path)
    loaded = {k.removeprefix(BOTTOM_UP): v for k, v in model.state_dict().items() if k.startswith(BOTTOM_UP)}
    assert all(torch.equal(loaded[key], torch.from_numpy(value)) for key, value in arrays.items())
    means, variances = ([v for k, v in loaded.items() if k.endswith(name)] for name in ("_mean", "_var"))
    assert len(means) == len(variances) == 53
    assert not torch.cat(means).any() and bool((torch.cat(variances) == 1).all())
    said = re.search(r"statistics of (\d+) batch norms \(backbone.bottom_up.*FrozenBN", caplog.text)
    assert (said is None) if norm == "FrozenBN" else said[1] == "53"
    assert "2 keys unexpected of the classifier" in caplog.text


def test_bn_with_folded_statistics_computes_what_frozen_bn_does(msra):
    outputs = []
    image = torch.rand(1, 3, 64, 64)
    for norm in ("BN", "FrozenBN"):
        model = make_model(*R50, NORM, norm).eval()
        load(model, msra[0])
        with torch.no_grad():
            outputs.append(model.backbone.bottom_up(image))
    for name, output in outputs[0].items():
        torch.testing.assert_close(output, outputs[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("depth, overrides", [("18", ()), ("101", (*R50, "MODEL.RESNETS.DEPTH", "101"))])
def test_msras_resnet_in_another_trunk(msra, depth, overrides):
    message = error_of(make_model(*overrides), msra[0])
    assert f"(the file has a ResNet-50, the model a ResNet-{depth}: MODEL.RESNETS.DEPTH)" in message


def test_folded_statistics_of_a_detector_are_said_too(tmp_path, caplog):
    theirs = trained(make_model(NORM, "FrozenBN"))
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    load(make_model(), dump(tmp_path / "a.pkl", {"model": arrays, "__author__": "x"}))
    assert "statistics of 20 batch norms" in caplog.text
    caplog.clear()
    load(make_model(NORM, "FrozenBN"), tmp_path / "a.pkl")
    torch.save({"model": make_model().state_dict()}, tmp_path / "new.pth")  # never trained: nothing is folded
    load(make_model(), tmp_path / "new.pth")
    assert not warnings_in(caplog)


# --- BN and FrozenBN ---


@pytest.mark.parametrize("form", ["checkpoint", "converted"])
def test_bn_in_frozen_bn_computes_the_same(tmp_path, caplog, form):
    caplog.set_level(logging.INFO, "aqdet")
    source = trained(make_model()).eval()
    state = source.state_dict()
    content = {"model": state}
    if form == "converted":
        bottom_up = {k: v for k, v in state.items() if k.startswith(BOTTOM_UP)}
        content = {"model": bottom_up, "aqdet": {"scope": [BOTTOM_UP]}}
    torch.save(content, tmp_path / "bn.pth")
    model = make_model(NORM, "FrozenBN").eval()
    load(model, tmp_path / "bn.pth")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.backbone.bottom_up(image), source.backbone.bottom_up(image)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "20 keys unexpected num_batches_tracked" in caplog.text


def test_batches_that_no_norm_counts_are_still_unexpected(tmp_path):
    torch.save({"model": {**make_model().state_dict(), "head.num_batches_tracked": torch.ones(())}}, tmp_path / "a.pth")
    assert "unexpected head.num_batches_tracked" in error_of(make_model(), tmp_path / "a.pth")


def test_torchvisions_resnet_loads_with_detectron2s_default_norm(tmp_path):
    import torchvision

    model, _ = convert_torchvision_resnet(torchvision.models.resnet18(weights=None).state_dict())
    torch.save({"model": model, "aqdet": {"scope": [BOTTOM_UP]}}, tmp_path / "r18.pth")
    detector = make_model(NORM, get_cfg().MODEL.RESNETS.NORM)
    load(detector, tmp_path / "r18.pth")
    assert torch.equal(detector.backbone.bottom_up.res5[1].conv2.weight, model[f"{BOTTOM_UP}res5.1.conv2.weight"])


# --- Detectron2's detectors ---

# What zoo files hold beside the state dict of today's model: buffers that are not stored any more.
OLD_BUFFERS = {
    "pixel_mean": np.zeros((3, 1, 1), np.float32),
    "pixel_std": np.ones((3, 1, 1), np.float32),
    **{f"anchor_generator.cell_anchors.{level}": np.zeros((9, 4), np.float32) for level in range(5)},
}


def zoo_file(path, model, prefix=""):
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    arrays.update({f"{prefix * key.startswith('anchor')}{key}": value for key, value in OLD_BUFFERS.items()})
    return dump(path, {"model": arrays, "__author__": "Detectron2 Model Zoo"})


@pytest.mark.parametrize("name", ["retinanet_R_50_FPN_1x", "retinanet_R_101_FPN_3x"])
def test_the_zoos_retinanet(tmp_path, name):
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(f"COCO-Detection/{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    theirs = trained(build_model(cfg))
    keys = set(theirs.state_dict())
    assert {"backbone.top_block.p6.weight", "head.cls_subnet.6.bias", "head.bbox_pred.weight"} <= keys
    path = zoo_file(tmp_path / "model_final.pkl", theirs)
    overrides = "MODEL.DEVICE cpu MODEL.META_ARCHITECTURE QuantRetinaNet MODEL.QUANT.ENABLED True".split()
    overrides += ["MODEL.BACKBONE.NAME", "build_quant_retinanet_resnet_fpn_backbone"]
    model = build_model(load_config(f"COCO-Detection/{name}.yaml", overrides))
    load(model, path)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    "name, keys",
    [
        (
            "COCO-Detection/faster_rcnn_R_50_FPN_1x",
            ("proposal_generator.rpn_head.anchor_deltas.bias", "roi_heads.box_predictor.bbox_pred.weight"),
        ),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
            (
                "roi_heads.box_head.fc1.weight",
                "roi_heads.mask_head.deconv.weight",
                "roi_heads.mask_head.predictor.bias",
            ),
        ),
    ],
)
def test_the_zoos_two_stage_detectors(tmp_path, name, keys):
    cfg = load_config(f"{name}.yaml", ["MODEL.DEVICE", "cpu"])
    theirs = build_model(cfg)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    assert set(keys) <= set(theirs.state_dict())
    path = zoo_file(tmp_path / "model_final.pkl", theirs, "proposal_generator.")
    model = build_model(cfg)
    load(model, path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in theirs.state_dict().items())
    # And nothing is passed over.
    part = {k: v for k, v in theirs.state_dict().items() if k != keys[0]}
    torch.save({"model": part}, tmp_path / "part.pth")
    assert f"missing {keys[0]}" in error_of(model, tmp_path / "part.pth")


def test_a_detector_of_matched_names_must_be_whole(tmp_path):
    """Names of a whole detector without their prefixes: its head is in the file's scope too."""
    arrays = {k.removeprefix("backbone."): v.numpy() for k, v in make_model().state_dict().items()}
    content = {"model": arrays, "__author__": "x", "matching_heuristics": True}
    load(make_model(), dump(tmp_path / "whole.pkl", content))
    del arrays["head.cls_score.bias"]
    assert "missing head.cls_score.bias" in error_of(make_model(), dump(tmp_path / "part.pkl", content))


# --- what a mismatch is a sign of ---


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (("MODEL.FPN.NORM", ""), (), "MODEL.FPN.NORM: the file has no norm, the model BN"),
        ((), ("MODEL.FPN.NORM", ""), "MODEL.FPN.NORM: the file has BN, the model no norm"),
        ((), ("MODEL.RETINANET.NORM", ""), "MODEL.RETINANET.NORM: the file has BN, the model no norm"),
        (
            ("MODEL.RESNETS.NORM", "GN"),
            (),
            "MODEL.RESNETS.NORM: the file has a norm without running statistics, the model BN",
        ),
        (
            (*FCOS, "MODEL.FCOS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32"),
            (*FCOS, "MODEL.FPN.OUT_CHANNELS", "32"),
            "MODEL.FCOS.NORM: the file has a norm without running statistics, the model BN",
        ),
        (("MODEL.RETINANET.NUM_CONVS", "2"), (), "MODEL.RETINANET.NUM_CONVS: 2 in the file, 1 in the model"),
        (("MODEL.FPN.RELU", "True"), (), "MODEL.FPN.RELU: P6 and P7 have norms in the file"),
        ((), ("MODEL.FPN.RELU", "True"), "MODEL.FPN.RELU: P6 and P7 have no norm in the file"),
        (("MODEL.FPN.OUT_CHANNELS", "24"), (), "MODEL.FPN.OUT_CHANNELS: 24 in the file, 16 in the model"),
        (("MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5"), (), "MODEL.FPN.TOP_BLOCK_IN_FEATURE"),
        (
            ("MODEL.RETINANET.NUM_CLASSES", "7"),
            (),
            "MODEL.RETINANET.NUM_CLASSES: 7 in the file, 3 in the model; to start with new class scores, "
            "CHECKPOINT.ALLOW_KEYS \"['head.cls_score']\"",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 40]]"),
            (),
            "(MODEL.ANCHOR_GENERATOR: 6 anchors a place in the file, 3 in the model)",
        ),
    ],
)
def test_the_way_out_names_the_key(tmp_path, theirs, ours, words):
    torch.save({"model": make_model(*theirs).state_dict()}, tmp_path / "a.pth")
    message = error_of(make_model(*ours), tmp_path / "a.pth")
    assert words in message and message.endswith(")") and "DEPTH" not in message


def test_the_way_out_of_other_classes_is_one(tmp_path):
    torch.save({"model": make_model("MODEL.RETINANET.NUM_CLASSES", "7").state_dict()}, tmp_path / "a.pth")
    model = make_model()
    message = error_of(model, tmp_path / "a.pth")
    keys = re.search(r'ALLOW_KEYS "(.*)"', message)[1]
    cfg = make_cfg("CHECKPOINT.ALLOW_KEYS", keys)
    load(model, tmp_path / "a.pth", allow_keys=cfg.CHECKPOINT.ALLOW_KEYS)
    assert torch.equal(model.head.bbox_pred.weight, torch.load(tmp_path / "a.pth")["model"]["head.bbox_pred.weight"])


def test_another_network_has_no_other_depth(tmp_path):
    torch.save({"model": torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict()}, tmp_path / "a.pth")
    message = error_of(make_model(), tmp_path / "a.pth")
    assert message.endswith("(the file has none of the model's keys: it is of another kind of network)")


def test_no_way_out_is_better_than_a_wrong_one(tmp_path):
    state = make_model().state_dict()
    dropped = [key for key in state if key.startswith("backbone.bottom_up.res4.0.")]
    torch.save({"model": {k: v for k, v in state.items() if k not in dropped[:8]}}, tmp_path / "a.pth")
    message = error_of(make_model(), tmp_path / "a.pth")
    assert "and 1 more" in message and not message.endswith(")")


# --- URLs ---


@pytest.mark.parametrize(
    "url, place",
    [
        ("https://example.org/a/b/model.pth", "a/b/model.pth"),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", "detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
        ("catalog://ImageNetPretrained/MSRA/R-50", "detectron/ImageNetPretrained/MSRA/R-50.pkl"),
    ],
)
def test_a_url_offline_names_the_cache_file(tmp_path, monkeypatch, url, place, msra):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlretrieve", offline)
    model = make_model(*R50, NORM, "FrozenBN")
    cached = tmp_path / "cache" / place
    assert cache_file_of(url) == str(cached)
    message = error_of(model, url)
    assert f"{url!r} cannot be fetched: " in message and f"a copy of the file can be put at {cached}" in message
    cached.parent.mkdir(parents=True, exist_ok=True)
    if url.endswith(".pth"):
        torch.save({"model": model.state_dict()}, cached)
    else:
        cached.write_bytes(msra[0].read_bytes())
    load(model, url)


@pytest.mark.parametrize(
    "url", ["catalog://none", "s3://bucket/model.pth", "https://1drv.ms/u/s!abc", "https://a.org/"]
)
def test_a_url_that_is_cached_under_no_name_of_its_own(url):
    assert cache_file_of(url) == ""


def test_a_pickle_is_refused_before_it_is_fetched():
    with pytest.raises(ValueError, match="is refused, it is a pickle: CHECKPOINT.ALLOW_PICKLE True"):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("detectron2://none.pkl")
