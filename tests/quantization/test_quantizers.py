import copy
import importlib.util
import itertools
import pathlib

import pytest
import torch

from aqdet.quantization import (
    QuantSpec,
    build_quantizer,
    calibrate,
    fake_quantize,
    grad_scale,
    integer_range,
    round_ste,
    set_quantization,
)
from aqdet.quantization.functional import SCALE_EPS, floor_scale

_spec = importlib.util.spec_from_file_location(
    "slow_reference", pathlib.Path(__file__).with_name("slow_reference.py")
)
slow = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(slow)

METHODS = ("lsq", "pact", "dorefa")
SPECS = [
    QuantSpec(name, bits, role, signed=signed, per_channel=per_channel)
    for name, bits in itertools.product(METHODS, (2, 3, 4, 8))
    for role, signed, per_channel in (
        ("weight", True, False),
        ("weight", True, True),
        ("input", True, False),
        ("input", False, False),
    )
]


def ident(spec):
    sign = "s" if spec.signed else "u"
    return f"{spec.quantizer}-{spec.role}-{spec.num_bits}{sign}{'-pc' if spec.per_channel else ''}"


def data(spec, seed=0):
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    if spec.role == "weight":
        return x * torch.linspace(0.1, 2, 6).view(-1, 1, 1, 1)
    return x if spec.signed else x.relu()


def ready(spec, x=None, method="mse"):
    quantizer = build_quantizer(spec, num_channels=6)
    quantizer.start_observing()
    quantizer(data(spec) if x is None else x)
    quantizer.finish_calibration(method)
    return quantizer


def groups(spec, x):
    return [row.flatten() for row in x] if spec.per_channel else [x.flatten()]


def code_range(spec):
    return integer_range(spec.num_bits, spec.signed, spec.quantizer != "lsq")


@pytest.mark.parametrize("spec", SPECS, ids=ident)
def test_forward_matches_the_slow_reference_and_has_few_values(spec):
    x = data(spec, 1)
    quantizer = ready(spec)
    y = quantizer(x)
    integers = quantizer.to_integer(x)
    assert torch.equal(integers.dequantize(), y)
    scales = integers.scale.flatten().tolist()
    for xs, ys, scale in zip(groups(spec, x), groups(spec, y), itertools.cycle(scales), strict=False):
        if spec.quantizer == "dorefa" and spec.role == "weight":
            expected = slow.dorefa_weight(xs.tolist(), spec.num_bits)
        else:
            low, high = code_range(spec)
            expected = [slow.uniform(v, scale, low, high) for v in xs.tolist()]
            codes = integers.codes
            assert codes.min() >= low and codes.max() <= high
        # A value within float error of a rounding tie may go either way.
        differs = (ys - torch.tensor(expected)).abs() > 1e-5
        assert differs.sum() == 0
        assert len(ys.unique()) <= 2**spec.num_bits


@pytest.mark.parametrize("spec", SPECS, ids=ident)
def test_gradients_are_the_written_formulas(spec):
    x = (data(spec, 2) * 3).requires_grad_()
    quantizer = ready(spec)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    scales = quantizer.to_integer(x.detach()).scale.flatten().tolist()
    quantizer(x).backward(grad)
    low, high = code_range(spec)
    expected_scale = []
    for xs, gs, dxs, scale in zip(
        groups(spec, x.detach()),
        groups(spec, grad),
        groups(spec, x.grad),
        itertools.cycle(scales),
        strict=False,
    ):
        if spec.quantizer == "lsq":
            dx, ds = slow.lsq_gradients(xs.tolist(), gs.tolist(), scale, low, high)
        elif spec.quantizer == "pact" or spec.role == "input":
            dx, ds = slow.pact_gradients(xs.tolist(), gs.tolist(), scale * high, scale * low)
        else:
            dx, ds = (gs * (1 - torch.tanh(xs) ** 2)).tolist(), 0.0
        torch.testing.assert_close(dxs, torch.tensor(dx), rtol=1e-5, atol=1e-6)
        expected_scale.append(ds)
    parameters = list(quantizer.parameters())
    assert len(parameters) == (0 if spec.quantizer == "dorefa" else 1)
    for parameter in parameters:
        torch.testing.assert_close(parameter.grad, torch.tensor(expected_scale), rtol=1e-4, atol=1e-4)


def test_gradients_on_the_bounds():
    # scale 1, range [0, 3]: on a bound counts as outside.
    x = torch.tensor([-1.0, 0.0, 1.25, 3.0, 4.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, 0, 3, rule="lsq").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0]
    assert scale.grad.item() == pytest.approx(0 + 0 - 0.25 + 3 + 3)
    x.grad = scale.grad = None
    fake_quantize(x, scale, 0, 3, rule="pact").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0]
    assert scale.grad.item() == 6


def test_a_large_tensor_is_worked_in_parts_with_the_same_gradients():
    x = torch.randn(16, 70000)
    grad = torch.randn_like(x)
    for scale_shape in ((), (16, 1)):
        for rule in ("lsq", "pact"):
            results = []
            for parts in (False, True):
                leaf = x.clone().requires_grad_()
                scale = torch.full(scale_shape, 0.3, requires_grad=True)
                # A transposed gradient is not contiguous, which takes the other route.
                g = grad if parts else grad.t().contiguous().t()
                fake_quantize(leaf, scale, -8, 7, rule=rule).backward(g)
                results.append((leaf.grad, scale.grad))
            assert torch.equal(results[0][0], results[1][0])
            torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("name", ("lsq", "pact"))
def test_on_grid_input_is_unchanged(name):
    spec = QuantSpec(name, 4, "input", signed=False)
    quantizer = ready(spec)
    scale = quantizer.to_integer(torch.zeros(1)).scale
    x = torch.arange(16) * scale
    assert torch.equal(quantizer(x), x)
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ("lsq", "pact"))
@pytest.mark.parametrize("value", (-0.5, 0.0))
def test_a_scale_driven_below_zero_is_finite_and_recovers(name, value):
    quantizer = ready(QuantSpec(name, 4, "input", signed=False))
    (parameter,) = quantizer.parameters()
    with torch.no_grad():
        parameter.fill_(value)
    x = torch.rand(1000)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().sum()
        assert torch.isfinite(loss)
        loss.backward()
        assert torch.isfinite(parameter.grad).all()
        optimizer.step()
    assert parameter.item() > SCALE_EPS
    assert (quantizer(x) - x).square().mean() < 0.01


@pytest.mark.parametrize("spec", SPECS[::3], ids=ident)
@pytest.mark.parametrize("x", (torch.zeros(6, 2), torch.full((6, 2), 0.7), torch.ones(6, 1)[:1]))
def test_degenerate_inputs_stay_finite(spec, x):
    if spec.per_channel and x.shape[0] != 6:
        x = x.expand(6, -1)
    quantizer = ready(spec, x)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(leaf.grad).all()
    if not (spec.quantizer == "dorefa" and spec.role == "weight"):
        torch.testing.assert_close(y, x, rtol=0.35, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS[::5], ids=ident)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_input_is_quantized_in_float32(spec, dtype):
    quantizer = ready(spec)
    x = data(spec, 4).to(dtype)
    expected = quantizer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


def test_states():
    quantizer = build_quantizer(QuantSpec("lsq", 4, "input"))
    x = torch.randn(5)
    with pytest.raises(RuntimeError, match="call aqdet.quantization.calibrate"):
        quantizer(x)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    quantizer.start_observing()
    assert quantizer(x) is x
    quantizer.finish_calibration("mse")
    assert not torch.equal(quantizer(x), x)
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))
    set_quantization(torch.nn.Sequential(quantizer), False)
    assert quantizer(x) is x


def test_a_reload_never_calibrates_and_checks_the_grid():
    spec = QuantSpec("lsq", 4, "input")
    quantizer = ready(spec)
    other = build_quantizer(spec)
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(50)
    assert torch.equal(other(x), quantizer(x))
    assert calibrate(torch.nn.Sequential(other), lambda: pytest.fail("ran")) == {}
    for wrong in (QuantSpec("lsq", 3, "input"), QuantSpec("lsq", 4, "input", signed=False)):
        with pytest.raises(RuntimeError, match="in the checkpoint and"):
            build_quantizer(wrong).load_state_dict(quantizer.state_dict())


@pytest.mark.parametrize(
    "values, words",
    [
        ({"quantizer": "lqs"}, "one of dorefa, lsq, pact"),
        ({"num_bits": 9}, "2 to 8, got 9"),
        ({"num_bits": 4.0}, "integer from 2 to 8"),
        ({"role": "bias"}, "'weight' or 'input'"),
        ({"role": "weight", "signed": False}, "weights are signed"),
        ({"role": "input", "per_channel": True}, "for weights"),
    ],
)
def test_wrong_specs_are_refused_with_what_is_valid(values, words):
    with pytest.raises(ValueError, match=words):
        build_quantizer(QuantSpec(**{"quantizer": "lsq", "num_bits": 4, "role": "input", **values}))


def test_straight_through_examples():
    x = torch.tensor([0.4, 1.5, 2.5], requires_grad=True)
    round_ste(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert round_ste(x).tolist() == [0, 2, 2] and x.grad.tolist() == [1, 2, 3]
    x.grad = None
    grad_scale(x, 0.5).sum().backward()
    assert x.grad.tolist() == [0.5] * 3
    s = torch.tensor(-1.0, requires_grad=True)
    floor_scale(s).backward()
    assert floor_scale(s).item() == pytest.approx(SCALE_EPS) and s.grad.item() == 1
    assert integer_range(4, True) == (-8, 7) and integer_range(4, True, True) == (-7, 7)
    assert integer_range(4, False) == (0, 15)
