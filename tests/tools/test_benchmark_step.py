"""The benchmark of whole steps runs on a CPU as it would on a GPU."""

import re
import sys

import benchmark
import benchmark_step
import pytest
import torch
from helpers import ROOT

CONFIG = str(ROOT / "configs" / "quickstart" / "retinanet_r18_")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "step", "--size", "64", "64", "--rounds", "1", *arguments])
    monkeypatch.setattr(benchmark_step, "WARM_UP", 0)
    benchmark.main()


def test_configs_are_measured_side_by_side(monkeypatch, capsys):
    files = [word for name in ("fp_bn", "lsq_w4a4_aux") for word in ("--config-file", f"{CONFIG}{name}.yaml")]
    run(monkeypatch, "--precision", "bf16", *files, "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CONVS", "1")
    out = capsys.readouterr().out
    assert out.startswith("1 processes on CPU, 2 images of 64x64 each")
    rows = re.findall(r"^(retinanet_r18_\w+) +bf16 +([\d.]+) +([\d.]+)x", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["retinanet_r18_fp_bn", "retinanet_r18_lsq_w4a4_aux"]
    assert float(rows[0][2]) == 1 and all(float(row[1]) > 0 for row in rows)


def test_compiled_networks_are_measured_beside_eager_ones(monkeypatch, capsys):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    small = ("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CONVS", "1")
    run(monkeypatch, "--compile", "--config-file", f"{CONFIG}lsq_w4a4_aux.yaml", *small)
    names = re.findall(r"^(retinanet_r18_lsq_w4a4_aux(?:, compiled)?) +fp32 ", capsys.readouterr().out, re.MULTILINE)
    assert names == ["retinanet_r18_lsq_w4a4_aux", "retinanet_r18_lsq_w4a4_aux, compiled"]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_float16_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(benchmark_step.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--precision fp16 needs a GPU"):
        run(monkeypatch, "--config-file", f"{CONFIG}fp_bn.yaml", "--precision", "fp16")
