import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from helpers import make_cfg

from aqdet.checkpoint.torchvision import SCOPE, convert_torchvision_resnet
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


def test_another_networks_keys_are_listed():
    with pytest.raises(ValueError, match="2 keys belong to no torchvision ResNet: features.0.weight"):
        convert_torchvision_resnet({"features.0.weight": torch.ones(1), "conv1.bias": torch.ones(1)})
