import dataclasses
import json
import sys

import pytest
from jobs import Job, markdown_table, mean_and_spread, run_jobs, write_section

SCRIPT = """
import json, os, sys
out = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
runs = os.path.join(out, "runs"); n = len(open(runs).read()) if os.path.exists(runs) else 0
open(runs, "a").write("r" if "--resume" in sys.argv else "f")
if "13" in sys.argv and n == 0:
    open(os.path.join(out, "last_checkpoint"), "w").write("x")
    sys.exit("went wrong")
os.makedirs(os.path.join(out, "inference"), exist_ok=True)
json.dump({"AP": 12.0}, open(os.path.join(out, "inference", "metrics.json"), "w"))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs._POLL_SECONDS", 0.05)
    script, base, config = (tmp_path / name for name in ("net.py", "base.yaml", "c.yaml"))
    script.write_text(SCRIPT)
    base.write_text("SEED: 1")
    config.write_text("_BASE_: base.yaml")

    def job(name, *overrides):
        return Job(name, str(config), overrides, str(tmp_path / name), 10)

    def runs(name):
        return (tmp_path / name / "runs").read_text()

    return job, runs, str(script), base


def test_done_is_not_done_again_until_its_config_changes(make, capsys):
    job, runs, script, base = make
    ran = []
    run_jobs([job("a"), job("b")], script, ran.append)
    run_jobs([job("a"), job("b")], script, ran.append)
    assert ran == [job("a"), job("b")] and job("b").finished() is not None
    assert runs("a") == runs("b") == "f"
    assert "[2/2] b: AP 12.0" in capsys.readouterr().out
    base.write_text("SEED: 2")
    run_jobs([job("a")], script)
    assert runs("a") == "ff"
    run_jobs([job("a", "SEED", "3")], script)
    assert runs("a") == "fff"
    reader = dataclasses.replace(job("c"), sources=(job("a", "SEED", "3"),))
    run_jobs([reader], script)
    assert reader.finished() and dataclasses.replace(reader, sources=(job("a"),)).finished() is None
    noted = job("a", "SEED", "3").finished()
    assert noted["command"].startswith("python ") and noted["seconds"] > 0 and sys.executable not in noted["command"]


def test_where_a_declared_dataset_lies_changes_nothing_and_its_name_does(make):
    job, *_ = make

    def fingerprint(**fields):
        return job("d", "DATASETS.DECLARED", str([{"name": "mine", "format": "voc", **fields}])).fingerprint()

    here = fingerprint(root="/data/BCCD", split="train")
    assert here == fingerprint(root="BCCD", split="train") == fingerprint(root="elsewhere/BCCD/", split="train")
    assert here != fingerprint(root="/data/VOC", split="train") and here != fingerprint(root="/data/BCCD", split="val")


def test_a_failure_shows_its_log_and_the_next_run_resumes(make):
    job, runs, script, _ = make
    with pytest.raises(RuntimeError, match="x failed with status 1.*\nwent wrong"):
        run_jobs([job("x", "SEED", "13"), job("y")], script)
    run_jobs([job("x", "SEED", "13"), job("y")], script)
    assert runs("x") == "fr" and runs("y") == "f"


def test_numbers_and_tables(tmp_path):
    assert mean_and_spread([1.0, 2.0, 3.0, None]) == "2.0 ± 1.0"
    assert mean_and_spread([4.25]) == "4.2" and mean_and_spread([None]) == "-"
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    path = tmp_path / "R.md"
    write_section(path, "one", "first")
    write_section(path, "two", "second")
    write_section(path, "one", "changed")
    text = path.read_text()
    assert text.startswith("# Results\n") and "first" not in text
    assert text.index("changed") < text.index("second") and text.count("begin one") == 1


def test_metrics_are_read(make):
    job, _, script, _ = make
    run_jobs([job("m")], script)
    assert job("m").metrics() == {"AP": 12.0} == json.loads(json.dumps({"AP": 12.0}))
