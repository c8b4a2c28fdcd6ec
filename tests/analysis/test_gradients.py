"""The cosines between gradients, against gradients taken one by one and a slow formula."""

import math

import pytest
import torch
from helpers import AUX, QUANT, calibrated, gradients, make_batch, make_model

from aqdet.analysis.gradients import cosine, gradient_alignment
from aqdet.quantization import set_quantization

BITS = ("MODEL.QUANT.WEIGHT.NUM_BITS", "2", "MODEL.QUANT.INPUT.NUM_BITS", "2", "MODEL.FPN.RELU", "True")
OWN = {"loss_cls", "loss_box_reg"}
BESIDE = {"aux_loss_cls", "aux_loss_box_reg"}


def slow_cosine(a, b):
    pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    norms = math.sqrt(sum(x * x for x, _ in pairs)) * math.sqrt(sum(y * y for _, y in pairs))
    return sum(x * y for x, y in pairs) / norms


def test_cosines_by_hand():
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(math.sqrt(0.5))
    assert cosine(torch.tensor([[3.0], [4]]), torch.tensor([[-6.0], [-8]])) == pytest.approx(-1)
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


@pytest.mark.parametrize("taps", ["fpn", "backbone"])
def test_against_gradients_one_by_one(taps):
    batches = [make_batch(), make_batch(empty=(1,))]
    model = calibrated(make_model(*QUANT, *AUX, *BITS, "MODEL.AUX.TAPS", taps), batches[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    normalizer = model.loss_normalizer
    found = {alignment.layer: alignment for alignment in gradient_alignment(model, batches)}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.loss_normalizer == normalizer and all(p.grad is None for p in model.parameters())
    assert {f"{layer}.weight" for layer in found} == {
        n for n, p in model.named_parameters() if n.startswith("backbone.") and p.dim() == 4
    }
    for index, batch in enumerate(batches):
        taken = {}
        for enabled in (True, False):
            set_quantization(model, enabled)
            taken[enabled] = {
                name: gradients(model, batch, keys)[1]
                for name, keys in (("own", OWN), ("all", OWN | BESIDE), ("beside", BESIDE))
            }
        for layer in ("backbone.bottom_up.res3.0.conv1", "backbone.fpn_output4"):
            key = f"{layer}.weight"
            q, f = ({name: grads.get(key) for name, grads in taken[state].items()} for state in (True, False))
            alignment = found[layer]
            assert len(alignment.own) == len(batches)
            assert alignment.own[index] == pytest.approx(slow_cosine(q["own"], f["own"]), abs=1e-3)
            assert alignment.all[index] == pytest.approx(slow_cosine(q["all"], f["all"]), abs=1e-3)
            assert alignment.all_to_own[index] == pytest.approx(slow_cosine(q["all"], f["own"]), abs=1e-3)
            if q["beside"] is None:
                assert taps == "backbone" and "fpn" in layer and math.isnan(alignment.beside_to_own[index])
            else:
                assert alignment.beside_to_own[index] == pytest.approx(slow_cosine(q["beside"], f["own"]), abs=1e-3)
            assert alignment.own[index] < 0.999


def test_without_quantizers_or_without_a_loss_beside_it_says_so():
    with pytest.raises(ValueError, match="MODEL.QUANT.ENABLED must be True"):
        gradient_alignment(make_model(*AUX), [make_batch()])
    with pytest.raises(ValueError, match="MODEL.AUX or MODEL.EXTRA_LOSS must be ENABLED"):
        gradient_alignment(calibrated(make_model(*QUANT), make_batch()), [make_batch()])
