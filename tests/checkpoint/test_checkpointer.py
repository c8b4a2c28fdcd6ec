import copy
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from helpers import AUX, QUANT, calibrated, make_batch, make_model, warnings_in

from aqdet.checkpoint import CLASSES_KEY, AqdetCheckpointer, load_pickled_arrays
from aqdet.modeling import strip
from aqdet.modeling.scaffold.aggregation import EARLY_SHARE
from aqdet.quantization import quantizers


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
        with pytest.raises(
            ValueError, match=f"checkpoint '{name}' is refused, it (must hold only|holds more)"
        ) as error:
            AqdetCheckpointer(torch.nn.Linear(1, 1), allow_pickle=True).load(name)
        one_line(error)
    (folder / "cut.pth").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ValueError, match="'cut.pth' is refused, it "):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("cut.pth")
    assert not (folder / "harmed").exists()
    with pytest.raises(FileNotFoundError, match="'none.pth' does not exist"):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("none.pth")
    with pytest.raises(ValueError, match=r"'\.' is a folder: name a file in it \(MODEL.WEIGHTS\)$"):
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load(".")


def test_a_model_zoo_pickle_loads(folder):
    model = make_model(theirs=True)
    arrays = OrderedDict((k, v.numpy()) for k, v in model.state_dict().items())
    with open("zoo.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    ours = make_model(*QUANT, seed=1)
    with pytest.raises(ValueError, match="'zoo.pkl' is refused, it is a pickle: CHECKPOINT.ALLOW_PICKLE True"):
        AqdetCheckpointer(ours).load("zoo.pkl")
    AqdetCheckpointer(ours, allow_pickle=True).load("zoo.pkl")
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
    # One line for all layers, with their number.
    assert str(error.value).count("in the checkpoint and") == 1
    others = sum(q.spec.num_bits == 4 for name, q in quantizers(model) if "input_quantizer" in name) - 1
    assert f" (and {others} more)" in str(error.value)
    save(model, "partial.pth", lambda s: s.pop("head.cls_score.input_quantizer.scale"))
    with pytest.raises(ValueError, match="missing head.cls_score.input_quantizer.scale"):
        AqdetCheckpointer(make_model(*QUANT)).load("partial.pth")


def test_a_quantized_checkpoint_of_before(folder):
    """Quantizers had their identity in three buffers; such a file loads with nothing missing."""
    model = calibrated(make_model(*QUANT), make_batch())
    state = model.state_dict()
    for name, quantizer in quantizers(model):
        spec = quantizer.spec
        kind = spec.quantizer + "/channel" * spec.per_channel
        del state[f"{name}._extra_state"]
        state[f"{name}.num_bits"], state[f"{name}.signed"] = torch.tensor(spec.num_bits), torch.tensor(spec.signed)
        state[f"{name}.kind"] = torch.tensor(list(kind.encode().ljust(24)), dtype=torch.uint8)
    torch.save({"model": state}, "old.pth")
    other = make_model(*QUANT, seed=1)
    AqdetCheckpointer(other).load("old.pth")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="quantizer is lsq in the checkpoint and pact in the model"):
        AqdetCheckpointer(make_model(*QUANT, "MODEL.QUANT.INPUT.QUANTIZER", "pact")).load("old.pth")


def test_detectron2s_own_checkpointer_reads_a_quantized_checkpoint(folder):
    model, other = calibrated(make_model(*QUANT), make_batch()), make_model(*QUANT, seed=1)
    save(model, "a.pth")
    DetectionCheckpointer(other).load("a.pth")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_a_backbone_of_declared_scope(folder):
    model = make_model()
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": state, "aqdet": {"scope": ["backbone.bottom_up."]}}, "bb.pth")
    AqdetCheckpointer(make_model(*QUANT)).load("bb.pth")
    state.pop("backbone.bottom_up.stem.conv1.weight")
    torch.save({"model": state, "aqdet": {"scope": ["backbone.bottom_up."]}}, "bb.pth")
    with pytest.raises(ValueError, match="missing backbone.bottom_up.stem.conv1.weight"):
        AqdetCheckpointer(make_model(*QUANT)).load("bb.pth")


@pytest.mark.parametrize("entry", [3, {"scope": "backbone."}, {"scope": [1]}])
def test_a_malformed_scope(folder, entry):
    torch.save({"model": make_model().state_dict(), "aqdet": entry}, "a.pth")
    with pytest.raises(
        ValueError, match=r"""'a.pth': its entry "aqdet" must be {"scope": \[key prefixes\]}, got"""
    ) as error:
        AqdetCheckpointer(make_model()).load("a.pth")
    one_line(error)


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


@pytest.fixture(scope="module")
def float_state():
    return make_model(seed=1).state_dict()


@pytest.fixture(scope="module")
def whole_state():
    """Of a calibrated quantized detector with its auxiliary path."""
    return calibrated(make_model(*QUANT, *AUX, seed=2), make_batch()).state_dict()


@pytest.fixture
def float_model():
    return make_model()


def write(path, content):
    torch.save(content, path)
    return str(path)


def load(model, path, **kwargs):
    return AqdetCheckpointer(model, **{"allow_pickle": True, **kwargs}).load(path)


def error_of(model, path, **kwargs):
    with pytest.raises(ValueError) as caught:
        load(model, path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and path in message
    return message


# --- refused files ---


@pytest.mark.parametrize(
    "target",
    [("builtins", "eval"), ("numpy", "load"), ("numpy.core.multiarray", "fromfile"), ("torch", "load")],
)
def test_only_arrays_are_unpickled(tmp_path, float_model, target):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(b"c" + "\n".join(target).encode() + b"\n.")
    assert ".".join(target) in error_of(float_model, str(path))


@pytest.mark.parametrize("ending", ["pth", "pkl"])
@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x80\x04K\x05.", b"PK\x03\x04abc"])
def test_damaged_files_get_one_line(tmp_path, float_model, ending, content):
    path = tmp_path / f"damaged.{ending}"
    path.write_bytes(content)
    error_of(float_model, str(path))


def test_truncated_file(tmp_path, float_model, float_state):
    path = write(tmp_path / "a.pth", {"model": float_state})
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    assert "damaged" in error_of(float_model, path)
    with open(path, "r+b") as file:
        file.truncate(5000)
    message = error_of(float_model, path)
    assert "damaged" in message and str(path) in message


def test_files_hold_the_names_of_the_classes(tmp_path):
    checkpointer = AqdetCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), classes=np.array(["cat", "dog"]))
    checkpointer.save("whole")
    checkpointer.save_stripped("stripped")
    for name in ("whole", "stripped"):
        other = AqdetCheckpointer(torch.nn.Linear(1, 1))
        assert other.load(str(tmp_path / f"{name}.pth"))[CLASSES_KEY] == ["cat", "dog"]


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], {"model": [1]}, {"model": {"a": 1}}, {"model": {0: torch.zeros(1)}}]
)
def test_no_state_dict(tmp_path, float_model, content):
    assert "no state dict" in error_of(float_model, write(tmp_path / "a.pth", content))


# --- model zoo files ---


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_zoo_detector(tmp_path, float_model, float_state, protocol):
    arrays = {k: v.numpy() for k, v in float_state.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}, protocol))
    load(float_model, str(path))
    loaded = float_model.state_dict()
    assert all(torch.equal(loaded[key], torch.from_numpy(value)) for key, value in arrays.items())


def test_zoo_file_with_the_array_names_of_old_numpy(tmp_path, float_model):
    array = pickle.dumps({"model": {"a": np.ones(2, np.float32)}, "__author__": "x"}, 2)
    path = tmp_path / "old.pkl"
    path.write_bytes(array.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert "unexpected a" in error_of(float_model, str(path))


def backbone_file(path, model, drop=()):
    prefix = "backbone.bottom_up."
    arrays = {
        key.removeprefix(prefix): value.numpy() + 1
        for key, value in model.state_dict().items()
        if key.startswith(prefix) and "num_batches" not in key and key not in drop
    }
    arrays["stem.fc.weight"] = np.zeros((10, 512), np.float32)
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": True}))
    return str(path)


def test_imagenet_backbone_by_name_matching(tmp_path, float_model, caplog):
    caplog.set_level(logging.INFO, "aqdet")
    model = make_model(*QUANT, *AUX)
    # A float copy of trunk stages in the auxiliary path has the same suffixes and shapes.
    model.auxiliary.trunk = copy.deepcopy(float_model.backbone.bottom_up)
    load(model, backbone_file(tmp_path / "r18.pkl", float_model))
    loaded, given = model.state_dict(), float_model.state_dict()
    for key in ("stem.conv1.weight", "res5.1.conv2.norm.running_var"):
        key = f"backbone.bottom_up.{key}"
        assert torch.equal(loaded[key], given[key] + 1)
    assert "missing outside the file's scope (backbone.bottom_up.)" in caplog.text
    assert model.auxiliary is not None


def test_imagenet_backbone_must_be_complete(tmp_path, float_model):
    key = "backbone.bottom_up.res4.0.conv2.weight"
    path = backbone_file(tmp_path / "r18.pkl", float_model, drop=(key,))
    assert f"missing {key}" in error_of(float_model, path)


def test_torchvision_weights_point_to_the_converter(tmp_path, float_model):
    path = write(tmp_path / "resnet18.pth", {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)})
    assert "tools/convert_torchvision.py" in error_of(float_model, path)


# --- strictness ---


def test_float_checkpoint_starts_a_quantized_detector(tmp_path, float_state, caplog):
    caplog.set_level(logging.INFO, "aqdet")
    model = make_model(*QUANT, *AUX)
    load(model, write(tmp_path / "a.pth", {"model": float_state}))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in float_state.items())
    assert not any(q.is_calibrated for _, q in quantizers(model))
    names = {name for name, _ in quantizers(model)}
    quantizer_keys = [key for key in loaded if key.rpartition(".")[0] in names]
    # BN adds its num_batches_tracked itself.
    auxiliary_keys = [k for k in loaded if k.startswith("auxiliary.") and not k.endswith("_tracked")]
    assert f"Loaded {len(float_state)} keys" in caplog.text
    assert f"{len(quantizer_keys)} keys missing of quantizers" in caplog.text
    assert f"{len(auxiliary_keys)} keys missing of the auxiliary path" in caplog.text


def test_reload_is_calibrated(tmp_path, whole_state, caplog):
    caplog.set_level(logging.INFO, "aqdet")
    model = make_model(*QUANT)
    load(model, write(tmp_path / "a.pth", {"model": whole_state}))
    assert all(q.is_calibrated for _, q in quantizers(model))
    count = sum(key.startswith("auxiliary.") for key in whole_state)
    assert f"{count} keys unexpected of the auxiliary path" in caplog.text


def test_quantized_checkpoint_in_a_float_detector(tmp_path, float_model, whole_state):
    message = error_of(float_model, write(tmp_path / "a.pth", {"model": whole_state}))
    assert "unexpected backbone" in message and "MODEL.QUANT.ENABLED is False" in message
    total = len(strip(whole_state)) - len(float_model.state_dict())
    assert message.count("unexpected ") == 6 and f"and {total - 6} more" in message


@pytest.mark.parametrize("depth, kind", [("34", "missing"), ("50", "of another shape")])
def test_a_backbone_of_another_depth(tmp_path, depth, kind):
    path = write(tmp_path / "a.pth", {"model": make_model().state_dict()})
    wide = ("MODEL.RESNETS.RES2_OUT_CHANNELS", "256" if depth == "50" else "64")
    message = error_of(make_model("MODEL.RESNETS.DEPTH", depth, *wide), path)
    assert f"does not fit the model: {kind} backbone." in message and len(message) < 900
    assert message.endswith(f"(the file has a ResNet-18, the model a ResNet-{depth}: MODEL.RESNETS.DEPTH)")


@pytest.mark.parametrize("prefix", ["", "auxiliary."])
def test_other_shape_and_allowed_keys(tmp_path, whole_state, prefix, caplog):
    caplog.set_level(logging.INFO, "aqdet")
    key = f"{prefix}head.cls_score.bias"
    path = write(tmp_path / "a.pth", {"model": {**whole_state, key: torch.zeros(7)}})
    model = make_model(*QUANT, *AUX)
    message = error_of(model, path)
    assert f"of another shape {key} (7,) in the file, (9,) in the model (CHECKPOINT.ALLOW_KEYS" in message
    assert "missing" not in message
    load(model, path, allow_keys=[r"head\.cls_score\."])
    assert "1 keys of another shape allowed by CHECKPOINT.ALLOW_KEYS" in caplog.text


def test_allow_keys_must_be_regexes(float_model):
    with pytest.raises(ValueError, match=r"CHECKPOINT.ALLOW_KEYS: '\(' is no regex"):
        AqdetCheckpointer(float_model, allow_keys=["("])


# --- the start of the auxiliary path ---


def test_auxiliary_head_starts_as_the_head(tmp_path, float_state):
    path = write(tmp_path / "a.pth", {"model": float_state})
    model = make_model(*QUANT, *AUX)
    load(model, path, aux_init="head")
    assert torch.equal(model.auxiliary.head.cls_score.bias, float_state["head.cls_score.bias"])
    assert torch.equal(model.auxiliary.head.bbox_pred.weight, float_state["head.bbox_pred.weight"])
    assert model.auxiliary.head.bbox_pred.weight is not model.head.bbox_pred.weight
    model = make_model(*QUANT, *AUX)
    load(model, path, aux_init="random")
    assert not torch.equal(model.auxiliary.head.bbox_pred.weight, float_state["head.bbox_pred.weight"])


def test_auxiliary_head_with_another_norm_starts_at_random(tmp_path, caplog):
    plain = ("MODEL.RETINANET.NORM", "")
    path = write(tmp_path / "a.pth", {"model": make_model(*plain).state_dict()})
    load(make_model(*plain, *AUX), path, aux_init="head")
    assert "starts at random: the detector has nothing like its head." in caplog.text


def test_what_is_trained_of_a_path_with_other_taps_goes_on_and_the_rest_starts(tmp_path, caplog):
    for ours, theirs in (("both", "fpn"), ("both", "backbone"), ("backbone", "both"), ("fpn", "backbone")):
        trained = make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", theirs, seed=3)
        for parameter in trained.auxiliary.parameters():
            torch.nn.init.normal_(parameter)
        state = trained.state_dict()
        path = write(tmp_path / "a.pth", {"model": state})
        model = make_model(*QUANT, *AUX, "MODEL.AUX.TAPS", ours)
        caplog.clear()
        load(model, path, aux_init="head")
        loaded = {key: value for key, value in model.state_dict().items() if key.startswith("auxiliary.")}
        shared = loaded.keys() & state.keys()
        assert shared and all(torch.equal(loaded[key], state[key]) for key in shared)
        aligning = {name for name, module in model.named_modules() if getattr(module, "needs_alignment", False)}
        adaptors = {key.removesuffix(".conv.weight") for key in loaded if key.endswith("conv.weight")}
        new = {name for name in adaptors if f"{name}.conv.weight" not in state}
        assert aligning - {"auxiliary"} == new
        if not new:
            assert ours == "backbone" and not warnings_in(caplog)
            continue
        count = sum(not key.endswith("num_batches_tracked") for key in shared)
        assert f"of another MODEL.AUX.TAPS or structure: {count} of its keys go on as they are" in caplog.text
        if ours == "both" and theirs == "fpn":  # a copy of the detector's, at the share that its adaptor asks for
            key = "bottom_up.res4.0.shortcut.norm.weight"
            torch.testing.assert_close(loaded[f"auxiliary.trunk.{key}"], EARLY_SHARE * state[f"backbone.{key}"])
            key = "fpn_output4.weight"
            assert torch.equal(loaded[f"auxiliary.trunk.{key}"], state[f"backbone.{key}"])


def test_a_path_of_other_shapes_starts_from_the_detector(tmp_path, whole_state):
    changed = {**whole_state, "auxiliary.adaptors.0.conv.weight": torch.ones(2, 2, 1, 1)}
    path = write(tmp_path / "a.pth", {"model": changed})
    model = make_model(*QUANT, *AUX)
    load(model, path, aux_init="head", allow_keys=["auxiliary"])
    assert [adaptor.needs_alignment for adaptor in model.auxiliary.adaptors] == [True] + [False] * 4


# --- writing ---


def test_save_marks_the_last_one_and_strips(tmp_path, whole_state):
    model = make_model(*QUANT, *AUX)
    checkpointer = AqdetCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save_stripped("model_final_stripped")
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint",
        "model_0000001.pth",
        "model_final_stripped.pth",
    ]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    stripped = torch.load(tmp_path / "model_final_stripped.pth", weights_only=True)
    assert set(stripped) == {"model"} and set(stripped["model"]) == set(strip(whole_state))


def saved(folder, iterations, keep=0):
    """A checkpointer of a small model that has saved after each iteration, with the iteration as its weight."""
    checkpointer = AqdetCheckpointer(torch.nn.Linear(1, 1), str(folder), keep=keep)
    for iteration in iterations:
        torch.nn.init.constant_(checkpointer.model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def resume(folder):
    checkpointer = AqdetCheckpointer(torch.nn.Linear(1, 1), str(folder))
    extra = checkpointer.resume_or_load("", resume=True)
    assert checkpointer.model.weight.item() == extra["iteration"]
    return extra["iteration"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit_of_the_weight(path):
    content = path.read_bytes()
    place = content.index(torch.tensor(9.0).numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize("harm", [truncate, flip_a_bit_of_the_weight, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, harm):
    saved(tmp_path, (4, 14, 9))  # 14 is of an earlier run, and not before 9
    harm(tmp_path / "model_0000009.pth")
    assert resume(tmp_path) == 4
    assert "model_0000009.pth is damaged" in caplog.text and "trying the one before" in caplog.text


def test_a_damaged_final_checkpoint_falls_back_to_the_last_numbered_one(tmp_path):
    saved(tmp_path, (4, 9)).save("model_final", iteration=9)
    truncate(tmp_path / "model_final.pth")
    assert resume(tmp_path) == 9


def test_no_whole_checkpoint_is_a_user_error(tmp_path):
    saved(tmp_path, (4, 9))
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    with pytest.raises(ValueError, match=f"no checkpoint in '{tmp_path}' is whole: start without --resume"):
        resume(tmp_path)


def test_the_last_checkpoints_are_kept(tmp_path):
    saved(tmp_path, (99,))  # of an earlier run: not ours to delete
    checkpointer = saved(tmp_path, (0, 1, 2, 3, 4), keep=2)
    checkpointer.save("model_final", iteration=4)
    numbers = sorted(int(path.stem[6:]) for path in tmp_path.glob("model_0*.pth"))
    assert numbers == [3, 4, 99] and (tmp_path / "model_final.pth").exists()
    with pytest.raises(ValueError, match="CHECKPOINT.KEEP must be 0, for all, or more, got -1"):
        saved(tmp_path, (), keep=-1)


def test_a_run_that_starts_anew_puts_the_note_and_the_files_of_the_earlier_one_aside(tmp_path, caplog):
    saved(tmp_path, (2,))
    checkpointer = saved(tmp_path, (4,))
    checkpointer.forget_last_checkpoint()
    assert not checkpointer.has_checkpoint() and (tmp_path / "last_checkpoint.old").read_text() == "model_0000004.pth"
    assert "holds an earlier run, last model_0000004.pth" in caplog.text
    # A damaged file of the new run is not made up for by one of the earlier.
    saved(tmp_path, (9,), keep=1)
    truncate(tmp_path / "model_0000009.pth")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        resume(tmp_path)
    assert {2, 4, 9} == {int(path.stem[6:]) for path in tmp_path.glob("*.pth")}, "a start may read one of them again"
    # But by one of its own, of a number that the earlier run had, too.
    saved(tmp_path, (2, 9), keep=5)
    truncate(tmp_path / "model_0000009.pth")
    assert resume(tmp_path) == 2


def linear(**changes):
    """A layer, and its state dict with these changes."""
    model = torch.nn.Linear(2, 3)
    return model, {**model.state_dict(), **changes}


def loaded(path):
    """What a layer has after a file was loaded into it."""
    model = torch.nn.Linear(2, 3)
    AqdetCheckpointer(model).load(path)
    return model.state_dict()


WRAPPED = {
    "one process of several": (lambda state: {f"module.{key}": value for key, value in state.items()}, "'module.'"),
    "torch.compile": (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, "'_orig_mod.'"),
    "both": (lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()}, "'module._orig_mod.'"),
    "Lightning": (
        lambda state: {"state_dict": {f"model.{key}": v for key, v in state.items()}, "epoch": 1},
        "'model.'",
    ),
    "an average": (
        lambda state: {"model": {"n_averaged": torch.tensor(3), **{f"module.{key}": v for key, v in state.items()}}},
        "'module.'",
    ),
    "the only state dict": (lambda state: {"ema_state": state, "epoch": 1}, "its entry 'ema_state' is read"),
    "two state dicts": (
        lambda state: {"state_dict": state, "ema": {key: value + 1 for key, value in state.items()}},
        "its entry 'state_dict' is read, and ema left out",
    ),
    "an average beside the model": (
        lambda state: {"model": state, "ema": {key: value + 1 for key, value in state.items()}},
        "beside its 'model', which are left out: ema",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_state_dicts_of_other_trainings_are_read_and_it_is_said(folder, caplog, name):
    change, words = WRAPPED[name]
    _, state = linear()
    torch.save(change(state), "other.pth")
    caplog.set_level(logging.INFO, "aqdet")
    found = loaded("other.pth")
    assert all(torch.equal(found[key], value) for key, value in state.items()) and set(found) == set(state)
    assert words in caplog.text


def test_a_prefix_without_keys_of_the_model_behind_it_stays(folder):
    torch.save({"a.weight": torch.ones(1), "a.other": torch.ones(1)}, "other.pth")
    with pytest.raises(ValueError, match=r"unexpected a\.weight"):
        AqdetCheckpointer(torch.nn.BatchNorm1d(3, affine=False)).load("other.pth")


def test_the_auxiliary_path_of_a_wrapped_model_goes_on(folder):
    model = make_model(*QUANT, *AUX)
    with torch.no_grad():
        for parameter in model.auxiliary.parameters():
            parameter.fill_(0.5)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, "ddp.pth")
    other = make_model(*QUANT, *AUX)
    AqdetCheckpointer(other, aux_init="head").load("ddp.pth")
    assert all((parameter == 0.5).all() for parameter in other.auxiliary.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_their_key(folder, value):
    model, state = linear(bias=torch.tensor([0.0, value, 0.0]))
    torch.save(state, "nan.pth")
    before = copy.deepcopy(model.state_dict())
    words = rf"^checkpoint 'nan.pth' has values that are not finite, bias has {value} \(1 of 3 values\): the training"
    with pytest.raises(ValueError, match=words) as e:
        AqdetCheckpointer(model).load("nan.pth")
    one_line(e)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


NO_CHECKPOINTS = {
    "empty": (b"", "it is empty"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "fetch the file by git lfs pull",
    ),
    "page": (b"<!DOCTYPE html>\n<html></html>", "it is a web page, so that a download has gone wrong"),
    "safetensors": ((2).to_bytes(8, "little") + b"{}", "it is of safetensors, which are not read: write"),
    "picture": (b"\xff\xd8\xff\xe0", "it is damaged or was not written by torch.save"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_told(folder, name):
    data, words = NO_CHECKPOINTS[name]
    Path("x.pth").write_bytes(data)
    with pytest.raises(
        ValueError, match=f"^checkpoint 'x.pth' is refused, {'.*' if name == 'pointer' else ''}{words}"
    ) as e:
        AqdetCheckpointer(torch.nn.Linear(1, 1)).load("x.pth")
    one_line(e)


def test_files_with_several_state_dicts_and_none(folder):
    _, state = linear()
    torch.save({"student": state, "teacher": state}, "two.pth")
    with pytest.raises(ValueError, match="'two.pth' has several state dicts, student, teacher: save one as 'model'$"):
        loaded("two.pth")
    torch.save({"epoch": 3}, "none.pth")
    with pytest.raises(ValueError, match="'none.pth' holds no state dict of tensors$"):
        loaded("none.pth")
