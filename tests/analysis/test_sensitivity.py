"""A detector of which some layers alone are quantized."""

import json
import sys

import pytest
import torch
import yaml
from helpers import QUANT, load_tool, losses_of, make_batch, make_cfg, make_model, write_weights
from tiny_data import train_overrides, write_dataset

from aqdet.analysis.sensitivity import PartlyQuantized, group_of, measure_sensitivity
from aqdet.config import load_config
from aqdet.quantization import quantizers

RELU = ("MODEL.FPN.RELU", "True")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("float") / "model_final.pth")


@pytest.fixture(scope="module")
def detector(weights):
    return PartlyQuantized(make_cfg(*QUANT, *RELU), weights, [make_batch()], (2, 8))


def test_one_group_alone_is_quantized_and_the_rest_in_full_precision(detector, weights):
    state = torch.load(weights)["model"]
    plain = make_model(*RELU)
    plain.load_state_dict(state)
    plain.train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        expected = float(sum(losses_of(plain, make_batch()).values()))
    assert detector.measure([], 2) == detector.measure([], 8) == pytest.approx(expected, rel=1e-6)
    assert not any(q.enabled for model in detector.models.values() for _, q in quantizers(model))
    some = detector.layers[3:5]
    one = detector.measure(some, 2)
    # The same, with every other quantizer of a detector of 2 bits off.
    model = detector.models[2]
    for name, quantizer in quantizers(model):
        quantizer.enabled = name.rpartition(".")[0] in some
    assert detector.measure([], 2) == one != expected
    for _, quantizer in quantizers(model):
        quantizer.enabled = False


def test_every_inner_layer_is_in_one_group_and_few_bits_cost_more(detector):
    found = measure_sensitivity(detector, by="part", size=(64, 64))
    members = [name for names in found.layers.values() for name in names]
    assert sorted(members) == sorted(detector.layers) == sorted(found.macs) == sorted(found.weights)
    assert not any("stem" in name or name in ("head.cls_score", "head.bbox_pred") for name in members)
    assert set(found.layers) == {"res2", "res3", "res4", "res5", "fpn", "head.cls", "head.bbox"} | (
        set(found.layers) & {name for name in members if "top_block" in name}
    )
    assert all(set(costs) == {2, 8} for costs in found.costs.values())
    assert sum(abs(costs[2]) for costs in found.costs.values()) > sum(abs(costs[8]) for costs in found.costs.values())
    assert all(model.training for model in detector.models.values())


def test_a_metric_of_which_more_is_better(detector):
    values = iter([50.0, 40.0, 49.0])
    layers, detector.layers = detector.layers, detector.layers[:1]
    try:
        found = measure_sensitivity(detector, size=(64, 64), metric=lambda _: next(values))
    finally:
        detector.layers = layers
    assert found.baseline == 50 and found.costs == {layers[0]: {2: 10.0, 8: 1.0}}


def test_layers_that_a_rule_decides_are_not_measured(weights):
    rules = ("MODEL.QUANT.RULES", "[['res4', {'WEIGHT.NUM_BITS': 4}], ['fpn_lateral3', {'ENABLED': False}]]")
    detector = PartlyQuantized(make_cfg(*QUANT, *RELU, *rules), weights, [make_batch()], (2,))
    assert not any("res4" in name or "fpn_lateral3" in name for name in detector.layers)
    assert any("res4" in name for name in detector.kept)
    everything = ("MODEL.QUANT.RULES", "[['.', {'WEIGHT.NUM_BITS': 4}]]")
    with pytest.raises(ValueError, match="MODEL.QUANT.RULES decide for all layers"):
        PartlyQuantized(make_cfg(*QUANT, *RELU, *everything), weights, [make_batch()], (2,))


@pytest.mark.parametrize(
    "by, group",
    [("layer", "backbone.bottom_up.res4.1.conv2"), ("block", "res4.1"), ("part", "res4")],
)
def test_groups(by, group):
    assert group_of("backbone.bottom_up.res4.1.conv2", by) == group


def test_from_a_measurement_to_a_config_that_plans(weights, tmp_path, monkeypatch, capsys):
    entry = write_dataset(tmp_path / "data", "tiny_sensitivity")
    base = tmp_path / "base.yaml"
    own = ["fpn_lateral3", {"ENABLED": False}]
    base.write_text(make_cfg(*QUANT, *RELU, "MODEL.QUANT.RULES", str([own])).dump())
    opts = [*train_overrides(entry, tmp_path / "run"), "MODEL.WEIGHTS", weights]
    argv = ["--config-file", str(base), "--size", "64", "64"]
    measured = ["--output", str(tmp_path / "found"), "--bits", "2", "4", "--by", "part", "--batches", "1"]
    monkeypatch.setattr(sys, "argv", ["sensitivity.py", *argv, *measured, *opts])
    load_tool("sensitivity").main()
    content = json.loads((tmp_path / "found" / "sensitivity.json").read_text())
    assert content["metric"] == "loss" and len(content["costs"]) >= 7
    assert (tmp_path / "found" / "sensitivity.png").stat().st_size > 5000

    output = tmp_path / "mixed.yaml"
    allocated = ["--sensitivity", str(tmp_path / "found" / "sensitivity.json"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["allocate_bits.py", *argv, *allocated, "--budget-bits", "3"])
    load_tool("allocate_bits").main()
    assert "Train it: python tools/train_net.py --config-file" in capsys.readouterr().out
    rules = load_config(output).MODEL.QUANT.RULES
    assert rules[0] == own and {rule[1]["WEIGHT.NUM_BITS"] for rule in rules[1:]} == {2, 4}
    assert yaml.safe_load(output.read_text())["_BASE_"] == str(base)

    written = base.read_bytes()
    for path in (base, tmp_path / "found" / "sensitivity.json"):
        again = ["--sensitivity", str(tmp_path / "found" / "sensitivity.json"), "--output", str(path)]
        monkeypatch.setattr(sys, "argv", ["allocate_bits.py", *argv, *again, "--budget-bits", "3"])
        with pytest.raises(SystemExit, match="--output .* would replace a file that is read"):
            load_tool("allocate_bits").main()
    assert base.read_bytes() == written
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config-file", str(base), "--json", str(base)])
    with pytest.raises(SystemExit, match="--json .* would replace a file that is read"):
        load_tool("plan").main()
    monkeypatch.setattr(sys, "argv", ["allocate_bits.py", *argv, *allocated, "--budget-bits", "3"])

    # A rule that came after the measurement would win over what is allocated.
    base.write_text(make_cfg(*QUANT, *RELU, "MODEL.QUANT.RULES", "[['res3', {'WEIGHT.NUM_BITS': 8}]]").dump())
    with pytest.raises(SystemExit, match="decide for backbone.bottom_up.res3.*measure again with this config"):
        load_tool("allocate_bits").main()
