"""LQ-Nets: quantized values from a learned basis (Zhang et al., ECCV 2018, arXiv 1807.10029)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import SCALE_EPS, integer_range, replace_ste
from ..graph import is_recomputing
from ..observer import Statistics, search_fractions
from ..quantizer import Quantizer
from ..spec import QuantSpec
from .thresholds import count_below, sum_by_index

MOMENTUM = 0.9
REGULARIZER = 1e-4
_CALIBRATION_STEPS = 10
_NUM_SAMPLES = 2**18


class LQNetQuantizer(Quantizer):
    """Quantized values are the combinations ``B v`` of a learned basis v of b values; x goes to the nearest one.

    Weights combine the basis with signs, activations with zeros and ones. The basis is no parameter: each
    training forward moves it to the least-squares optimum for the codes at hand,
    ``v <- 0.9 v + 0.1 (B'B)^-1 B'x``, after quantizing with the basis as it was. The gradient is
    straight-through: everywhere for weights, between the outer values for activations. A site that is declared
    unsigned includes the ReLU.

    ``B'B`` is singular where codes do not tell the basis values apart, as for constant weights. As in the
    authors' code a little of the present basis is added, ``(B'B + eI)^-1 (B'x + ev)``, which leaves what
    the data does not determine as it is.

    Deviations:

    - That term is added for activations, too.
    - Signed activation sites start from two's complement, ``v = s (1, 2, ..., -2^(b-1))``, so that zero is a value.
      Weights have no value at zero.
    - The calibration method makes no difference: the first basis is the best one with equidistant values, refined by
      ten of the paper's alternations. The last of them takes all calibration values, the others a sample.
    - Activation statistics are summed over ranks, and over the calls of an iteration where a layer runs on several
      pyramid levels. So an iteration moves the basis by a tenth of the way, whatever the number of calls.

    Activation checkpointing computes a forward once more in backward, with the basis of that forward, which does not
    move again. With several forwards since the last backward, that basis is not known, and an error is raised.

    The values are not equidistant, so that there is no integer form.
    """

    basis: Tensor

    def __init__(self, spec: QuantSpec, num_channels: int = 1) -> None:
        super().__init__(spec, num_channels)
        self.register_buffer("basis", self._uniform(torch.ones(self.num_scales)))
        self._num_moves = 0  # of the basis since the last backward
        self._moved_from: Tensor | None = None  # the basis before the last move
        # The basis before the first move since the last backward, and the number and sum of what went to each value.
        self._started_from: tuple[Tensor, Tensor | int, Tensor | int] | None = None
        self._backward_ran = False

    @property
    def num_constants(self) -> int:
        """See :attr:`Quantizer.num_constants`."""
        return self.basis.numel()

    def _uniform(self, scale: Tensor) -> Tensor:
        """Returns the ``(C, b)`` basis of equidistant values with step ``scale``, shape ``(C,)``."""
        basis = scale[:, None] * 2.0 ** torch.arange(self.spec.num_bits, device=scale.device)
        if self.spec.role == "weight":
            return basis / 2
        if self.spec.signed:
            basis[:, -1].neg_()
        return basis

    def _bits(self) -> Tensor:
        """Returns the ``(2^b, b)`` factors of the basis: -1 and 1 for weights, 0 and 1 for activations."""
        index = torch.arange(2**self.spec.num_bits, device=self.basis.device)[:, None]
        bits = (index >> torch.arange(self.spec.num_bits, device=self.basis.device) & 1).double()
        return 2 * bits - 1 if self.spec.role == "weight" else bits

    def _sorted_grid(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(C, 2^b)`` ascending values, float64, and ``(C, 2^b, b)`` their factors."""
        bits = self._bits()
        grid, order = (bits * basis.double()[:, None]).sum(dim=2).sort(dim=1)
        return grid, bits[order]

    def _set_range(self, statistics: Statistics, method: str) -> None:
        """Sets the basis in place, see the class; ``method`` makes no difference."""
        # Those of activations are on the CPU.
        values, counts = (t.to(self.basis.device) for t in (statistics.values, statistics.counts))
        if not self.spec.signed:
            counts = counts * (values >= 0)
            values = values.clamp(min=0)
        few = values, counts
        if values.numel() > _NUM_SAMPLES:
            shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0))
            sample = shuffled[: max(_NUM_SAMPLES // len(values), 2**self.spec.num_bits)].to(values.device)
            few = values[:, sample], counts[:, sample]
        basis = self._best_uniform(*few, values.abs().amax(dim=1))
        for some_values, some_counts in [few] * (_CALIBRATION_STEPS - 1) + [(values, counts)]:
            index = _nearest(some_values, self._sorted_grid(basis)[0].float())
            basis = basis + self._correction(basis, *_histogram(index, some_values, some_counts, self.spec.num_bits))
        self.basis.copy_(basis)

    def _best_uniform(self, values: Tensor, counts: Tensor, largest: Tensor) -> Tensor:
        """Returns the basis of equidistant values of least squared error, by channel."""
        quant_max = integer_range(self.spec.num_bits, self.spec.signed)[1]
        largest = torch.where(largest > SCALE_EPS, largest, torch.ones_like(largest))

        def basis_of(fractions: Tensor) -> Tensor:
            return self._uniform(largest * (fractions / quant_max))

        def errors(fractions: Tensor) -> Tensor:
            grid = self._sorted_grid(basis_of(fractions))[0].float()
            difference = grid.gather(1, _nearest(values, grid)) - values
            return (difference.square() * counts).sum(dim=1)

        return basis_of(search_fractions(errors, largest))

    def _correction(self, basis: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
        """Returns the ``(C, b)`` way from the basis to the least-squares optimum for the codes.

        Args:
            basis: ``(C, b)``.
            counts, sums: ``(C, 2^b)`` float64, how many inputs each quantized value got, and their sum.
        """
        grid, bits = self._sorted_grid(basis)
        weighted = bits * counts[..., None]
        gram = weighted.transpose(1, 2) @ bits
        gram += REGULARIZER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        residual = ((sums - counts * grid)[..., None] * bits).sum(dim=1)
        correction, _ = torch.linalg.solve_ex(gram, residual)  # without a check that a GPU would wait for
        return torch.where(correction.isfinite(), correction, 0.0).to(basis.dtype)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See :meth:`Quantizer.fake_quantize`; in a training forward with gradients also updates the basis.

        Raises:
            RuntimeError: naming the quantizer, if it cannot be computed again as activation checkpointing asks for.
        """
        basis, moves = self._basis_for_call()
        grid = self._sorted_grid(basis)[0].float()
        x32 = x.float()
        if self.spec.role == "input":
            x32 = x32 if self.spec.signed else torch.relu(x32)
            clipped = x32.clamp(grid[0, 0], grid[0, -1])
        else:
            clipped = x32
        with torch.no_grad():
            rows = x32.reshape(self.num_scales, x.numel() // self.num_scales)
            index = _nearest(rows, grid)
            quantized = grid.gather(1, index).view_as(x)
        if moves:
            self._update(rows, index)
        y = replace_ste(clipped, quantized).to(self.value_dtype(x.dtype))
        if y.requires_grad:
            y.register_hook(self._note_backward)
        elif moves:
            self._backward_ran = True  # none will
        return y

    def _basis_for_call(self) -> tuple[Tensor, bool]:
        """Returns the basis that a call of forward quantizes with, and whether it then moves."""
        moves = self.training and torch.is_grad_enabled() and not self.frozen
        if not is_recomputing():
            if self._backward_ran:
                self._num_moves, self._moved_from, self._backward_ran = 0, None, False
                self._started_from = None
            return self.basis, moves
        self._backward_ran = True
        if self._num_moves > 1:
            raise RuntimeError(
                f"quantizer '{self.name}' (lqnet) moved its basis {self._num_moves} times since the last backward, and "
                "activation checkpointing cannot compute one of these forwards again: leave its layer out of it, or "
                f"use another MODEL.QUANT.{self.spec.role.upper()}.QUANTIZER"
            )
        if self._moved_from is None:  # the first forward was without gradients
            return self.basis, moves
        return self._moved_from, False

    def _note_backward(self, grad: Tensor) -> None:
        self._backward_ran = True

    @torch.no_grad()
    def _update(self, rows: Tensor, index: Tensor) -> None:
        counts, sums = _histogram(index, rows, None, self.spec.num_bits)
        if self.spec.role == "input" and dist.is_available() and dist.is_initialized():
            both = torch.stack([counts, sums])
            dist.all_reduce(both)
            counts, sums = both
        self._moved_from, self._num_moves = self.basis.clone(), self._num_moves + 1
        start, earlier_counts, earlier_sums = self._started_from or (self._moved_from, 0, 0)
        counts, sums = counts + earlier_counts, sums + earlier_sums
        self._started_from = start, counts, sums
        basis = start.float()
        self.basis.copy_(basis + (1 - MOMENTUM) * self._correction(basis, counts, sums))


def _nearest(rows: Tensor, grid: Tensor) -> Tensor:
    """Returns the index of the nearest of the ascending values; half-way between two, the lower one.

    Args:
        rows: ``(C, K)`` float32.
        grid: ``(C, 2^b)`` float32.
    """
    thresholds = (grid[:, 1:] + grid[:, :-1]) / 2
    return count_below(rows, thresholds)


def _histogram(index: Tensor, rows: Tensor, counts: Tensor | None, num_bits: int) -> tuple[Tensor, Tensor]:
    """Returns number and sum, ``(C, 2^b)`` float64, of the inputs at each value, which ``counts`` weights."""
    channels, size = len(rows), 2**num_bits
    flat = (index + size * torch.arange(channels, device=index.device)[:, None]).flatten()
    weights = torch.ones_like(rows) if counts is None else counts
    number, total = (
        sum_by_index(value.flatten(), flat, channels * size).view(channels, size) for value in (weights, rows * weights)
    )
    return number, total
