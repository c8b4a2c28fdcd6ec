"""Everything that a training does, on a GPU that pretends: no tensor of the CPU meets one of the GPU."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import AUX, FCOS, QUANT, calibrated, make_batch, make_cfg, make_model
from pretended_gpu import DeviceMismatch, PretendedTensor, counting, pretending, to_pretended

from aqdet.engine.checked_trainer import CheckedTrainer
from aqdet.engine.forward_state import ForwardState
from aqdet.engine.hooks.oscillation import OscillationHook
from aqdet.engine.hooks.precise_bn import estimate_bn
from aqdet.engine.hooks.weight_average import WeightAverageHook
from aqdet.engine.solver import build_optimizer
from aqdet.modeling.scaffold import Distillation, without_scaffold
from aqdet.quantization import use_kernels

ALL = (
    *QUANT, *AUX, "MODEL.FPN.RELU", "True", "MODEL.AUX.TAPS", "both", "MODEL.EXTRA_LOSS.ENABLED", "True",
    "SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", "True",
)  # fmt: skip


def on_pretended_gpu(*overrides):
    model = make_model(*overrides, "MODEL.FPN.RELU", "True")
    # As a GPU has it in half precision, for one architecture.
    return to_pretended(model.to(memory_format=torch.channels_last) if FCOS[1] in overrides else model)


@pytest.mark.parametrize(
    "architecture, kernels, waits", [((), "lean", 18), (FCOS, "fused", 6)], ids=("RetinaNet", "FCOS")
)
def test_a_training_from_calibration_to_evaluation(architecture, kernels, waits):
    batch = make_batch()
    with pretending(), use_kernels(kernels), EventStorage(0) as storage:
        model, teacher = on_pretended_gpu(*ALL, *architecture), on_pretended_gpu(*architecture)
        model.distillation = Distillation(teacher, feature_weight=1.0, logit_weight=1.0)
        calibrated(model, batch)
        trainer = CheckedTrainer(model, [batch, batch], build_optimizer(make_cfg(*ALL, *architecture), model))
        trainer.iter = trainer.start_iter = 0
        oscillation = OscillationHook(model, dampening=0.1, threshold=0.01, threshold_start=0.1, momentum=0.01)
        average = WeightAverageHook(0.99)
        oscillation.trainer = average.trainer = SimpleNamespace(
            model=model, iter=1, start_iter=0, max_iter=100, storage=storage
        )
        state = ForwardState(model)
        for hook in (oscillation, average):
            hook.before_train()
        for _ in range(2):
            with counting() as iteration:
                before = state.get()
                trainer.run_step()
            for hook in (oscillation, average):
                with counting() as ledger:
                    hook.after_step()
                assert not ledger.waits, hook
        state.set(before)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert all(torch.isfinite(p.inner).all() for p in model.parameters())
        oscillation.after_train()
        estimate_bn(model, lambda: [batch], 1)
        model.eval()
        with torch.no_grad(), without_scaffold(model), average.applied():
            detections = model(batch)
        assert len(detections) == len(batch) and isinstance(detections[0]["instances"].scores, PretendedTensor)
    # No more than Detectron2's losses of one head; the trainer waits once, for losses and the gradient's norm together.
    assert iteration.waits.total() <= waits, iteration.waits
    assert sum(n for (_, place), n in iteration.waits.items() if place.startswith("aqdet/engine/")) == 1


def test_a_planted_mismatch_is_found_by_name():
    with pretending(), EventStorage(0):
        model = calibrated(on_pretended_gpu(*QUANT), make_batch())
        scale = model.backbone.bottom_up.res4[0].conv2.weight_quantizer
        scale.scale = torch.nn.Parameter(torch.ones(scale.num_scales))
        with pytest.raises(DeviceMismatch, match=r"aqdet/.*\.py:\d+ in backbone\.bottom_up\.res4\.0\.conv2"):
            model(make_batch())
