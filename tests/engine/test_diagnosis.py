"""Explanations of steps that failed."""

import pytest
import torch
from detectron2.engine import HookBase
from helpers import AUX, QUANT, calibrated, losses_of, make_batch, make_model
from tiny_data import NARROW, train_cfg, write_dataset

from aqdet.engine import NonFiniteLoss, Trainer
from aqdet.engine.diagnosis import NonFiniteTensor, all_finite, find_non_finite

BOTH = (*QUANT, *AUX, "MODEL.FPN.RELU", "True")


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_diagnosis")


@pytest.fixture(scope="module")
def model():
    return calibrated(make_model(*BOTH), make_batch())


def non_finite_in(model):
    def run():
        with torch.no_grad():
            losses_of(model, make_batch())

    return find_non_finite(model, run)


def break_in_call(module, number):
    """Makes the output of a module's nth call, counted from 0, not a number."""
    calls = []

    def hook(_, inputs, output):
        calls.append(None)
        return output * float("nan") if len(calls) == number + 1 else output

    return module.register_forward_hook(hook)


def test_nested_tensors():
    nan = torch.tensor(float("nan"))
    assert all_finite([torch.ones(2), {"a": (torch.ones(1), "text", None)}, torch.tensor(3)])
    assert not all_finite([torch.ones(2), {"a": (nan, "text")}])


def test_a_finite_model_has_none(model):
    assert non_finite_in(model) is None


@pytest.mark.parametrize(
    "layer, call, level",
    [
        ("head.cls_subnet.0", 1, "p4"),
        ("auxiliary.head.bbox_pred", 4, "p7"),
        ("backbone.fpn_output4", 0, "p4"),
        ("backbone.bottom_up.res3.0.conv2", 0, "res3"),
    ],
)
def test_the_layer_and_its_level_are_found(model, layer, call, level):
    handle = break_in_call(model.get_submodule(layer), call)
    found = non_finite_in(model)
    handle.remove()
    assert found.what == f"output of {layer}" and found.level == level
    if not layer.startswith("auxiliary"):
        assert f"{layer}.weight_quantizer" in found.around and f"{layer}.input_quantizer" in found.around
        assert 2 < len(found.around) <= 6


def test_what_a_layer_computes_before_its_norm_is_the_layer_s(model):
    conv = model.backbone.bottom_up.res4[0].conv1
    handle = conv.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] * float("inf"),))
    found = non_finite_in(model)
    handle.remove()
    assert found.what == "output of backbone.bottom_up.res4.0.conv1"


def test_pixels_that_are_not_finite(model):
    std = model.pixel_std.clone()
    model.pixel_std.zero_()
    found = non_finite_in(model)
    model.pixel_std.copy_(std)
    assert found.what == "output of the preprocessing of images"


def test_a_parameter_comes_before_any_output(model):
    name = "head.cls_score.input_quantizer.scale"
    parameter = model.get_parameter(name)
    value = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
    found = non_finite_in(model)
    with torch.no_grad():
        parameter.copy_(value)
    around = ("head.cls_score.weight_quantizer", "head.cls_score.input_quantizer")
    assert found == NonFiniteTensor(f"parameter {name}", "", around)


class Break(HookBase):
    """In one iteration, the third level of a head's tower is not a number."""

    def __init__(self, tower, iteration):
        self._tower = tower
        self._iteration = iteration

    def before_step(self):
        if self.trainer.iter == self._iteration:
            tower = self.trainer.model.get_submodule(self._tower)

            def hook(_, inputs, output):
                hook.calls += 1
                return output * float("nan") if hook.calls % 5 == 3 else output

            hook.calls = 0
            tower.register_forward_hook(hook)


def state_of(trainer):
    tensors = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    return tensors, trainer.model.loss_normalizer


class Keep(HookBase):
    def after_step(self):
        self.state = state_of(self.trainer)


# No box is matched on the third level: the loss masks what is there, its gradient does not. Neither does it mask what
# an integer convolution reads, which has no code for it.
@pytest.mark.parametrize(
    "tower, wrong", [("cls_subnet", ("loss_cls nan; ", "gradients of ")), ("bbox_subnet", ("gradients of ",))]
)
def test_training_stops_with_the_reason_and_the_state_from_before(entry, tmp_path, tower, wrong):
    cfg = train_cfg(entry, tmp_path, *BOTH, max_iter=6)
    trainer, keep = Trainer(cfg), Keep()
    trainer.register_hooks([Break(f"head.{tower}.0", 2), keep])
    trainer.resume_or_load(resume=False)
    with pytest.raises(NonFiniteLoss) as stop:
        trainer.train()
    message = str(stop.value)
    assert message.startswith(tuple(f"not finite in iteration 2: {words}" for words in wrong))
    assert f"first tensor that is not finite: output of head.{tower}.0, level p5; scales around it: " in message
    assert f"head.{tower}.0.weight_quantizer 0." in message and f"head.{tower}.0.input_quantizer 0." in message
    assert (
        f"; learning rate 0.01; images {', '.join(str(x['image_id']) for x in next(iter(trainer.data_loader)))};"
        in message
    )
    assert message.endswith(f"; the state from before is in {tmp_path / 'model_0000001.pth'}") and "\n" not in message

    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    (tensors, normalizer), (after, normalizer_after) = keep.state, state_of(resumed)
    assert normalizer == normalizer_after
    assert all(torch.equal(after[key], value) for key, value in tensors.items())


def test_a_gradient_whose_norm_overflows(entry, tmp_path):
    trainer = Trainer(train_cfg(entry, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.model.head.bbox_pred.weight.register_hook(lambda gradient: gradient + 1e30)
    words = "norm of the gradient, which is largest in head.bbox_pred.weight; parameters and outputs .* are finite"
    with pytest.raises(NonFiniteLoss, match=words):
        trainer.train()


def test_detectron2s_own_error_is_explained_too(entry, tmp_path, monkeypatch):
    """Its RPN raises one for boxes that are not finite."""
    trainer = Trainer(train_cfg(entry, tmp_path))
    trainer.resume_or_load(resume=False)

    def forward(batch):
        raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")

    monkeypatch.setattr(trainer.model, "forward", forward)
    with pytest.raises(NonFiniteLoss, match="Predicted boxes or scores contain Inf/NaN") as stop:
        trainer.train()
    assert "\n" not in str(stop.value)


def test_weights_that_are_not_finite_are_not_saved(entry, tmp_path):
    trainer = Trainer(train_cfg(entry, tmp_path))
    trainer.resume_or_load(resume=False)
    torch.nn.init.constant_(trainer.model.head.cls_score.bias, float("inf"))
    with pytest.raises(NonFiniteLoss, match="parameter head.cls_score.bias.* continue from an earlier checkpoint$"):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    "overrides, where",
    [
        (BOTH, "batch norm backbone.top_block.p6.norm, level p6, gets"),
        ((), "batch norm head.cls_subnet.1, level p6, gets"),
        ((*AUX, "MODEL.RETINANET.NORM", ""), "batch norm auxiliary.adaptors.3.conv.norm gets"),
    ],
    ids=("pyramid", "head", "adaptor"),
)
def test_a_norm_that_gets_one_value_a_channel_is_named(entry, tmp_path, overrides, where):
    trainer = Trainer(train_cfg(entry, tmp_path, *overrides, "SOLVER.IMS_PER_BATCH", "1"))
    trainer.resume_or_load(resume=False)
    with pytest.raises(ValueError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(where) and "INPUT.MIN_SIZE_TRAIN" in message and "\n" not in message


def test_an_error_of_another_kind_stays_as_it_is(entry, tmp_path):
    trainer = Trainer(train_cfg(entry, tmp_path))
    trainer.resume_or_load(resume=False)
    trainer.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("another")))
    with pytest.raises(ValueError, match="^another$"):
        trainer.train()


@pytest.mark.parametrize("weight, input", [("lqnet", "lqnet"), ("lsq", "n2uq"), ("dorefa", "lsqplus")])
def test_methods_without_a_grid_train_to_the_end(entry, tmp_path, weight, input):
    method = ("MODEL.QUANT.WEIGHT.QUANTIZER", weight, "MODEL.QUANT.INPUT.QUANTIZER", input)
    trainer = Trainer(train_cfg(entry, tmp_path, *NARROW, *QUANT, *method, max_iter=2))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final_stripped.pth").is_file()


def test_what_is_not_finite_is_explained_for_methods_without_a_grid(entry, tmp_path):
    method = ("MODEL.QUANT.WEIGHT.QUANTIZER", "lqnet", "MODEL.QUANT.INPUT.QUANTIZER", "n2uq")
    trainer = Trainer(train_cfg(entry, tmp_path, *NARROW, *QUANT, *method))
    trainer.register_hooks([Break("head.cls_subnet.0", 1)])
    trainer.resume_or_load(resume=False)
    with pytest.raises(NonFiniteLoss, match="first tensor that is not finite: output of head.cls_subnet.0, level p5"):
        trainer.train()
