"""Scales learn at one rate in real trainings, whatever the optimizer, bit width and image size."""

import pytest
from engine.scale_moves import ScaleMoves, scales_overrides
from tiny_data import train_cfg, write_dataset

from aqdet.engine import Trainer


def check_moves(found):
    """No 8-bit scale doubles or halves in 50 iterations, and every scale of an input learns."""
    assert {(bits, role) for _, bits, role, _, _ in found.values()} >= {(8, "weight"), (8, "input")}
    for name, (method, bits, role, low, high) in found.items():
        if bits == 8:
            assert 0.5 < low <= high < 2, name
        # PACT's range, of tensors that several layers read, has a gradient only where it clips, and may clip nothing.
        if role == "input" and method != "pact":
            assert max(high - 1, 1 - low) > 1e-3, name


@pytest.mark.parametrize("optimizer, bits, size", [("SGD", 2, 64), ("SGD", 4, 96), ("AdamW", 2, 96), ("AdamW", 4, 64)])
def test_50_iterations_move_every_input_scale_and_explode_none(tmp_path, optimizer, bits, size):
    entry = write_dataset(tmp_path / "data", "tiny_scales", size=size)
    trainer = Trainer(train_cfg(entry, tmp_path / "run", *scales_overrides(optimizer, bits, size), max_iter=50))
    moves = ScaleMoves()
    trainer.register_hooks([moves])
    trainer.resume_or_load(resume=False)
    trainer.train()
    check_moves(moves.found)
