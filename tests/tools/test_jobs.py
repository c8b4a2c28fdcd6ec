import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import jobs as tool
import pytest
from jobs import Job, run_jobs

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


def test_a_loss_that_is_not_finite_is_a_result_where_it_may_be(make, tmp_path, capsys):
    job, _, _, _ = make
    script = tmp_path / "diverges.py"
    script.write_text("import sys; sys.exit(3)")
    with pytest.raises(RuntimeError, match="x failed with status 3"):
        run_jobs([job("x")], str(script))
    may = dataclasses.replace(job("y"), may_diverge=True)
    run_jobs([may], str(script))
    assert may.finished()["diverged"] and may.metrics() == {}
    assert "y: a loss was not finite: stopped in 0:0" in capsys.readouterr().out
    script.write_text("import sys; sys.exit(2)")
    with pytest.raises(RuntimeError, match="z failed with status 2"):
        run_jobs([dataclasses.replace(job("z"), may_diverge=True)], str(script))


def test_metrics_are_read(make):
    job, _, script, _ = make
    run_jobs([job("m")], script)
    assert job("m").metrics() == {"AP": 12.0} == json.loads(json.dumps({"AP": 12.0}))


TRAINING = """
import json, os, sys, time
out = sys.argv[sys.argv.index("OUTPUT_DIR") + 1]
events = os.path.join(os.path.dirname(out), "events")
note = lambda event: open(events, "a").write(f"{event} {os.path.basename(out)}\\n")
note("begin " + os.environ.get("OMP_NUM_THREADS", "-"))
with open(os.path.join(out, "metrics.json"), "a") as file:
    file.write(json.dumps({"iteration": 4, "total_loss": 1.25}) + "\\n")
seconds = os.environ.get("SECONDS_OF_" + os.path.basename(out), os.environ["TRAINING_SECONDS"])
deadline = time.monotonic() + float(seconds)
while time.monotonic() < deadline:
    time.sleep(0.02)
note("end -")
"""


@pytest.fixture
def trainings(make, tmp_path, monkeypatch):
    """Function of a name and sources: a job that says when it begins and ends; and the lines that it has said."""
    job, _, _, _ = make
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setenv("TRAINING_SECONDS", "0.6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(tool.os, "sched_getaffinity", lambda _: range(4), raising=False)

    def events():
        return [tuple(line.split()) for line in (tmp_path / "events").read_text().splitlines()]

    return lambda name, *sources: dataclasses.replace(job(name), sources=sources), str(script), events


def test_jobs_go_side_by_side_after_their_sources(trainings, monkeypatch):
    job, script, events = trainings
    monkeypatch.setenv("SECONDS_OF_b", "4")
    start = job("start")
    run_jobs([start, *(job(name, start) for name in "abc")], script, at_once=2)
    found = events()
    # All four cores for the start; two each for jobs that share them; c takes the place of a.
    assert found[:2] == [("begin", "4", "start"), ("end", "-", "start")]
    assert set(found[2:4]) == {("begin", "2", "a"), ("begin", "2", "b")}
    assert found[4:] == [("end", "-", "a"), ("begin", "2", "c"), ("end", "-", "c"), ("end", "-", "b")]


def test_jobs_alone_and_chosen_threads_are_left_as_they_are(trainings, monkeypatch):
    job, script, events = trainings
    monkeypatch.setenv("TRAINING_SECONDS", "0")
    run_jobs([job("a")], script)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_jobs([job("b"), job("c")], script, at_once=2)
    assert [event[1] for event in events() if event[0] == "begin"] == ["-", "3", "3"]


def test_progress_has_an_eta_where_the_output_is_no_terminal(trainings, monkeypatch, capsys):
    job, script, _ = trainings
    monkeypatch.setattr(tool, "_LINE_SECONDS", 0.2)
    run_jobs([job("a"), job("b")], script, at_once=2)
    lines = capsys.readouterr().out.splitlines()
    shown = "iteration 5 of 10, loss 1.25, 0:00 min"
    line = next(line for line in lines if line.count(shown) == 2)
    assert re.fullmatch(rf"\[1/2\] a: {shown}; \[2/2\] b: {shown}; ETA 0:0\d min", line)
    assert "[2/2] b: done in 0:00 min" in lines and not any("\r" in line for line in lines)


def test_a_line_a_minute_and_no_more(trainings, capsys):
    job, script, _ = trainings
    run_jobs([job("a")], script)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_eta_counts_work_of_this_start_alone(make, monkeypatch):
    job, *_ = make
    first, second, third = (
        dataclasses.replace(job(n), cost=c, overhead=o) for n, c, o in zip("abc", (2, 1, 3), (5, 0, 10), strict=True)
    )
    grid = tool._Grid([first, second, third])
    now = time.monotonic()
    monkeypatch.setattr(tool.time, "monotonic", lambda: now + 30)
    grid._start = now
    assert grid.eta() is None

    class Half:
        job, first_iteration, seconds = second, 2, 30.0
        progress = staticmethod(lambda: (6, 1.0))
        work_done = staticmethod(lambda: 4.0)

    # 25 of the first and 4 of 10 iterations of the second, in 30 s; 4 of the second and 40 of the third are left.
    grid.waiting, grid.running, grid._done = [third], [Half()], first.work
    assert first.work == 25 and grid.eta() == pytest.approx((4 + 40) * 30 / 29)


def test_progress_of_a_resumed_job_is_that_of_the_new_start(trainings, monkeypatch):
    job, script, _ = trainings
    monkeypatch.setenv("TRAINING_SECONDS", "20")
    resumed = job("r")
    folder = resumed.output_dir
    os.makedirs(folder)
    for name, text in (
        ("started.json", json.dumps(resumed.fingerprint())),
        ("last_checkpoint", "model_0000002.pth"),
        ("metrics.json", '{"iteration": 7, "total_loss": 9.0}\n'),
    ):
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    running = tool._Running(resumed, script, None)
    try:
        assert running.progress() in ((3, None), (5, 1.25))
        deadline = time.monotonic() + 20
        while running.progress()[1] is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running.progress() == (5, 1.25) and running.work_done() == 2
    finally:
        running.terminate()
        running.wait()
    assert running.has_ended()


def test_sigterm_stops_the_trainings_too(trainings, tmp_path):
    job, script, events = trainings
    program = (
        "import sys; sys.path[:0] = sys.argv[4:]; import jobs\n"
        "from jobs import Job, run_jobs\njobs._POLL_SECONDS = 0.05\n"
        "run_jobs([Job(n, sys.argv[1], (), sys.argv[2] + n, 10) for n in 'ab'], sys.argv[3], at_once=2)"
    )
    environment = {**os.environ, "TRAINING_SECONDS": "60"}
    arguments = [job("a").config, f"{tmp_path}/", script, *sys.path]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "events").is_file() and len(events()) == 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM and time.monotonic() - start < 20
    finally:
        process.kill()
    assert [event[0] for event in events()] == ["begin", "begin"]
