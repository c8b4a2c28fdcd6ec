"""The rehearsals of configs for COCO and ImageNet: their grid and table, and the smallest form of them."""

import json
import sys
from pathlib import Path

import kept_runs
import pytest
import rehearsal_short as short
import rehearse as tool
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import ROOT
from rehearsal_scaling import FOLDERS, Form, Solver, families, own_solver, scaled

from aqdet.config import load_config
from aqdet.engine import check_config, fit_to_machine


@pytest.fixture
def parse(monkeypatch, tmp_path):
    def parsed(*argv):
        monkeypatch.setattr(sys, "argv", ["rehearse", "--output", str(tmp_path), *argv])
        return tool.parse_args()

    return parsed


def finish(job, ap, **more):
    folder = Path(job.output_dir)
    (folder / "inference").mkdir(parents=True, exist_ok=True)
    (folder / "inference" / "metrics.json").write_text(json.dumps({} if more else {"AP": ap}))
    noted = {"fingerprint": job.fingerprint(), "seconds": 60.0, "date": "2026-01-02", "machine": "a machine"}
    (folder / "done.json").write_text(json.dumps({**noted, "command": "python tools/train_net.py", **more}))


def rows_by_config():
    return {row.config.partition("/")[2]: row for family, bits in tool.planned() for row in tool.rows_of(family, bits)}


def test_every_config_of_the_folders_is_in_a_family_and_starts_are_full_precision():
    paths = {p for folder in FOLDERS for p in (ROOT / "configs" / folder).glob("*.yaml") if "Base" not in p.name}
    found = families()
    assert paths == {path for family in found for path in (family.full, family.low)}
    for family in found:
        full, low = load_config(family.full), load_config(family.low)
        assert low.MODEL.QUANT.ENABLED and not full.MODEL.QUANT.ENABLED
        assert low.MODEL.WEIGHTS == f"{full.OUTPUT_DIR}/model_final.pth"
    assert found[0].low.parent.name == "ImageNet"  # whose trunk the others start from
    assert tool.SHORT_ALONE.keys() < {family.low.stem for family in found}


def test_the_rule_by_hand():
    path = ROOT / "configs" / "COCO-Detection" / "retinanet_R_50_FPN_1x_fp_bn_aux.yaml"
    cfg, form = load_config(path), Form(iterations=180, images=4, side=100, depth=18)
    after = load_config(path, [*scaled(cfg, form), *own_solver(cfg, form).overrides()])
    solver, inputs, model = after.SOLVER, after.INPUT, after.MODEL
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (180, (120, 160), 10)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.OPTIMIZER) == (4, 0.0025, "SGD")
    assert (inputs.MIN_SIZE_TRAIN, inputs.MIN_SIZE_TEST) == ((80, 84, 88, 92, 96, 100), 100)
    assert (inputs.MAX_SIZE_TRAIN, inputs.MAX_SIZE_TEST) == (167, 167)
    assert (model.RESNETS.DEPTH, model.RESNETS.RES2_OUT_CHANNELS, model.RETINANET.NUM_CONVS) == (18, 64, 2)
    assert model.ANCHOR_GENERATOR.SIZES[0] == [16.0, 20.15875, 25.3984] and model.RETINANET.NORM == "SyncBN"
    # SGD by the ratio of the batches, AdamW by its root.
    sixteen = load_config(path, ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001", "SOLVER.WEIGHT_DECAY", "0.05"])
    assert own_solver(sixteen, form) == Solver("AdamW", 0.0005, 0.05)
    assert load_config(path, scaled(cfg, Form(180, 4, 100, 0))).MODEL.RESNETS.DEPTH == 50
    path = ROOT / "configs" / "ImageNet" / "resnet_R_18_lsq_w4a4_aux.yaml"
    after = load_config(path, scaled(load_config(path), Form(450, 16, 64, 18)))
    assert (after.SOLVER.MAX_ITER, after.SOLVER.WARMUP_ITERS) == (450, 10)
    assert (after.INPUT.CLASSIFIER.CROP_SIZE, after.INPUT.MIN_SIZE_TEST) == (64, 73)


def test_every_run_is_a_valid_config_from_the_start_of_its_family(parse):
    args = parse("--seed", "3")
    jobs = tool.make_jobs(args, tool.planned())
    starts = {}
    for run, job in jobs.items():
        cfg = load_config(job.config, job.overrides)
        check_config(cfg)
        assert cfg.SEED == 3 and cfg.SOLVER.MAX_ITER == job.iterations
        assert cfg.MODEL.QUANT.ENABLED == (run.kind == tool.LOW)
        assert [f"{source.output_dir}/model_final.pth" for source in job.sources] == [cfg.MODEL.WEIGHTS] * bool(
            cfg.MODEL.WEIGHTS
        )
        if run.kind == tool.START:
            assert run.config.startswith("quickstart/") and cfg.MODEL.WEIGHTS == ""
        else:
            assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR) == (run.solver.optimizer, pytest.approx(run.solver.rate))
            starts.setdefault(run.config, set()).update(job.sources)
        if run.bits:
            assert cfg.MODEL.QUANT.WEIGHT.NUM_BITS == cfg.MODEL.QUANT.INPUT.NUM_BITS == run.bits == 2
    # Two configs of a family have one start, and only the classifier's begins with random weights.
    assert {name: len(found) for name, found in starts.items() if len(found) != 1} == {"ImageNet/resnet_R_18_fp_aux": 0}
    assert len({job.output_dir for job in jobs.values()}) == len(jobs)


def test_a_start_has_what_the_scaled_detector_has(parse):
    """All parameters of the detector but a mask head's, in their shape, are in the start's checkpoint."""
    first = {run.config: job for run, job in tool.make_jobs(parse(), tool.planned()).items() if run.kind == tool.FULL}
    for job in first.values():
        if not job.sources:
            continue
        shapes = []
        for each in (job, *job.sources):
            cfg = load_config(each.config, [*each.overrides, "MODEL.WEIGHTS", "", "MODEL.AUX.ENABLED", "False"])
            fit_to_machine(cfg)
            with torch.device("meta"):
                model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
            shapes.append({key: value.shape for key, value in model.state_dict().items()})
        wanted, given = shapes
        more = {key for key in given.keys() - wanted.keys() if "mask_head" not in key}
        assert {key: shape for key, shape in wanted.items() if given.get(key) != shape} == {} and more == set()


def test_what_tells_most_of_each_family_is_run_first(parse):
    runs = list(tool.make_jobs(parse(), tool.planned()))
    row = rows_by_config()["fcos_R_18_FPN_1x_lsq_w4a4_aux"]
    last_of_first_part = max(runs.index(run) for run in (row.own, *row.others[:2]))
    for other in rows_by_config().values():
        assert runs.index(other.others[-1]) > last_of_first_part
        assert other.own not in other.others and len({str(run.solver) for run in other.others}) == len(other.others)


def test_table_by_hand(parse, tmp_path, monkeypatch, capsys):
    args, pairs = parse(), [(family, bits) for family, bits in tool.planned() if "fcos" in family.name]
    jobs = tool.make_jobs(args, pairs)
    rows = rows_by_config()
    row, full = rows["fcos_R_18_FPN_1x_lsq_w4a4_aux"], rows["fcos_R_18_FPN_1x_fp_bn_aux"]
    finish(jobs[row.own], 40.0)
    finish(jobs[row.continued], 43.0)
    finish(jobs[row.others[0]], 41.5)
    finish(jobs[row.others[1]], 0.0, diverged=True)
    finish(jobs[full.own], 30.0)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "README.md").write_text("# Configs\n")
    (tmp_path / "tools" / "experiments").mkdir(parents=True)
    for module in (tool, kept_runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    tool.write_results(args, pairs, jobs)
    text = (tmp_path / "configs" / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| fcos")]
    others = f"{row.others[0].solver} 41.5, {row.others[1].solver} 0.0"
    assert lines == [
        f"| fcos_R_18_FPN_1x_lsq_w4a4_aux | {row.own.solver} | 40.0 | 43.0 | {others} | 1.5 (wrong) |",
        f"| fcos_R_18_FPN_1x_fp_bn_aux | {full.own.solver} | 30.0 | - | - | - |",
    ]
    assert (
        "python tools/experiments/rehearse.py --seed 1`. 2026-01-02,\na machine" in text
        and "Left out, runs of a row: " in text
    )
    assert "fcos_R_18_FPN_1x_lsq_w4a4_aux (3 of 7); fcos_R_18_FPN_1x_fp_bn_aux (2 of 3)." in text
    assert (tmp_path / "tools" / "experiments" / "plots" / "rehearsal.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "tools" / "experiments" / "rehearsal_runs.json").read_text())) == 5
    assert "41.5" in capsys.readouterr().out


def test_an_unknown_family_is_refused_in_one_line(parse, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rehearse", "--families", "COCO/retinanet"])
    with pytest.raises(SystemExit, match="error: --families COCO/retinanet must be one of ImageNet/resnet_R_18_lsq"):
        tool.main()


@pytest.fixture
def unregistered():
    """Forgets the stand-ins' names afterwards: the next test has them in a folder of its own."""
    yield
    for name in ("rehearsal_scenes", "rehearsal_crops"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("word", ["ImageNet/resnet", "retinanet_R_18"])
@pytest.mark.usefixtures("unregistered")
def test_the_smallest_form_learns_and_moves_scales(word, tmp_path):
    family = next(f for f in families() if word in f.name)
    weights = ""
    for path, is_low in ((family.full, False), (family.low, True)):
        stage = short.train_stage(path, weights, str(tmp_path / path.stem), seed=1, depth=18)
        weights = str(tmp_path / path.stem / "model_final.pth")
        assert stage.fault() == "" and (stage.largest > 1) == (stage.smallest > 1) == is_low


def test_what_the_smallest_form_calls_a_fault():
    good = short.Stage("c", 2.0, 1.5, 1.1, 1.01)
    assert good.fault() == "" and short.Stage("c", 2.0, 1.5, 1.0, 1.0).fault() == ""
    assert "the loss does not fall, 2.000 to nan" in short.Stage("c", 2.0, float("nan"), 1.1, 1.01).fault()
    assert "the loss does not fall" in short.Stage("c", 2.0, 2.0, 1.1, 1.01).fault()
    assert "a scale moved by x3" in short.Stage("c", 2.0, 1.5, 3.0, 1.01).fault()
    assert "an input's scale moved by x1.0001 alone" in short.Stage("c", 2.0, 1.5, 1.1, 1.0001).fault()
