import pytest
from helpers import load_tool

from aqdet.config import load_config
from aqdet.engine import check_config


@pytest.fixture(scope="module")
def tool():
    return load_tool("quickstart")


def test_three_runs_of_equal_length_from_one_start(tool, tmp_path):
    jobs = tool.make_jobs(str(tmp_path), short=False)
    assert list(jobs) == ["start", *tool.VARIANTS] and not jobs["start"].sources
    start, *runs = (load_config(job.config, job.overrides) for job in jobs.values())
    for cfg in (start, *runs):
        check_config(cfg)
    assert start.MODEL.WEIGHTS == "" and not start.MODEL.QUANT.ENABLED
    assert {cfg.MODEL.WEIGHTS for cfg in runs} == {f"{tmp_path}/start/model_final.pth"}
    assert all(job.sources == (jobs["start"],) for job in list(jobs.values())[1:])
    lengths = {(cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) for cfg in runs}
    assert lengths == {(tool.ITERATIONS, runs[1].SOLVER.BASE_LR, start.SEED)}
    assert [cfg.MODEL.QUANT.ENABLED for cfg in runs] == [False, True, True]
    assert [cfg.MODEL.AUX.ENABLED for cfg in runs] == [False, False, True]
    assert {job.iterations for job in tool.make_jobs(str(tmp_path), short=True).values()} == {4}
