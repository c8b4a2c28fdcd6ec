import datetime
import logging
import math
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from quantization import slow_reference as slow
from quantization.specs import bound, data, ready
from torch import nn

from aqdet.quantization import CALIBRATION_METHODS, QuantSpec, build_quantizer, calibrate
from aqdet.quantization.observer import HistogramObserver, Statistics, initial_scale, tensor_statistics

all_methods = pytest.mark.parametrize("method", CALIBRATION_METHODS)
BIN = 2 ** (1 / 32)


def site(signed=True, name="lsq"):
    return nn.Sequential(build_quantizer(QuantSpec(name, 4, "input", signed=signed)))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@all_methods
@pytest.mark.parametrize("name", ("lsq", "pact", "dorefa"))
def test_batches_merge(method, name):
    x = randn(4000) * torch.linspace(0.1, 3, 4000)
    one, two = site(name=name), site(name=name)
    shares = calibrate(one, lambda: one(x), method=method)
    assert calibrate(two, lambda: (two(x[:1000]), two(x[1000:])), method=method) == shares
    assert torch.equal(bound(one[0]), bound(two[0]))
    assert shares == {"0": pytest.approx((x < 0).sum().item() / 4000)}


@pytest.mark.parametrize("low, high", [(-8, 7), (-7, 7), (0, 15), (-2, 1)])
def test_methods_against_slow_computations(low, high):
    x = randn(500)
    statistics = tensor_statistics(x, False)

    def scale(method):
        (value,) = initial_scale(statistics, low, high, method).tolist()
        return value

    # An unsigned site cannot represent what is negative: it does not take part.
    seen = [v for v in x.tolist() if low < 0 or v >= 0]
    magnitudes = sorted(abs(v) for v in seen)
    assert scale("minmax") == pytest.approx(magnitudes[-1] / high)
    assert scale("mean") == pytest.approx(2 * sum(magnitudes) / len(seen) / math.sqrt(high), rel=1e-5)
    assert scale("percentile") == pytest.approx(magnitudes[math.ceil(0.999 * len(seen)) - 1] / high)
    _, error = slow.best_step(seen, low, high)
    assert slow.squared_error(seen, scale("mse"), low, high) < 1.02 * error
    assert slow.squared_error(seen, magnitudes[-1] / high, low, high) > 1.02 * error or low == -2


@pytest.mark.parametrize("outlier", (30.0, 300.0))
@pytest.mark.parametrize("name, bits", [("lsq", 2), ("lsqplus", 2), ("lqnet", 2), ("lsq", 4)])
def test_the_search_finds_a_range_far_below_an_outlier(name, bits, outlier):
    # The outlier is one of so many values that clipping it costs less than steps of its size would.
    x = randn(1_000_000)
    quantizer = build_quantizer(QuantSpec(name, bits, "input"))
    calibrate(nn.Sequential(quantizer), lambda: (quantizer(x), quantizer(torch.tensor([outlier]))), method="mse")
    with torch.no_grad():
        error = (quantizer.eval()(x) - x).square().mean() / x.square().mean()
    assert error < {2: 0.16, 4: 0.013}[bits]  # 0.149 and 0.012 are the best of LSQ's grid on a Gaussian


def test_percentile_of_many_values():
    values = torch.arange(1, 20001.0)[torch.randperm(20000, generator=torch.Generator().manual_seed(0))]
    (scale,) = initial_scale(tensor_statistics(values, False), 0, 15, "percentile").tolist()
    assert scale * 15 == pytest.approx(19980)


@all_methods
def test_a_weight_gets_the_scale_of_each_channel_exactly(method):
    spec = QuantSpec("lsq", 4, "weight", per_channel=True)
    w = data(spec)
    together = ready(spec, w, method).scale
    alone = [ready(QuantSpec("lsq", 4, "weight"), row, method).scale for row in w]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)
    if method == "minmax":
        assert together.tolist() == pytest.approx([row.abs().max().item() / 7 for row in w])


@pytest.mark.parametrize("name", ("lsq", "pact", "dorefa"))
def test_the_scale_becomes_the_method_s_own_parameter(name):
    model = site(signed=False, name=name)
    calibrate(model, lambda: model(torch.tensor([0.0, 1.0, 3.0])), method="minmax")
    expected = {"lsq": 3 / 15, "dorefa": 3 / 15, "pact": 3}[name]
    assert bound(model[0]).item() == pytest.approx(expected, rel=BIN - 1)


def test_the_histogram_is_close_to_the_exact_statistics():
    x = randn(20000)
    observer = HistogramObserver()
    observer.update(x)
    binned, exact = observer.statistics(), tensor_statistics(x, False)
    for statistics in (binned, exact):
        assert statistics.negative_share == pytest.approx((x < 0).sum().item() / 20000)
    assert binned.counts.sum() == 20000
    for method in CALIBRATION_METHODS:
        a, b = (initial_scale(s, -8, 7, method).item() for s in (binned, exact))
        assert a == pytest.approx(b, rel=0.05)


def test_the_histogram_by_hand():
    observer = HistogramObserver()
    assert observer.is_empty
    observer.update(torch.tensor([[0.0, -0.0, 1e-12], [1.0, 1.01, -2.0]], dtype=torch.bfloat16))
    observer.update(torch.tensor([1e20, -2.0]))
    statistics = observer.statistics()
    counts = dict(zip(statistics.values[0].tolist(), statistics.counts[0].tolist(), strict=True))
    half = math.sqrt(BIN)
    largest = 2.0**20 / half
    assert sorted(counts) == pytest.approx([-2 * half, 0, half, largest], rel=1e-5)
    assert [counts[value] for value in sorted(counts)] == [2, 3, 2, 1]
    assert statistics.negative_share == 2 / 8


@all_methods
def test_all_zero_values_give_a_usable_range(method):
    zero = Statistics(torch.zeros(2, 3), torch.ones(2, 3), 0.0)
    zero.values[1] = torch.tensor([0.5, 1.0, 2.0])
    scales = initial_scale(zero, 0, 15, method)
    assert scales[0].item() == pytest.approx(1 / 15)
    assert 0.05 < scales[1] < 1
    negative = Statistics(-torch.ones(1, 3), torch.ones(1, 3), 1.0)
    assert initial_scale(negative, 0, 15, method).item() == pytest.approx(1 / 15)


def test_an_unknown_method_is_refused_before_anything_runs():
    model = site()
    with pytest.raises(ValueError, match="one of mse, minmax, percentile, mean, got 'max'"):
        calibrate(model, lambda: pytest.fail("ran"), method="max")
    with pytest.raises(ValueError, match="got 'max'"):
        initial_scale(tensor_statistics(torch.ones(3), False), 0, 15, "max")


def test_negatives_on_an_unsigned_site_are_reported(caplog):
    model = nn.ModuleDict({"conv": site(signed=False), "add": site(signed=True)})
    x = torch.tensor([-1.0, 1.0, 2.0, 3.0])
    with caplog.at_level(logging.WARNING):
        shares = calibrate(model, lambda: (model["conv"](x), model["add"](x)))
    assert shares == {"conv.0": 0.25, "add.0": 0.25}
    (record,) = caplog.records
    assert "conv.0 is declared unsigned but 25.00 %" in record.getMessage()


def test_no_warning_where_nothing_is_negative(caplog):
    model = site(signed=False)
    with caplog.at_level(logging.WARNING):
        assert calibrate(model, lambda: model(torch.tensor([0.0, -0.0, 1.0]))) == {"0": 0.0}
    assert not caplog.records


@pytest.mark.parametrize("x", (None, torch.zeros(0, 3)), ids=("nothing", "empty"))
@pytest.mark.parametrize("role", ("input", "weight"))
def test_a_site_that_saw_no_data_is_named(x, role):
    model = nn.ModuleDict({"conv": build_quantizer(QuantSpec("lsq", 4, role))})
    with pytest.raises(RuntimeError, match="'conv' saw no data"):
        calibrate(model, lambda: x is None or model["conv"](x))
    with pytest.raises(RuntimeError, match="'conv' is not calibrated"):
        model["conv"](torch.ones(1))


@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("role", ("input", "weight"))
def test_values_that_are_not_finite_are_named(value, role):
    model = nn.ModuleDict({"conv": build_quantizer(QuantSpec("lsq", 4, role))})
    with pytest.raises(ValueError, match="'conv' saw values that are not finite"):
        calibrate(model, lambda: model["conv"](torch.tensor([1.0, value])))
    assert not model["conv"].is_calibrated
    with pytest.raises(RuntimeError, match="'conv' is not calibrated"):
        model["conv"](torch.ones(1))


def test_only_what_is_enabled_and_uncalibrated_takes_part():
    model = nn.ModuleDict({"old": ready(QuantSpec("lsq", 2, "input")), "off": site(), "new": site()})
    model["off"][0].enabled = False
    x, before = randn(100), model["old"].scale.item()
    seen = []

    def run():
        model["off"](x)
        seen.append(model["new"](model["old"](x)))

    assert list(calibrate(model, run)) == ["new.0"]
    assert model["old"].scale.item() == before and not model["off"][0].is_calibrated
    assert len(seen[0].unique()) == 4, "a calibrated quantizer keeps quantizing meanwhile"
    assert calibrate(model, lambda: pytest.fail("ran")) == {}


def test_calibration_leaves_no_graph_and_keeps_the_parameters():
    model = nn.Sequential(build_quantizer(QuantSpec("lsq", 4, "weight")))
    w = nn.Parameter(randn(30))
    parameter = model[0].scale
    calibrate(model, lambda: model(w))
    assert model[0].scale is parameter and parameter.requires_grad and parameter.is_leaf
    assert w.grad is None


def _rank_data(rank):
    return randn(2000, seed=rank) * (1 + 3 * rank)


def _rank(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=90),
    )
    try:
        scales = []
        for method in CALIBRATION_METHODS:
            model = site()
            calibrate(model, lambda m=model: m(_rank_data(rank)), method=method)
            scales.append(model[0].scale.item())
        # A rank without data takes part.
        model = site()
        calibrate(model, lambda: rank == 0 or model(_rank_data(1)))
        torch.save([*scales, model[0].scale.item()], os.path.join(folder, f"{rank}.pth"))
    finally:
        dist.destroy_process_group()


def test_ranks_agree_with_one_process_on_all_data(tmp_path):
    # This process is rank 0: a second new one would import everything as well.
    other = multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    try:
        _rank(0, str(tmp_path))
    finally:
        other.join(30)
        other.kill()
    expected = []
    for method in (*CALIBRATION_METHODS, "second rank alone"):
        model, alone = site(), method not in CALIBRATION_METHODS
        x = _rank_data(1) if alone else torch.cat([_rank_data(0), _rank_data(1)])
        calibrate(model, lambda m=model, x=x: m(x), method="mse" if alone else method)
        expected.append(model[0].scale.item())
    assert torch.load(tmp_path / "0.pth") == torch.load(tmp_path / "1.pth") == expected
