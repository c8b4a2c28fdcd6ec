"""Training on a CUDA device: mixed precision, one process's NCCL, determinism."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import AUX, QUANT, calibrated, losses_of, make_batch, make_model
from tiny_data import train_cfg, write_dataset

from aqdet.engine import Trainer
from aqdet.engine.launch import make_deterministic

# Read once, at the first use of cuBLAS; without it there is no deterministic matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = pytest.mark.gpu

CUDA = ("MODEL.DEVICE", "cuda")
BOTH = (*QUANT, *AUX, "MODEL.FPN.RELU", "True")
METHODS = [
    ("lsq", "lsq"),
    ("pact", "pact"),
    ("dorefa", "dorefa"),
    ("lqnet", "lqnet"),
    ("lsq", "lsqplus"),
    ("lsq", "n2uq"),
    ("lsqodd", "lsq"),
]


def overrides_for(weight, input):
    # LSQ+ has an offset where a site is signed.
    relu = ("MODEL.FPN.RELU", str(input != "lsqplus"))
    return (*BOTH, *relu, "MODEL.QUANT.WEIGHT.QUANTIZER", weight, "MODEL.QUANT.INPUT.QUANTIZER", input)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_gpu")


def step(model, batch, dtype=None, factor=1.0):
    """Losses and all gradients, of losses times ``factor``, as one vector."""
    model.zero_grad()
    with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        losses = losses_of(model, batch)
    (factor * sum(losses.values())).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu() / factor
    return torch.stack([value.detach().float() for value in losses.values()]).cpu(), gradient


@pytest.mark.parametrize("weight, input", METHODS)
def test_a_step_is_that_of_the_cpu_but_for_ties(weight, input, monkeypatch):
    here = calibrated(make_model(*overrides_for(weight, input)), make_batch())
    there = make_model(*overrides_for(weight, input), *CUDA)
    there.load_state_dict(here.state_dict())
    there.loss_normalizer = here.loss_normalizer
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (losses, gradient), (expected, expected_gradient) = step(there, make_batch()), step(here, make_batch())
    torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.01)
    assert F.cosine_similarity(gradient, expected_gradient, dim=0) > 0.9


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("weight, input", METHODS)
def test_a_step_in_mixed_precision(weight, input, dtype):
    model = calibrated(make_model(*overrides_for(weight, input), *CUDA), make_batch())
    expected, expected_gradient = step(copy.deepcopy(model), make_batch())
    losses, gradient = step(model, make_batch(), dtype, factor=256.0 if dtype == torch.float16 else 1.0)
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.02)
    # With random weights the codes that rounding changes turn the gradient far: its parts are compared layer by layer.
    assert gradient.shape == expected_gradient.shape and torch.isfinite(gradient).all()
    assert 0.2 < gradient.norm() / expected_gradient.norm() < 5


@pytest.mark.parametrize("weight, input", METHODS)
def test_training_in_mixed_precision_ends_and_resumes(entry, tmp_path, weight, input):
    amp = (*CUDA, "SOLVER.AMP.ENABLED", "True", "SOLVER.BASE_LR", "0.001")
    starts = []
    for max_iter, resume in ((2, False), (4, True)):
        trainer = Trainer(train_cfg(entry, tmp_path, *overrides_for(weight, input), *amp, max_iter=max_iter))
        trainer.resume_or_load(resume=resume)
        starts.append((trainer.start_iter, trainer._trainer.grad_scaler.get_scale()))
        trainer.train()
        scale = trainer._trainer.grad_scaler.get_scale()
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
        if not resume:
            between = scale
    assert starts[1] == (2, between)
    assert (tmp_path / "inference" / "metrics.json").is_file()


@pytest.mark.parametrize("weight, input", METHODS)
def test_one_process_of_nccl_calibrates_and_steps_as_none(tmp_path, weight, input):
    plain = calibrated(make_model(*overrides_for(weight, input), *CUDA), make_batch())
    expected = step(plain, make_batch())
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = calibrated(make_model(*overrides_for(weight, input), *CUDA), make_batch())
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)
        losses, gradient = step(wrapped, make_batch())
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(losses, expected[0], rtol=0.01, atol=0.01)
    assert F.cosine_similarity(gradient, expected[1], dim=0) > 0.95


@pytest.mark.parametrize("weight, input", METHODS)
def test_the_same_seed_gives_the_same_weights(entry, tmp_path, weight, input):
    states = []
    try:
        for name in ("a", "b"):
            deterministic = ("SOLVER.DETERMINISTIC", "True", "SOLVER.BASE_LR", "0.001")
            cfg = train_cfg(entry, tmp_path / name, *overrides_for(weight, input), *CUDA, *deterministic, max_iter=3)
            make_deterministic(cfg)
            torch.manual_seed(0)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=False)
            trainer.train()
            states.append(trainer.model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
