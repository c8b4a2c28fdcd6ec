"""The runtime on what the exporter writes, and the benchmark of both."""

import shutil
import subprocess
import sys
from pathlib import Path

import benchmark
import benchmark_export
import numpy as np
import post_training_peers
import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from helpers import FCOS, QUANT, ROOT, calibrated, make_batch, make_cfg, make_model
from latency import peak_memory
from tiny_data import write_dataset
from tiny_export import make_photo

from aqdet.evaluation.exported import load_exported
from aqdet.export.folder import export_detector, load_detector
from aqdet.runtime import Detector
from aqdet.runtime.preprocess import make_batch as make_runtime_batch

SMALL_SIZE = ("MODEL.FPN.RELU", "True", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "100")
MEAN = ("MODEL.PIXEL_MEAN", "[128.0, 128.0, 128.0]", "MODEL.PIXEL_STD", "[64.0, 64.0, 64.0]")
SETTINGS = (*QUANT, *SMALL_SIZE, *MEAN, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Config file, weights and exported folder of a small quantized detector."""
    root = tmp_path_factory.mktemp("real")
    model = calibrated(make_model(*SETTINGS), make_batch(4))
    torch.save({"model": model.state_dict()}, root / "weights.pth")
    cfg = make_cfg(*SETTINGS)
    (root / "config.yaml").write_text(cfg.dump())
    export_detector(cfg, str(root / "weights.pth"), root / "exported", config_name="config.yaml")
    return root


@pytest.fixture(scope="module")
def model(exported):
    return load_detector(make_cfg(*SETTINGS), str(exported / "weights.pth"))


def test_the_network_is_that_of_the_trained_model(exported, model):
    detector = Detector(exported / "exported", threads=1)
    batch, _ = make_runtime_batch([make_photo(), make_photo(seed=1)], detector.description)
    with torch.no_grad():
        expected = [output.numpy() for output in benchmark_export.Dense(model).eval()(torch.from_numpy(batch))]
    found = [output for level in detector.run(batch) for output in level]
    assert [output.shape for output in found] == [output.shape for output in expected]
    # Untrained, so that what is found differs little between places: codes that differ by one at rounding ties show.
    for kind in (0, 1):
        one, other = (np.concatenate([v.ravel() for v in values[kind::2]]) for values in (found, expected))
        assert np.corrcoef(one, other)[0, 1] > 0.9


def test_node_computes_the_same_values(exported, tmp_path):
    """Runs where node and onnxruntime-node are installed: npm install --ignore-scripts onnxruntime-node."""
    node = shutil.which("node")
    resolve = [node, "-e", "require.resolve('onnxruntime-node')"]
    if node is None or subprocess.run(resolve, cwd=ROOT, capture_output=True).returncode:
        pytest.skip("needs node and onnxruntime-node")
    detector = Detector(exported / "exported", threads=1)
    batch, _ = make_runtime_batch([make_photo(), make_photo(seed=1)], detector.description)
    (tmp_path / "input.bin").write_bytes(batch.tobytes())
    sizes = [str(batch.shape[axis]) for axis in (0, 2, 3)]
    files = [exported / "exported", *sizes, tmp_path / "input.bin", tmp_path / "out"]
    subprocess.run([node, ROOT / "tools" / "onnxruntime_node.mjs", *files], cwd=ROOT, check=True)
    for level, values in zip(detector.description.levels, detector.run(batch), strict=True):
        for name, value in zip(level.outputs, values, strict=True):
            found = np.fromfile(tmp_path / "out" / f"{name}.bin", np.float32).reshape(value.shape)
            np.testing.assert_array_equal(found, value, err_msg=name)


def test_decodes_as_the_model(exported, model):
    detector = Detector(exported / "exported", threads=1)
    images = [make_photo(), make_photo(120, 90, seed=1)]
    batch, sizes = make_runtime_batch(images, detector.description)
    outputs = [[torch.from_numpy(level[kind]) for level in detector.run(batch)] for kind in (0, 1)]
    with torch.no_grad():
        results = model.forward_inference(ImageList(torch.from_numpy(batch), sizes), outputs[0], outputs)
    for found, result, image in zip(detector.detect(images), results, images, strict=True):
        expected = detector_postprocess(result, *image.shape[:2])
        assert len(found) == len(expected) > 50
        np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-5)
        np.testing.assert_array_equal(found.classes, expected.pred_classes.numpy())
        np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)


ATSS, QUALITY = ("MODEL.FCOS.ASSIGNMENT", "atss"), ("MODEL.FCOS.CLASS_LOSS", "quality")


@pytest.mark.parametrize("arch", [FCOS, [*FCOS, *ATSS], [*FCOS, *QUALITY]], ids=["fcos", "atss", "quality"])
def test_fcos_as_the_model(tmp_path, caplog, arch):
    settings = (*SETTINGS, *arch)
    model = calibrated(make_model(*settings), make_batch(4))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg = make_cfg(*settings)
    images = [make_photo(64, 64).transpose(2, 0, 1)]
    export_detector(cfg, str(tmp_path / "weights.pth"), tmp_path / "exported", images=images)
    detector = Detector(tmp_path / "exported", threads=1)
    photo = make_photo()
    batch, sizes = make_runtime_batch([photo], detector.description)
    levels = detector.run(batch)
    with torch.no_grad():
        dense = benchmark_export.Dense(model.eval())(torch.from_numpy(batch))
    assert [output.shape for level in levels for output in level] == [output.shape for output in dense]
    assert len(levels[0]) == (2 if "quality" in arch else 3)
    outputs = [[torch.from_numpy(value.copy()) for value in kind] for kind in zip(*levels, strict=True)]
    with torch.no_grad():
        results = model.forward_inference(ImageList(torch.from_numpy(batch), sizes), outputs[0], outputs)
    expected = detector_postprocess(results[0], *photo.shape[:2])
    found = detector(photo)
    assert len(found) == len(expected) > 50
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.classes, expected.pred_classes.numpy())
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)
    cfg.DATASETS.TEST, cfg.MODEL.FCOS.NMS_THRESH_TEST = (), 0.5
    caplog.clear()
    load_exported(cfg, tmp_path / "exported")
    assert len(caplog.messages) == 1 and "MODEL.FCOS.NMS_THRESH_TEST is 0.5, but" in caplog.messages[0]


def test_benchmark(exported, monkeypatch, capsys):
    def quick(code, *arguments):
        return peak_memory(code, *arguments) if code is benchmark_export.ONNX_RUNTIME_MEMORY else None

    monkeypatch.setattr(benchmark_export, "peak_memory", quick)
    command = ["benchmark.py", "export", "--model", exported / "exported", "--config-file", exported / "config.yaml"]
    command += ["--weights", exported / "weights.pth", "--size", "32", "--threads", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    benchmark.main()
    printed = capsys.readouterr().out
    for words in ("32x32, 1 image; ", "VNNI", "PyTorch eager", "ONNX Runtime float32", "of the float32 state dict"):
        assert words in printed
    for name in ("exported, ONNX Runtime", "ONNX Runtime int8, post-training"):
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert row.count("x (") == 4 and float(row.split()[-2]) > 30
    assert "calibrated on the measured image alone" in printed


def test_benchmark_with_calibration_images_and_a_dataset(exported, monkeypatch, capsys, tmp_path):
    entry = write_dataset(tmp_path / "data", "tiny_benchmark", num_images=2)
    monkeypatch.setattr(benchmark_export, "peak_memory", lambda *_: None)
    command = ["benchmark.py", "export", "--model", exported / "exported", "--config-file", exported / "config.yaml"]
    command += ["--weights", exported / "weights.pth", "--size", "32", "--threads", "1", "--rounds", "1"]
    command += ["--calibration", tmp_path / "data", "--dataset", "tiny_benchmark"]
    full = torch.load(exported / "weights.pth", weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in full.items() if "quantizer" not in k}}, tmp_path / "full.pth")
    command += ["--float-weights", tmp_path / "full.pth"]
    command += ["DATASETS.DECLARED", [entry], "DATALOADER.NUM_WORKERS", "0"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "MB on disk" in line)
    assert header.rstrip().endswith("AP on tiny_benchmark")
    for name in ("PyTorch eager", "ONNX Runtime float32", "ONNX Runtime int8", "exported, ONNX Runtime"):
        row = next(line for line in lines if line.startswith(name))
        assert 0 <= float(row.split()[-1]) <= 100


@pytest.fixture
def float_network(exported, tmp_path):
    """``(folder, batch)``: the float network as a folder for the runtime."""
    dense = benchmark_export.load_float(str(exported / "config.yaml"), str(exported / "weights.pth"), [])
    description = Detector(exported / "exported", threads=1).description
    batch, _ = make_runtime_batch([make_photo()], description)
    (tmp_path / "float").mkdir()
    benchmark_export.write_float(dense, exported / "exported", tmp_path / "float", batch)
    return tmp_path / "float", batch


def check_near(folder, detector, batch):
    """What is predicted stays near the float network, and is not the same."""
    found = [each.run(batch) for each in (Detector(folder, threads=1), detector)]
    for level, other in zip(*found, strict=True):
        assert all(one.shape == two.shape for one, two in zip(level, other, strict=True))
    full, int8 = (np.concatenate([level[0].ravel() for level in levels]) for levels in found)
    # Untrained, so that the logits lie close together, in a few steps of 8 bits.
    step = (max(full.max(), 0.0) - min(full.min(), 0.0)) / 255
    assert np.abs(full - int8).max() < 4 * step and not np.array_equal(full, int8)


def test_post_training_int8_is_near_the_float_network(float_network, tmp_path):
    """All convolutions are on 8 bits; the file is a quarter."""
    folder, batch = float_network
    post_training_peers.write_post_training(folder, tmp_path / "int8", [batch])
    check_near(folder, Detector(tmp_path / "int8", threads=1), batch)
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.3 * sizes[0]


def test_nncf_is_near_the_float_network(float_network, tmp_path):
    pytest.importorskip("nncf", reason=post_training_peers.INSTALL_NNCF)
    folder, batch = float_network
    network = tmp_path / "nncf" / "model.xml"
    post_training_peers.write_nncf(folder, network, [batch])
    detector = benchmark_export.OpenVinoDetector(folder, 1, network)
    check_near(folder, detector, batch)
    form = benchmark_export.Form("nncf", network, detector, "")
    assert form.bytes == network.stat().st_size + (tmp_path / "nncf" / "model.bin").stat().st_size
    assert form.bytes < 0.3 * (folder / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--size", "70", "--size must be a multiple of 32, got 70"),
        ("--weights", __file__, "was exported from other weights than"),
        ("--model", str(Path(__file__).parent), "is not the folder of a finished export"),
    ],
)
def test_benchmark_refuses(exported, monkeypatch, option, value, words):
    command = ["benchmark.py", "export", "--model", exported / "exported", "--config-file", exported / "config.yaml"]
    command += ["--weights", exported / "weights.pth", option, value]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit, match=words):
        benchmark.main()
