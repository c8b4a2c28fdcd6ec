import pytest
import torch
from detectron2.layers import CycleBatchNormList
from helpers import AUX, FCOS, QUANT, calibrated, gradients, make_batch, make_model, outputs_of

from aqdet.export.fold import norm_affine
from aqdet.layers import LevelNorms

LEVELS = ("MODEL.HEAD_LEVEL_AFFINE", "True", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
BATCH = make_batch()


@pytest.mark.parametrize("architecture", ((), FCOS), ids=("retinanet", "fcos"))
def test_a_checkpoint_with_one_affine_gives_the_same_detections(architecture):
    shared, own = make_model(*architecture, *LEVELS[2:]), make_model(*architecture, *LEVELS, seed=1)
    assert isinstance(own.head.cls_subnet[1], LevelNorms) and isinstance(own.head.bbox_subnet[1], LevelNorms)
    with torch.no_grad():
        for norm in (m for m in shared.modules() if isinstance(m, CycleBatchNormList)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    for _ in range(2):
        gradients(shared, BATCH)
    own.load_state_dict(shared.state_dict())
    (losses, _, theirs), (own_losses, _, ours) = outputs_of(shared, BATCH), outputs_of(own, BATCH)
    for key, value in losses.items():
        torch.testing.assert_close(own_losses[key], value, rtol=1e-5, atol=1e-6)
    assert sum(map(len, theirs))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b.pred_boxes.tensor, a.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(b.scores, a.scores, rtol=1e-4, atol=1e-5)
    again = make_model(*architecture, *LEVELS, seed=2)
    assert not any(again.load_state_dict(own.state_dict()))
    assert torch.equal(again.head.cls_subnet[1][4].bias, shared.head.cls_subnet[1].bias)


def test_each_levels_affine_gets_the_gradient_of_its_level():
    shared, own = (calibrated(make_model(*QUANT, *AUX, *more), BATCH) for more in ((), LEVELS))
    own.load_state_dict(shared.state_dict())
    assert isinstance(own.auxiliary.head.cls_subnet[1], LevelNorms)
    theirs, ours = gradients(shared, BATCH)[1], gradients(own, BATCH)[1]
    for path in ("head.cls_subnet.1", "head.bbox_subnet.1", "auxiliary.head.cls_subnet.1"):
        for name in ("weight", "bias"):
            each = [ours[f"{path}.{level}.{name}"] for level in range(5)]
            assert "bbox" in path or len({g.abs().sum().item() for g in each}) == 5
            torch.testing.assert_close(sum(each), theirs[f"{path}.{name}"], rtol=1e-4, atol=1e-5)


def test_the_export_folds_each_levels_affine():
    norm = LevelNorms(2, num_features=3).eval()
    with torch.no_grad():
        for level, each in enumerate(norm):
            each.running_mean.fill_(1), each.running_var.fill_(4 - each.eps)
            each.weight.fill_(level + 3), each.bias.fill_(level)
    for level, (multiplier, offset) in enumerate(((1.5, -1.5), (2, -1))):
        found = norm_affine(norm, level, 3, "a layer")
        assert found[0] == pytest.approx(multiplier) and found[1] == pytest.approx(offset)
