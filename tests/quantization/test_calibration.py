import logging
import math

import pytest
import torch
import torch.multiprocessing

from aqdet.quantization import QuantSpec, build_quantizer, calibrate
from aqdet.quantization.observer import (
    HistogramObserver,
    Statistics,
    initial_scale,
    tensor_statistics,
)


def site(signed=True, name="lsq"):
    model = torch.nn.Sequential(build_quantizer(QuantSpec(name, 4, "input", signed=signed)))
    return model


def test_batches_merge():
    x = torch.randn(4000)
    one, two = site(), site()
    calibrate(one, lambda: one(x))
    calibrate(two, lambda: (two(x[:1000]), two(x[1000:])))
    assert torch.equal(one[0].scale, two[0].scale)


def test_methods_against_slow_computations():
    x = torch.randn(1, 500)
    stats = tensor_statistics(x[0], False)
    values = sorted(abs(v) for v in x[0].tolist())
    assert initial_scale(stats, -8, 7, "minmax").item() == pytest.approx(values[-1] / 7)
    mean = 2 * sum(values) / len(values) / math.sqrt(7)
    assert initial_scale(stats, -8, 7, "mean").item() == pytest.approx(mean, rel=1e-5)
    percentile = values[math.ceil(0.999 * 500) - 1] / 7
    assert initial_scale(stats, -8, 7, "percentile").item() == pytest.approx(percentile)

    def error(scale):
        return sum((min(max(round(v / scale), -8), 7) * scale - v) ** 2 for v in x[0].tolist())

    best = min(error(values[-1] / 7 * f / 200) for f in range(4, 221))
    assert error(initial_scale(stats, -8, 7, "mse").item()) < 1.02 * best
    with pytest.raises(ValueError, match="one of mse, minmax, percentile, mean, got 'max'"):
        initial_scale(stats, -8, 7, "max")


def test_histogram_is_close_to_the_exact_statistics():
    x = torch.randn(20000)
    observer = HistogramObserver()
    observer.update(x)
    binned = observer.statistics()
    assert binned.negative_share == pytest.approx((x < 0).float().mean().item())
    assert binned.counts.sum() == 20000
    exact = tensor_statistics(x, False)
    for method in ("mse", "minmax", "percentile", "mean"):
        a, b = (initial_scale(s, -8, 7, method).item() for s in (binned, exact))
        assert a == pytest.approx(b, rel=0.05)


def test_all_zero_gives_a_usable_range():
    zero = Statistics(torch.zeros(1, 3), torch.ones(1, 3), 0.0)
    for method in ("mse", "minmax", "percentile", "mean"):
        assert initial_scale(zero, 0, 15, method).item() == pytest.approx(1 / 15)


def test_negatives_on_an_unsigned_site_are_reported(caplog):
    model = site(signed=False)
    x = torch.tensor([-1.0, 1.0, 2.0, 3.0])
    with caplog.at_level(logging.WARNING):
        assert calibrate(model, lambda: model(x)) == {"0": 0.25}
    assert "0 is declared unsigned but 25.00 %" in caplog.text


def test_a_site_that_is_not_reached_is_named():
    model = site()
    with pytest.raises(RuntimeError, match="'0' saw no data"):
        calibrate(model, lambda: None)
    with pytest.raises(RuntimeError, match="not calibrated"):
        model(torch.ones(1))


def _rank(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = site()
    x = torch.randn(2000, generator=torch.Generator().manual_seed(rank)) * (1 + 3 * rank)
    calibrate(model, lambda: model(x))
    results[rank] = model[0].scale.item()
    torch.distributed.destroy_process_group()


def test_ranks_agree_with_one_process_on_all_data(tmp_path):
    manager = torch.multiprocessing.Manager()
    results = manager.dict()
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "init"), results), nprocs=2)
    xs = [
        torch.randn(2000, generator=torch.Generator().manual_seed(rank)) * (1 + 3 * rank) for rank in (0, 1)
    ]
    model = site()
    calibrate(model, lambda: model(torch.cat(xs)))
    assert results[0] == results[1] == model[0].scale.item()
