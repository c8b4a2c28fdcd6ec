import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import AUX, QUANT, calibrated, make_batch, make_model

from aqdet.checkpoint import AqdetCheckpointer, load_pickled_arrays


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch harmed",))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(model, path, change=None, **extra):
    state = dict(model.state_dict())
    if change:
        change(state)
    torch.save({"model": state, **extra}, path)


def one_line(error):
    assert "\n" not in str(error.value)


def test_code_is_refused(folder):
    torch.save({"model": {"a": Harmful()}}, "bad.pth")
    (folder / "bad.pkl").write_bytes(pickle.dumps({"model": Harmful(), "__author__": "x"}))
    for name in ("bad.pth", "bad.pkl"):
        with pytest.raises(ValueError, match=f"checkpoint '{name}' is refused") as error:
            AqdetCheckpointer(torch.nn.Linear(1, 1)).load(name)
        one_line(error)
    (folder / "cut.pth").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ValueError, match="'cut.pth' is refused, it "):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("cut.pth")
    assert not (folder / "harmed").exists()
    with pytest.raises(FileNotFoundError, match="'none.pth' does not exist"):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("none.pth")


def test_a_model_zoo_pickle_loads(folder):
    model = make_model(theirs=True)
    arrays = OrderedDict((k, v.numpy()) for k, v in model.state_dict().items())
    with open("zoo.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    ours = make_model(*QUANT, seed=1)
    AqdetCheckpointer(ours).load("zoo.pkl")
    for key, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    with open("zoo.pkl", "rb") as file:
        assert isinstance(load_pickled_arrays(file)["model"][next(iter(arrays))], np.ndarray)


def test_a_float_checkpoint_lacks_only_quantizers_and_auxiliary(folder, caplog):
    caplog.set_level("INFO")
    save(make_model(), "fp.pth")
    model = make_model(*QUANT, *AUX)
    AqdetCheckpointer(model, aux_init="head").load("fp.pth")
    assert "keys missing of quantizers, to be calibrated" in caplog.text
    assert "keys missing of the auxiliary path" in caplog.text
    assert torch.equal(model.auxiliary.head.cls_score.weight, model.head.cls_score.weight)
    assert model.auxiliary.needs_alignment


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("head.cls_score.bias"), "missing head.cls_score.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda s: s.update({"head.bbox_pred.bias": torch.ones(3)}),
            r"shape head.bbox_pred.bias \(3,\) in the file, \(12,\) in the model",
        ),
    ],
)
def test_anything_else_stops_unless_allowed(folder, change, words):
    save(make_model(), "fp.pth", change)
    with pytest.raises(ValueError, match=words) as error:
        AqdetCheckpointer(make_model(*QUANT)).load("fp.pth")
    one_line(error)
    AqdetCheckpointer(make_model(*QUANT), allow_keys=["head", "^extra$"]).load("fp.pth")


def test_quantized_checkpoints(folder):
    model = calibrated(make_model(*QUANT, *AUX), make_batch())
    save(model, "whole.pth")
    bare = make_model(*QUANT)
    AqdetCheckpointer(bare).load("whole.pth")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in bare.state_dict().items())
    with pytest.raises(ValueError, match="and MODEL.QUANT.ENABLED is False"):
        AqdetCheckpointer(make_model()).load("whole.pth")
    with pytest.raises(ValueError, match="num_bits is 4 in the checkpoint and 3 in the model") as error:
        AqdetCheckpointer(make_model(*QUANT, "MODEL.QUANT.INPUT.NUM_BITS", "3")).load("whole.pth")
    one_line(error)
    save(model, "partial.pth", lambda s: s.pop("head.cls_score.input_quantizer.scale"))
    with pytest.raises(ValueError, match="missing head.cls_score.input_quantizer.scale"):
        AqdetCheckpointer(make_model(*QUANT)).load("partial.pth")


def test_a_backbone_of_declared_scope(folder):
    model = make_model()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": state, "aqdet": {"scope": ["backbone.bottom_up."]}}, "bb.pth")
    AqdetCheckpointer(make_model(*QUANT)).load("bb.pth")
    state.pop("backbone.bottom_up.stem.conv1.weight")
    torch.save({"model": state, "aqdet": {"scope": ["backbone.bottom_up."]}}, "bb.pth")
    with pytest.raises(ValueError, match="missing backbone.bottom_up.stem.conv1.weight"):
        AqdetCheckpointer(make_model(*QUANT)).load("bb.pth")


def test_saved_whole_or_not_at_all(folder, monkeypatch):
    checkpointer = AqdetCheckpointer(torch.nn.Linear(1, 1), str(folder))
    checkpointer.save("a")
    before = (folder / "a.pth").read_bytes()

    def fail(data, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        checkpointer.save("a")
    assert (folder / "a.pth").read_bytes() == before
