import json
import sys

import jobs
import pytest
from helpers import load_tool

from aqdet.config import load_config
from aqdet.engine import check_config
from aqdet.evaluation.coco import METRICS

PICTURE_SECONDS = 20  # for the dataset, the table and the picture


@pytest.fixture(scope="module")
def tool():
    return load_tool("quickstart")


def test_three_runs_of_equal_length_from_one_start(tool, tmp_path):
    jobs = tool.make_jobs(str(tmp_path), short=False)
    assert set(jobs) == {"start", *tool.VARIANTS} and not jobs["start"].sources
    cfgs = {key: load_config(job.config, job.overrides) for key, job in jobs.items()}
    for cfg in cfgs.values():
        check_config(cfg)
    start = cfgs.pop("start")
    assert start.MODEL.WEIGHTS == "" and not start.MODEL.QUANT.ENABLED and start.MODEL.AUX.ENABLED
    assert start.DATASETS.TEST == () and start.SOLVER.MAX_ITER == tool.START_ITERATIONS
    assert {cfg.MODEL.WEIGHTS for cfg in cfgs.values()} == {f"{tmp_path}/start/model_final.pth"}
    assert all(jobs[key].sources == (jobs["start"],) for key in cfgs)
    lengths = {(cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS, cfg.SEED) for cfg in cfgs.values()}
    assert lengths == {(tool.ITERATIONS, 0.0005, tool.WARMUP_ITERS, start.SEED)}
    networks = {(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS) for cfg in (start, *cfgs.values())}
    assert networks == {(16, 32)}
    assert {cfg.DATASETS.TEST for cfg in cfgs.values()} == {(tool.TEST,)}
    assert [cfgs[key].MODEL.QUANT.ENABLED for key in tool.VARIANTS] == [False, True, True]
    assert [cfgs[key].MODEL.AUX.ENABLED for key in tool.VARIANTS] == [False, False, True]
    # An interruption loses half a run at the most.
    assert all(2 * cfg.SOLVER.CHECKPOINT_PERIOD <= cfg.SOLVER.MAX_ITER for cfg in (start, *cfgs.values()))
    assert {job.iterations for job in tool.make_jobs(str(tmp_path), short=True).values()} == {4}


def test_the_longest_run_is_started_first(tool, tmp_path):
    runs = list(tool.make_jobs(str(tmp_path), short=False).values())[1:]
    assert [job.work for job in runs] == sorted((job.work for job in runs), reverse=True)


def test_it_takes_less_than_eight_minutes_on_two_cores_without_vnni(tool, tmp_path):
    """The start has both cores; then two runs go side by side, the shorter ones one after the other."""
    jobs = tool.make_jobs(str(tmp_path), short=False)
    aux, plain, full = (jobs[key].work for key in ("lsq_w4a4_aux", "lsq_w4a4", "fp_bn_continued"))
    assert jobs["start"].work / 2 + max(aux, plain + full) + PICTURE_SECONDS < 8 * 60 / 1.2


def test_it_says_what_the_table_shows(tool, tmp_path, monkeypatch, capsys):
    def describe(key, job):
        size = 6000 if key == "fp_bn_continued" else 1500
        return {"detector": key, **dict.fromkeys(METRICS, 20.0), "parameters": 1000, "weight bytes": size}

    monkeypatch.setattr(jobs, "run_jobs", lambda *args, **kwargs: None)
    monkeypatch.setattr(tool, "describe", describe)
    monkeypatch.setattr(tool, "make_picture", lambda jobs, path: None)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--short", "--output", str(tmp_path)])
    tool.main()
    shown = capsys.readouterr().out
    assert "| lsq_w4a4_aux" in shown and "take 1/4.0 of the bytes" in shown
    assert f"tools/export_model.py --config-file {tmp_path}/lsq_w4a4_aux/config.yaml" in shown
    assert "One seed, 4 + 4 iterations, a ResNet-18 of a quarter" in shown
    assert [row["detector"] for row in json.loads((tmp_path / "results.json").read_text())] == list(tool.VARIANTS)
