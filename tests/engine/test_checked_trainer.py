"""Steps whose loss or gradient is not finite; test_diagnosis.py has whole trainings."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from aqdet.engine import NonFiniteLoss
from aqdet.engine.checked_trainer import CheckedAMPTrainer, CheckedTrainer


def test_mixed_precision_that_skips_every_step_is_not_silent():
    parameter = torch.nn.Parameter(torch.ones(1))
    for scale in (2.0**-16, 2.0**-17):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([parameter], 0.1)
        trainer = CheckedAMPTrainer(torch.nn.Linear(1, 1), [], optimizer, grad_scaler=scaler)
        with EventStorage(0):
            if scale == 2.0**-16:
                trainer._write_metrics({"loss": torch.ones(())}, 0.0)
            else:
                with pytest.raises(NonFiniteLoss, match="gradients in step after step, .* scaled the loss by 7.6e-06"):
                    trainer._write_metrics({"loss": torch.ones(())}, 0.0)


def test_losses_and_gradients_are_checked_by_name():
    model = torch.nn.Linear(1, 1)
    trainer = CheckedTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1))
    nan, one = torch.tensor(float("nan")), torch.ones(())
    with EventStorage(0):
        trainer._write_metrics({"loss": one}, 0.0)
        with pytest.raises(NonFiniteLoss, match="^loss_cls nan, loss_box inf$"):
            trainer._write_metrics({"loss_cls": nan, "loss": one, "loss_box": one / 0}, 0.0)
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.full((1,), float("inf"))
        with pytest.raises(NonFiniteLoss, match="^gradients of 1 parameters, bias among them$"):
            trainer._write_metrics({"loss": one}, 0.0)
        model.weight.grad, model.bias.grad = torch.full((1, 1), -3e38), torch.full((1,), 2e38)
        with pytest.raises(NonFiniteLoss, match="^norm of the gradient, which is largest in weight$"):
            trainer._write_metrics({"loss": one}, 0.0)
