import sys

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from helpers import load_tool, make_cfg

from aqdet.checkpoint.torchvision import SCOPE, convert_torchvision_regnet, convert_torchvision_resnet
from aqdet.modeling import build_quant_resnet_backbone


@pytest.mark.parametrize("depth", [18, 50])
def test_the_converted_backbone_computes_the_same(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    renamed, left_out = convert_torchvision_resnet(theirs.state_dict())
    assert left_out == ["fc.weight", "fc.bias"]
    cfg = make_cfg(
        *("MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64" if depth < 50 else "256"),
    )
    ours = build_quant_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    ours.load_state_dict({key.removeprefix(SCOPE): value for key, value in renamed.items()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        a = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(a))))
        torch.testing.assert_close(ours(x)["res5"], a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["400MF", "800MF", "1.6GF", "3.2GF"])
def test_a_converted_regnetx_computes_the_same(size, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"regnet_x_{size.lower().replace('.', '_')}")(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    command = ["convert", "--regnetx", size, "--input", tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    program = load_tool("convert_torchvision")
    program.main()
    assert "2 left out (fc.weight, fc.bias)" in capsys.readouterr().out
    weights = torch.load(tmp_path / "ours.pth")["model"]
    ours = build_quant_resnet_backbone(make_cfg("MODEL.RESNETS.REGNETX", size), ShapeSpec(channels=3)).eval()
    ours.load_state_dict({key.removeprefix(SCOPE): value for key, value in weights.items()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["res5"], theirs.trunk_output(theirs.stem(x)), rtol=1e-4, atol=1e-5)
    other = "800MF" if size == "400MF" else "400MF"
    monkeypatch.setattr(sys, "argv", [other if part == size else str(part) for part in command])
    with pytest.raises(SystemExit, match=f"is no RegNetX-{other}: .* keys differ, backbone.bottom_up.res"):
        program.main()


def test_another_regnets_keys_are_listed():
    keys = ("trunk_output.block1.block1-0.f.se.fc1.weight", "trunk_output.block1.block2-0.proj.0.weight", "stem.0.bias")
    with pytest.raises(ValueError, match="3 keys belong to no torchvision RegNetX: trunk_output.block1.block1-0.f.se"):
        convert_torchvision_regnet({key: torch.ones(1) for key in keys})


def test_another_networks_keys_are_listed():
    with pytest.raises(ValueError, match="2 keys belong to no torchvision ResNet: features.0.weight"):
        convert_torchvision_resnet({"features.0.weight": torch.ones(1), "conv1.bias": torch.ones(1)})
