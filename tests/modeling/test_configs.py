"""Every shipped config is loaded, built, planned, calibrated and stepped once."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT, calibrated, losses_of
from two_stage import shaped_batch

from aqdet.analysis.plan import make_plan, total
from aqdet.config import load_config
from aqdet.engine import fit_to_machine

STRUCTURE = "META_ARCHITECTURE RESNETS FPN RETINANET FCOS CLASSIFIER MASK_ON RPN ROI_HEADS ROI_BOX_HEAD ROI_MASK_HEAD"
STRUCTURE += " KEYPOINT_ON ROI_KEYPOINT_HEAD"
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("Base"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_builds_plans_and_steps(path):
    cfg = load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.WEIGHTS", ""])
    fit_to_machine(cfg)
    match = re.search(r"_(?:fp(?:_bn(?:_continued)?)?|(lsq(?:odd)?)_w(\d)a(\d))(_aux)?(_distill)?$", path.stem)
    assert match, "configs are named ..._lsq_w4a4_aux"
    method, weight_bits, input_bits, aux, distill = match.groups()
    quant = cfg.MODEL.QUANT
    assert quant.ENABLED == (method is not None) and cfg.MODEL.AUX.ENABLED == (aux is not None)
    assert cfg.OUTPUT_DIR.endswith(path.stem) and cfg.MODEL.DISTILL.ENABLED == (distill is not None)
    if method:
        assert (quant.WEIGHT.QUANTIZER, quant.INPUT.QUANTIZER) == (method, "lsq")
        assert (quant.WEIGHT.NUM_BITS, quant.INPUT.NUM_BITS) == (int(weight_bits), int(input_bits))
    model = build_model(cfg)
    rows = make_plan(model, (64, 64))
    assert total(rows, "quantized" if method else "float").macs > 0
    assert (total(rows, "auxiliary").macs > 0) == (aux is not None)
    batch = shaped_batch(2, 64, num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS)
    model.train()
    if method:
        calibrated(model, batch)
    loss = sum(losses_of(model, batch).values())
    loss.backward()
    assert torch.isfinite(loss)


def test_every_config_starts_from_what_another_of_the_same_model_leaves():
    configs = {path: load_config(path) for path in CONFIGS}
    by_output = {cfg.OUTPUT_DIR: cfg for cfg in configs.values()}
    assert len(by_output) == len(configs)
    two_stage = set()
    for path, cfg in configs.items():
        if not cfg.MODEL.WEIGHTS.startswith("output/"):
            continue
        folder, name = cfg.MODEL.WEIGHTS.rsplit("/", 1)
        source = by_output[folder]
        assert name == "model_final.pth" and not source.MODEL.QUANT.ENABLED
        if cfg.MODEL.DISTILL.ENABLED:
            # The teacher is what the same start becomes without quantizers.
            teacher_folder, name = cfg.MODEL.DISTILL.WEIGHTS.rsplit("/", 1)
            teacher = by_output[teacher_folder]
            assert name == "model_final_stripped.pth" and teacher.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
            assert not teacher.MODEL.QUANT.ENABLED and teacher.SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER
        for key in STRUCTURE.split():
            assert cfg.MODEL[key] == source.MODEL[key], (path.name, key)
        if source.MODEL.AUX.ENABLED and cfg.MODEL.QUANT.ENABLED:
            assert source.MODEL.AUX == cfg.MODEL.AUX, path.name
            two_stage.add(path.parent.name)
    assert two_stage == {"BCCD", "COCO-Detection", "ImageNet", "quickstart"}


def test_unsafe_and_wrong_configs_are_refused_in_one_line(tmp_path):
    def check(text, overrides, words):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as error:
            load_config(path, overrides)
        assert "\n" not in str(error.value)

    check("SEED: !!python/object/apply:eval ['int(1)']", [], "c.yaml, line 1: refused, .*object tag")
    check("NO_SUCH: 1", [], "c.yaml: Non-existent config key: NO_SUCH")
    check("MODEL: {AUX: {TAP: both}}", [], r"Non-existent config key: MODEL.AUX.TAP; did you mean MODEL.AUX.TAPS or")
    check("SEED: 1", ["MODEL.AUX.TAP", "both"], r"Non-existent key: MODEL.AUX.TAP; did you mean MODEL.AUX.TAPS or")
    check("MODEL: {AUX: {LOSS_WEIGHT: 2}}", [], "MODEL.AUX.LOSS_WEIGHT; write the number with a decimal point, as 2.0")
    check("SEED: 1", ["SOLVER.EMA_DECAY", "1"], "SOLVER.EMA_DECAY; write the number with a decimal point, as 2.0")
    check(
        "DATASETS: {TRAIN: mine}", [], r"DATASETS.TRAIN takes several values, got mine: write \('mine',\), in a shell"
    )
    check("SEED: 1", ["DATASETS.TEST", "mine"], r"DATASETS.TEST takes several values, got mine: write \('mine',\)")
    for text in ("[mine]", "mine,", "('mine')", '"mine"'):
        check("SEED: 1", ["DATASETS.TEST", text], r"DATASETS.TEST takes several values, got .*: write \('mine',\), in")
    check("SEED: 1", ["DATASETS.TEST", "a, b"], r"got a, b: write \('a', 'b'\), in a shell \"\('a', 'b'\)\"")
    check("SEED: 1", ["SOLVER.STEPS", "100"], r"SOLVER.STEPS takes several values, got 100: write \(100,\), in a shell")
    check("SEED: [", [], "not valid YAML")
    check("SEED: 1", ["MODEL.QUANT.BITS", "4"], "override: Non-existent key: MODEL.QUANT.BITS")
    check("SEED: 1", ["MODEL.QUANT.ENABLED", "7"], "override: .*MODEL|override: Type mismatch")
    check("SEED: 1", ["SEED"], "KEY VALUE pairs")
    with pytest.raises(FileNotFoundError, match="'none.yaml' does not exist"):
        load_config("none.yaml")


def test_the_readme_of_the_configs_has_a_row_for_each_and_no_other():
    section, found = "", set()
    for line in (ROOT / "configs" / "README.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").partition(":")[0]
        elif line.startswith("| ") and not line.startswith("| config") and section != "Rehearsals":
            found |= {f"{section}/{name.strip()}" for name in line.split("|")[1].split(",")}
    assert found == {f"{path.parent.name}/{path.stem}" for path in CONFIGS}
