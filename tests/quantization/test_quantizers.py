import copy
import itertools
import math

import pytest
import torch
from quantization import slow_reference as slow
from quantization.specs import (
    FOUR_BITS,
    LATER_FOUR_BITS,
    LATER_SPECS,
    NUM_CHANNELS,
    SPECS,
    UNIFORM,
    bound,
    data,
    groups,
    ident,
    is_uniform,
    ready,
)
from torch import nn

from aqdet.quantization import QuantSpec, build_quantizer, calibrate, quantizers, set_quantization
from aqdet.quantization.functional import SCALE_EPS

all_specs = pytest.mark.parametrize("spec", SPECS, ids=ident)
uniform_specs = pytest.mark.parametrize("spec", UNIFORM, ids=ident)
every_spec = pytest.mark.parametrize("spec", SPECS + LATER_SPECS, ids=ident)
four_bit_specs = pytest.mark.parametrize("spec", FOUR_BITS + LATER_FOUR_BITS, ids=ident)


def on_and_around_the_bounds(spec, quantizer):
    """Moves the ranges to powers of two and returns codes -> values on, inside and outside the bounds."""
    low, high = slow.code_range(spec.quantizer, spec.num_bits, spec.signed)
    scales = [2.0 ** (i % 5 - 3) for i in range(quantizer.num_scales)]
    with torch.no_grad():
        bound(quantizer).copy_(torch.tensor(scales) * (high if spec.quantizer == "pact" else 1))
    points = [
        low - 3,
        low - 0.5,
        low,
        low + 0.25,
        -0.25,
        0,
        0.25,
        0.5,
        high - 0.25,
        high,
        high + 0.5,
        high + 9,
    ]
    return torch.tensor(points).expand(NUM_CHANNELS if spec.per_channel else 2, -1) * torch.tensor(scales).view(-1, 1)


def check_forward(spec, quantizer, x):
    y = quantizer(x)
    integers = quantizer.to_integer(x)
    low, high = slow.code_range(spec.quantizer, spec.num_bits, spec.signed)
    all_codes = groups(spec, integers.codes)
    bounds = bound(quantizer).tolist() if is_uniform(spec) else itertools.repeat(None)
    for xs, ys, codes, b in zip(groups(spec, x), groups(spec, y), all_codes, bounds, strict=False):
        if is_uniform(spec):
            scale = slow.step(spec.quantizer, b, high)
            pairs = [slow.uniform(v, scale, low, high) for v in xs.tolist()]
            expected_codes, expected = ([pair[i] for pair in pairs] for i in (0, 1))
            assert low <= min(expected_codes) and max(expected_codes) <= high
        else:
            expected_codes, expected = slow.dorefa_weights(xs.tolist(), spec.num_bits)
        assert codes.tolist() == expected_codes
        torch.testing.assert_close(ys, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def check_gradients(spec, quantizer, x):
    x = x.clone().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    quantizer(x).backward(grad)
    low, high = slow.code_range(spec.quantizer, spec.num_bits, spec.signed)
    bounds = bound(quantizer).tolist() if is_uniform(spec) else itertools.repeat(None)
    expected_bound = []
    all_groups = (groups(spec, t) for t in (x.detach(), grad, x.grad))
    for xs, gs, dxs, b in zip(*all_groups, bounds, strict=False):
        if spec.quantizer == "lsq":
            dx, db = slow.lsq_gradients(xs.tolist(), gs.tolist(), b, low, high)
        elif is_uniform(spec):
            alpha = b if spec.quantizer == "pact" else b * high
            dx, db = slow.pact_gradients(xs.tolist(), gs.tolist(), alpha, spec.signed)
        else:
            dx, db = slow.dorefa_weight_gradients(xs.tolist(), gs.tolist()), 0.0
        torch.testing.assert_close(dxs, torch.tensor(dx), rtol=1e-5, atol=1e-6)
        expected_bound.append(db)
    parameters = dict(quantizer.named_parameters())
    assert list(parameters) == {"lsq": ["scale"], "pact": ["alpha"], "dorefa": []}[spec.quantizer]
    for parameter in parameters.values():
        # Sums over the elements that share a bound, to the size of one.
        factor = 1 / math.sqrt(x.numel() // parameter.numel() * high)
        expected = torch.tensor(expected_bound)
        torch.testing.assert_close(parameter.grad * factor, expected * factor, rtol=1e-4, atol=1e-5)


@all_specs
def test_forward_is_the_papers_formula(spec):
    quantizer = ready(spec)
    check_forward(spec, quantizer, data(spec, 1) * 1.5)
    if is_uniform(spec):
        check_forward(spec, quantizer, on_and_around_the_bounds(spec, quantizer))


@all_specs
def test_gradients_are_the_papers_formulas(spec):
    quantizer = ready(spec)
    check_gradients(spec, quantizer, data(spec, 2) * 1.5)
    if is_uniform(spec):
        quantizer.zero_grad()
        check_gradients(spec, quantizer, on_and_around_the_bounds(spec, quantizer))


def test_dorefa_weight_gradient_is_the_slope_of_tanh():
    quantizer = ready(QuantSpec("dorefa", 4, "weight"))
    w = torch.tensor([-1.5, -0.2, 0.0, 0.7], requires_grad=True)
    quantizer(w).sum().backward()
    assert w.grad.tolist() == pytest.approx([slow.slope(math.tanh, v) for v in w.tolist()], abs=1e-5)


@pytest.mark.parametrize("spec", LATER_SPECS, ids=ident)
def test_b_bits_are_b_bits_of_the_later_methods_too(spec):
    quantizer = ready(spec)
    for x in (data(spec, 4) * 3, data(spec, 4).expand(3, *data(spec).shape) if spec.role == "input" else data(spec)):
        y = quantizer.eval()(x)
        assert all(len(values.unique()) <= 2**spec.num_bits for values in groups(spec, y))
        if spec.quantizer == "lqnet":
            continue
        integers = quantizer.to_integer(x)
        assert integers.codes.dtype == torch.int32 and integers.scale.dtype == torch.float32
        assert torch.equal(integers.dequantize(), y)
        if spec.quantizer == "lsqodd":
            assert integers.codes.abs().max() <= 2**spec.num_bits - 1 and (integers.codes % 2 == 1).all()
            continue
        low = 0 if spec.quantizer == "lsqplus" or not spec.signed else -(2 ** (spec.num_bits - 1))
        assert low <= integers.codes.min() and integers.codes.max() <= low + 2**spec.num_bits - 1
        assert low <= integers.zero_point <= low + 2**spec.num_bits - 1
    # Wide data reaches every level of few bits.
    if spec.num_bits <= 2:
        assert all(len(values.unique()) == 2**spec.num_bits for values in groups(spec, quantizer(data(spec, 4) * 3)))


@pytest.mark.parametrize(
    "spec, number",
    [
        (QuantSpec("lsq", 4, "weight", per_channel=True), NUM_CHANNELS),
        (QuantSpec("lsqplus", 4, "input"), 2),
        (QuantSpec("lsqplus", 4, "input", signed=False), 1),
        (QuantSpec("lqnet", 4, "weight", per_channel=True), 4 * NUM_CHANNELS),
        (QuantSpec("n2uq", 4, "input"), 16),
        (QuantSpec("lsqodd", 2, "weight", per_channel=True, centered=True), NUM_CHANNELS),
    ],
)
def test_how_many_numbers_ship(spec, number):
    assert build_quantizer(spec, num_channels=NUM_CHANNELS).num_constants == number


@all_specs
def test_b_bits_are_b_bits_and_the_integers_are_exact(spec):
    quantizer = ready(spec)
    x = data(spec, 4) * 3
    y = quantizer(x)
    integers = quantizer.to_integer(x)
    assert integers.codes.dtype == torch.int32 and integers.scale.dtype == torch.float32
    assert torch.equal(integers.dequantize(), y)
    for codes, values in zip(groups(spec, integers.codes), groups(spec, y), strict=True):
        assert len(codes.unique()) == len(values.unique()) <= 2**spec.num_bits
        if is_uniform(spec):
            low, high = slow.code_range(spec.quantizer, spec.num_bits, spec.signed)
            assert low <= codes.min() and codes.max() <= high
        else:
            assert codes.abs().max() == 2**spec.num_bits - 1 and (codes % 2 == 1).all()


@uniform_specs
def test_values_on_the_grid_are_unchanged_and_zero_is_zero(spec):
    quantizer = ready(spec)
    low, high = slow.code_range(spec.quantizer, spec.num_bits, spec.signed)
    scales = quantizer.to_integer(data(spec)).scale.reshape(-1, 1)
    x = torch.arange(low, high + 1) * scales
    assert torch.equal(quantizer(x), x)
    zero = torch.zeros_like(x)
    assert torch.equal(quantizer(zero), zero)
    assert not quantizer.to_integer(zero).codes.any() and quantizer.to_integer(zero).zero_point == 0


@pytest.mark.parametrize("spec", [s for s in FOUR_BITS if s.quantizer != "dorefa"], ids=ident)
@pytest.mark.parametrize("value", (-0.3, 0.0, -1e-12))
def test_a_range_driven_below_zero_is_finite_and_recovers(spec, value):
    quantizer = ready(spec)
    with torch.no_grad():
        bound(quantizer).fill_(value)
    x = data(spec)
    leaf = x.clone().requires_grad_()
    quantizer(leaf).square().sum().backward()
    assert torch.isfinite(leaf.grad).all() and torch.isfinite(bound(quantizer).grad).all()
    # A step size grows far less than alpha has to.
    optimizer = torch.optim.Adam(quantizer.parameters(), lr={"lsq": 0.02, "pact": 0.1}[spec.quantizer])
    for _ in range(80):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().sum()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert (bound(quantizer) > SCALE_EPS).all()
    assert loss < 0.15 * x.square().sum()


@four_bit_specs
@pytest.mark.parametrize("shape", ((NUM_CHANNELS, 4, 3, 3), (NUM_CHANNELS, 1), (1,)), ids=str)
@pytest.mark.parametrize("value", (0.0, 0.7, 1e-30, 1e30))
def test_constant_and_one_element_tensors_stay_finite(spec, shape, value):
    if spec.per_channel and shape == (1,):
        shape = (NUM_CHANNELS,)
    x = torch.full(shape, value)
    for method in ("mse", "minmax", "percentile", "mean"):
        quantizer = ready(spec, x, method)
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.sum().backward()
        for tensor in (y, leaf.grad, *(p.grad for p in quantizer.parameters())):
            assert torch.isfinite(tensor).all()
        if spec.quantizer != "lqnet":
            assert torch.equal(quantizer.to_integer(x).dequantize(), y)
        if is_uniform(spec) and not spec.centered and value == 0.7 and method in ("mse", "minmax"):
            torch.testing.assert_close(y, x, rtol=0.02, atol=0)


@uniform_specs
def test_an_empty_tensor_passes(spec):
    x = torch.zeros(NUM_CHANNELS, 0, requires_grad=True)
    ready(spec)(x).sum().backward()
    assert x.grad.shape == x.shape


@four_bit_specs
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_quantized_in_float32(spec, dtype):
    quantizer = ready(spec).eval()
    x = data(spec, 4).to(dtype)
    leaf32, leaf16 = x.float().requires_grad_(), x.clone().requires_grad_()
    expected = quantizer(leaf32)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in quantizer.parameters()]
    quantizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(leaf16)
        y.float().sum().backward()
    assert y.dtype == leaf16.grad.dtype == dtype
    if spec.quantizer != "lqnet":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            integers = quantizer.to_integer(x)
        assert torch.equal(integers.codes, quantizer.to_integer(x.float()).codes)
        assert torch.equal(integers.dequantize(), expected)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(leaf16.grad, leaf32.grad.to(dtype))
    for parameter, gradient in zip(quantizer.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@four_bit_specs
def test_a_model_cast_to_bfloat16_keeps_float32_arithmetic(spec):
    quantizer = ready(spec).bfloat16().eval()
    x = data(spec, 4)
    y = quantizer(x.clone().requires_grad_())
    assert y.dtype == torch.float32
    if spec.quantizer != "lqnet":
        integers = quantizer.to_integer(x)
        assert integers.scale.dtype == torch.float32
        assert torch.equal(y, integers.dequantize())
    y.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in quantizer.parameters())


def test_states():
    quantizer, seen = build_quantizer(QuantSpec("lsq", 4, "input")), []
    x = torch.randn(5)
    assert not quantizer.is_calibrated and not quantizer.is_active
    with pytest.raises(RuntimeError, match=r"'LSQQuantizer' is not calibrated: call aqdet\.quantization\.cal"):
        quantizer(x)
    quantizer.name = "backbone.conv1.input_quantizer"
    with pytest.raises(RuntimeError, match=r"'backbone\.conv1\.input_quantizer' is not calibrated"):
        quantizer(x)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    calibrate(quantizer, lambda: seen.append((quantizer(x) is x, quantizer.is_active)))
    assert seen == [(True, False)] and not quantizer._forward_pre_hooks
    assert quantizer.is_calibrated and quantizer.is_active
    assert not torch.equal(quantizer(x), x)


def test_all_quantizers_of_a_model_are_found_and_switched():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": ready(QuantSpec("lsq", 2, "input"))}))
    assert [name for name, _ in quantizers(model)] == ["1.a"]
    x = torch.randn(5)
    set_quantization(model, False)
    assert model[1]["a"](x) is x
    set_quantization(model, True)
    assert not torch.equal(model[1]["a"](x), x)


@every_spec
@pytest.mark.parametrize("assign", (False, True))
def test_a_reload_is_exact_and_never_calibrates(spec, assign, tmp_path):
    quantizer = ready(spec)
    torch.save(quantizer.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    other = build_quantizer(spec, num_channels=NUM_CHANNELS)
    assert "uncalibrated" in repr(other)
    other.load_state_dict(state, assign=assign)
    quantizer.eval(), other.eval()
    assert "uncalibrated" not in repr(other)
    x = data(spec, 5)
    assert torch.equal(other(x), quantizer(x))
    assert calibrate(nn.Sequential(other), lambda: pytest.fail("calibrated again")) == {}
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@four_bit_specs
def test_copies_behave_alike(spec):
    quantizer = ready(spec)
    x = data(spec, 5)
    quantizer.eval()
    for other in (copy.deepcopy(quantizer), copy.deepcopy(quantizer).to("cpu").train().eval()):
        assert other.is_calibrated and torch.equal(other(x), quantizer(x))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in quantizer.parameters()}
    assert not copy.deepcopy(build_quantizer(spec, num_channels=NUM_CHANNELS)).is_calibrated


@pytest.mark.parametrize(
    "wrong, words",
    [
        (QuantSpec("lsq", 3, "input"), "0.num_bits is 4 in the checkpoint and 3 in the model"),
        (QuantSpec("lsq", 4, "input", signed=False), "0.signed is True in the checkpoint and False"),
    ],
)
def test_a_checkpoint_of_another_grid_is_refused(wrong, words):
    state = nn.Sequential(ready(QuantSpec("lsq", 4, "input"))).state_dict()
    with pytest.raises(RuntimeError, match=words):
        nn.Sequential(build_quantizer(wrong)).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    "stored, own, words",
    [
        (
            QuantSpec("lsq", 4, "input"),
            QuantSpec("dorefa", 4, "input"),
            "quantizer is lsq in the checkpoint and dorefa in the model",
        ),
        (
            QuantSpec("dorefa", 4, "weight", per_channel=True),
            QuantSpec("dorefa", 4, "weight"),
            "per_channel is True in the checkpoint and False in the model",
        ),
        (
            QuantSpec("lsqodd", 2, "weight", per_channel=True),
            QuantSpec("lsqodd", 2, "weight", per_channel=True, centered=True),
            "centered is False in the checkpoint and True in the model",
        ),
        (
            QuantSpec("lsqodd", 2, "weight", centered=True),
            QuantSpec("lsqodd", 2, "weight"),
            "centered is True in the checkpoint and False in the model",
        ),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(stored, own, words):
    state = ready(stored).state_dict()
    with pytest.raises(RuntimeError, match=words):
        build_quantizer(own).load_state_dict(state, strict=False)


def as_of_version_1(spec, state):
    """A state as it was written before, with the identity of the quantizer in three buffers."""
    kind = spec.quantizer + "/channel" * spec.per_channel
    identity = {
        "num_bits": torch.tensor(spec.num_bits),
        "signed": torch.tensor(spec.signed),
        "kind": torch.tensor(list(kind.encode().ljust(24)), dtype=torch.uint8),
    }
    return {**{key: value for key, value in state.items() if key != "_extra_state"}, **identity}


@every_spec
def test_a_checkpoint_of_before_loads_strictly(spec):
    quantizer = ready(spec).eval()
    other = build_quantizer(spec, num_channels=NUM_CHANNELS).eval()
    other.load_state_dict(as_of_version_1(spec, quantizer.state_dict()))
    assert other.is_calibrated and torch.equal(other(data(spec, 5)), quantizer(data(spec, 5)))


@pytest.mark.parametrize(
    "stored, words",
    [
        (QuantSpec("lsq", 3, "weight"), "num_bits is 3 in the checkpoint and 4 in the model"),
        (QuantSpec("pact", 4, "weight"), "quantizer is pact in the checkpoint and lsq in the model"),
        (QuantSpec("lsq", 4, "weight", per_channel=True), "per_channel is True in the checkpoint and False"),
        (QuantSpec("lsq", 4, "input", signed=False), "signed is False in the checkpoint and True"),
    ],
)
def test_a_checkpoint_of_before_of_another_quantizer_is_refused(stored, words):
    state = as_of_version_1(stored, ready(stored).state_dict())
    quantizer = build_quantizer(QuantSpec("lsq", 4, "weight"))
    with pytest.raises(RuntimeError, match=words):
        quantizer.load_state_dict(state, strict=False)
    assert not quantizer.is_calibrated


def test_a_partial_checkpoint_does_not_count_as_calibrated():
    spec = QuantSpec("lsq", 4, "weight")
    state = ready(spec).state_dict()
    del state["scale"]
    quantizer = build_quantizer(spec)
    assert quantizer.load_state_dict(state, strict=False).missing_keys == ["scale"]
    assert not quantizer.is_calibrated and not quantizer.calibrated
    with pytest.raises(RuntimeError, match="not calibrated"):
        quantizer(torch.randn(3))


def test_a_float_checkpoint_leaves_a_calibrated_quantizer_as_it_is():
    quantizer = ready(QuantSpec("lsq", 4, "input"))
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.is_calibrated and quantizer.calibrated


def test_loading_an_uncalibrated_checkpoint_is_uncalibrated():
    spec = QuantSpec("pact", 4, "input")
    quantizer = ready(spec)
    quantizer.load_state_dict(build_quantizer(spec).state_dict())
    assert not quantizer.is_calibrated


@pytest.mark.parametrize(
    "values, words",
    [
        ({"quantizer": "lqs"}, "inputs must be one of dorefa, lqnet, lsq, lsqplus, n2uq, pact, got 'lqs'"),
        ({"num_bits": 9}, "NUM_BITS must be an integer from 2 to 8, got 9"),
        ({"num_bits": 1}, "from 2 to 8, got 1"),
        ({"num_bits": 4.0}, "from 2 to 8, got 4.0"),
        ({"num_bits": True}, "from 2 to 8, got True"),
        ({"role": "bias"}, "'weight' or 'input', got 'bias'"),
        ({"role": "weight", "signed": False}, "weights are signed"),
        ({"role": "input", "per_channel": True}, "per-channel scales are for weights"),
        ({"quantizer": "lsqodd", "role": "weight", "num_bits": 5}, "from 1 to 4 for lsqodd, got 5"),
        ({"quantizer": "lsqodd", "role": "weight", "num_bits": 0}, "from 1 to 4 for lsqodd, got 0"),
        ({"quantizer": "lsqodd"}, "inputs must be one of dorefa, lqnet, lsq, lsqplus, n2uq, pact, got 'lsqodd'"),
        ({"role": "weight", "centered": True}, "WEIGHT.CENTERED must be False with WEIGHT.QUANTIZER lsq: .* lsqodd"),
    ],
)
def test_wrong_specs_are_refused_with_what_is_valid(values, words):
    with pytest.raises(ValueError, match=words):
        build_quantizer(QuantSpec(**{"quantizer": "lsq", "num_bits": 4, "role": "input", **values}))
