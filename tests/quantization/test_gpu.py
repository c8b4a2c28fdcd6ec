"""Quantizers on a CUDA device against the same ones on the CPU."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from quantization.lean.test_block import METHODS, Block, plain_forward
from quantization.specs import FOUR_BITS, LATER_FOUR_BITS, LATER_SPECS, SPECS, data, ident, is_uniform, ready
from torch.utils.checkpoint import checkpoint

from aqdet.quantization import CALIBRATION_METHODS, build_quantizer, calibrate

# Read once, at the first use of cuBLAS; without it there is no deterministic matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = pytest.mark.gpu


def step(quantizer, x, through=lambda run, x: run(x)):
    """Output and gradients of one training step, on the CPU."""
    quantizer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = through(quantizer, leaf)
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(grad.to(y))
    found = {"y": y.detach(), "x": leaf.grad, **{n: p.grad for n, p in quantizer.named_parameters()}}
    return {name: value.cpu() for name, value in {**found, **dict(quantizer.named_buffers())}.items()}


def check_close(actual, expected):
    for name, want in expected.items():
        tolerance = 1e-5 * want.double().abs().max().item()
        torch.testing.assert_close(actual[name], want, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("spec", [*SPECS, *LATER_SPECS], ids=ident)
def test_codes_are_those_of_the_cpu_but_for_ties(spec):
    here = ready(spec).eval()
    there = copy.deepcopy(here).cuda()
    x = torch.cat([data(spec, seed) for seed in range(1, 9)], dim=-1)
    with torch.no_grad():
        a, b = here(x), there(x.cuda()).cpu()
    differ = ~torch.isclose(a, b, rtol=1e-5, atol=1e-7)
    assert differ.float().mean() <= 1e-3
    assert len(b.unique()) <= 2**spec.num_bits * here.num_scales
    if spec.quantizer not in ("lqnet", "n2uq"):
        codes, theirs = here.to_integer(x).codes, there.to_integer(x.cuda()).codes.cpu()
        assert (codes - theirs).abs().max() <= (1 if is_uniform(spec) else 2)  # DoReFa's weights are odd
        assert ((codes != theirs) & ~differ).sum() == 0


@pytest.mark.parametrize("spec", [*FOUR_BITS, *LATER_FOUR_BITS], ids=ident)
def test_gradients_and_state_are_those_of_the_cpu(spec):
    here = ready(spec)
    there = copy.deepcopy(here).cuda()
    x = data(spec, 1) * 1.5
    check_close(step(there, x.cuda()), step(here, x))


@pytest.mark.parametrize("spec", LATER_FOUR_BITS, ids=ident)
def test_gradients_through_activation_checkpointing(spec):
    plain = ready(spec).cuda()
    other = copy.deepcopy(plain)
    x = data(spec, 1).cuda()
    again = step(other, x, lambda run, x: checkpoint(run, x, use_reentrant=False))
    check_close(again, step(plain, x))


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
@pytest.mark.parametrize("spec", [*FOUR_BITS, *LATER_FOUR_BITS], ids=ident)
def test_calibration_is_deterministic_and_as_good_as_on_the_cpu(spec, method):
    x, states = data(spec), []
    here = ready(spec, x, method)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            there = build_quantizer(spec, num_channels=len(x)).cuda()
            calibrate(there, lambda q=there: q(x.cuda()), method=method)
            states.append(copy.deepcopy(there.state_dict()))
            step(there, x.cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    there.load_state_dict(states[0])
    with torch.no_grad():
        errors = [(q.eval()(x.to(device)).to(x) - x).square().mean() for q, device in ((here, "cpu"), (there, "cuda"))]
    # A value at the edge of a bin may fall on the other side, and the bins are 2 % wide.
    assert errors[1] <= 1.1 * errors[0] + 1e-9


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("spec", [*FOUR_BITS, *LATER_FOUR_BITS], ids=ident)
def test_half_precision_inputs_are_quantized_in_float32(spec, dtype):
    quantizer = ready(spec).cuda()
    x = data(spec, 1).cuda().to(dtype)
    exact = step(copy.deepcopy(quantizer), x.float())
    with torch.autocast("cuda", dtype=dtype):
        y = copy.deepcopy(quantizer)(x)
    assert y.dtype == dtype and torch.equal(y.cpu(), exact["y"].to(dtype))
    half = step(quantizer, x)
    assert half["x"].dtype == dtype and all(torch.isfinite(value.float()).all() for value in half.values())


@pytest.mark.parametrize("dtype", (None, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_block_has_the_gradients_of_its_parts(method, dtype):
    block, x = Block(method), torch.randn(4, 4, 40, 40, generator=torch.Generator().manual_seed(1))
    calibrate(block, lambda: block(x))
    block.cuda()
    results = []
    for run in (block, lambda x: plain_forward(block, x)):
        block.zero_grad()
        leaf = x.cuda().requires_grad_()
        with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
            y = run(leaf)
        (y.float().square() * torch.linspace(0, 0.01, y.numel(), device=y.device).view(y.shape)).sum().backward()
        results.append(
            {"y": y, "x": leaf.grad, **{n: p.grad for n, p in block.named_parameters() if p.grad is not None}}
        )
    actual, expected = results
    assert set(actual) == set(expected)
    for name, want in expected.items():
        got, want = actual[name].double().flatten(), want.double().flatten()
        assert torch.isfinite(got).all()
        if want.any():
            assert F.cosine_similarity(got, want, dim=0) > 0.999, name
