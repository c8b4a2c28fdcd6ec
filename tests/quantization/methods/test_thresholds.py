import pytest
import torch
from pretended_gpu import PretendedTensor, pretending

from aqdet.quantization.methods.thresholds import count_below, sum_by_index


@pytest.mark.parametrize("number", (1, 15, 16, 17, 255))
def test_counts_below_by_a_loop(number):
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.randn(3, number, generator=generator).sort(dim=1).values
    # A value on a threshold is not above it.
    rows = torch.cat([torch.randn(3, 200, generator=generator), thresholds, torch.tensor([[-9.0, 9.0]] * 3)], dim=1)
    expected = [
        [sum(t < x for t in row) for x in xs] for row, xs in zip(thresholds.tolist(), rows.tolist(), strict=True)
    ]
    count = count_below(rows, thresholds)
    assert count.dtype == torch.int64 and count.tolist() == expected
    traced = torch.jit.trace(count_below, (rows, thresholds))
    assert traced(rows, thresholds).tolist() == expected


@pytest.mark.parametrize("size", (3, 16, 40_000))
def test_sums_by_index_are_spread_on_a_gpu(size):
    generator = torch.Generator().manual_seed(0)
    values, index = torch.randn(5000, generator=generator), torch.randint(0, size, (5000,), generator=generator)
    expected = torch.stack([values.double()[index == k].sum() for k in range(min(size, 16))])
    with pretending():
        found = sum_by_index(PretendedTensor(values), PretendedTensor(index), size).inner
    for sums in (found, sum_by_index(values, index, size)):
        assert sums.dtype == torch.float64 and sums.shape == (size,)
        torch.testing.assert_close(sums[:16], expected, rtol=1e-12, atol=1e-12)
