"""Detectors whose quantizers are not LSQ's kind: calibrated, stepped, reloaded."""

import pytest
import torch
from helpers import AUX, QUANT, calibrated, gradients, make_batch, make_model

from aqdet.quantization import quantizers

BATCH = make_batch()
METHODS = [
    ("lsqplus", "lsqplus", "False"),
    ("lqnet", "lqnet", "False"),
    ("lsq", "n2uq", "True"),
    ("lsqodd", "lsq", "True"),
]


@pytest.mark.parametrize("weight, input, relu", METHODS)
def test_a_detector_of_each_method_trains_and_reloads(weight, input, relu):
    extra = (
        *("MODEL.QUANT.WEIGHT.QUANTIZER", weight, "MODEL.QUANT.INPUT.QUANTIZER", input),
        *("MODEL.QUANT.RESIDUAL_QUANTIZER", input, "MODEL.FPN.RELU", relu, "MODEL.QUANT.WEIGHT.NUM_BITS", "2"),
    )
    model = calibrated(make_model(*QUANT, *AUX, *extra), BATCH)
    assert {q.spec.quantizer for _, q in quantizers(model)} == {weight, input}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    bases = {name: q.basis.clone() for name, q in quantizers(model) if q.spec.quantizer == "lqnet"}
    for _ in range(2):
        losses, grads = gradients(model, BATCH)
        optimizer.step()
        assert all(value.isfinite().all() for value in (*losses.values(), *grads.values()))
        assert set(grads) == {name for name, _ in model.named_parameters()}
    moved = [not torch.equal(q.basis, bases[name]) for name, q in quantizers(model) if name in bases]
    assert sum(moved) >= 0.9 * len(bases)  # some had converged in calibration

    other = make_model(*QUANT, *AUX, *extra)
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    model.test_score_thresh = other.test_score_thresh = 0.0
    for a, b in zip(model(BATCH), other(BATCH), strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].scores, b["instances"].scores)
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
