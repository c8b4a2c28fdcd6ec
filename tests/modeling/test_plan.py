import json
import subprocess
import sys

from helpers import AUX, QUANT, ROOT, make_model

from aqdet.modeling.plan import make_plan, total


def test_numbers_by_hand():
    rows = {r.path: r for r in make_plan(make_model(*QUANT, *AUX), (64, 64))}
    stem = rows["backbone.bottom_up.stem.conv1"]
    assert (stem.weight, stem.input, stem.norm) == ("lsq 8/ch", "image u8", "BatchNorm2d")
    assert stem.parameters == 64 * 3 * 49 + 128
    assert stem.macs == 32 * 32 * 64 * 3 * 49
    assert stem.bit_ops == stem.macs * 64
    # weights at 8 bits; gamma, beta, mean and variance, and 64 scales at 32
    assert stem.weight_bits == 64 * 3 * 49 * 8 + (4 * 64 + 64) * 32
    score = rows["head.cls_score"]
    cells = 8 * 8 + 4 * 4 + 2 * 2 + 1 + 1
    assert score.macs == cells * 16 * 9 * (3 * 3) and score.bit_ops == score.macs * 64
    assert rows["head.cls_subnet.0"].norm == "BatchNorm2d x5 levels"
    assert rows["backbone.fpn_add3"].input == "pact s8 + on grid"
    assert rows["auxiliary.head.cls_score"].weight == "float 32"


def test_totals_and_float_plan():
    rows, bare = (make_plan(make_model(*o), (64, 64)) for o in ((*QUANT, *AUX), ()))
    model = make_model(*QUANT, *AUX)
    for name, _ in model.named_parameters():
        assert "auxiliary" in name or total(rows, "quantized").layers > 0
    assert total(rows, "float").layers == 0
    assert total(bare, "float").parameters == sum(p.numel() for p in make_model().parameters())
    assert total(rows, "quantized").parameters == total(bare, "float").parameters
    assert total(rows, "quantized").macs == total(bare, "float").macs
    assert total(bare, "float").bit_ops == 1024 * total(bare, "float").macs
    aux = sum(p.numel() for p in model.auxiliary.parameters())
    assert total(rows, "auxiliary").parameters == aux


def test_command_line(tmp_path):
    config = ROOT / "configs" / "quickstart" / "retinanet_r18_lsq_w4a4_aux.yaml"
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config-file", str(config)]
    command += ["--size", "64", "64"]
    out = tmp_path / "plan.json"
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the detector as shipped" in done.stdout
    assert json.loads(out.read_text())["totals"]["quantized"]["layers"] == 34
    wrong = subprocess.run([*command, "MODEL.QUANT.WEIGHT.QUANTIZER", "lqs"], capture_output=True, text=True)
    last = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1 and last.startswith("error: MODEL.QUANT for layer backbone.")
    assert "one of dorefa, lsq, pact, got 'lqs'" in last
