import json
from pathlib import Path

import pytest
from helpers import make_cfg

from aqdet.report import load_runs
from aqdet.report.run_folder import config_differences, read_commands, run_names, series

LOG = (
    "[11/25 06:49:51] detectron2 INFO: Command line arguments: Namespace(config_file='a b.yaml', resume={resume}, "
    "eval_only=False, num_gpus=2, num_machines=1, "
    "opts=['SEED', '0', 'DATASETS.TRAIN', \"('x',)\", 'OUTPUT_DIR', '$o'])\n"
)
BEGUN = "[11/25 06:50:02] d2.engine.train_loop INFO: Starting training from iteration 0\n"


@pytest.fixture
def folder(tmp_path):
    """Function of a name and lines of metrics.json: a run's folder."""

    def make(name, lines=('{"iteration": 1, "total_loss": 1.0}',), *overrides):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(make_cfg(*overrides).dump())
        (path / "metrics.json").write_text("\n".join(lines))
        return path

    return make


def test_names_are_as_short_as_they_can_be():
    assert run_names([Path("/x/out/a"), Path("/x/out/b")]) == ["a", "b"]
    assert run_names([Path("/x/s0/a"), Path("/x/s1/a"), Path("/x/s1/b")]) == ["s0/a", "s1/a", "s1/b"]
    assert run_names([Path("/x/a")]) == ["a"]


def test_commands_come_from_the_log_each_once(folder):
    path = folder("a")
    first, second = LOG.format(resume=False) + BEGUN, LOG.format(resume=True) + "else\n" + BEGUN
    (path / "log.txt").write_text(first * 2 + second)
    (path / "done.json").write_text('{"command": "not this"}')
    start = "python tools/train_net.py --config-file 'a b.yaml'"
    end = "--num-gpus 2 SEED 0 DATASETS.TRAIN \"('x',)\" OUTPUT_DIR '$o'"
    assert read_commands(path) == [f"{start} {end}", f"{start} --resume {end}"]


def test_commands_without_a_log(folder):
    path = folder("a")
    assert read_commands(path) == []
    (path / "done.json").write_text('{"command": "python x"}')
    assert read_commands(path) == ["python x"]
    (path / "done.json").write_text("[")
    assert read_commands(path) == []
    (path / "inference").mkdir(exist_ok=True)
    evaluated = "INFO: Command line arguments: evaluated\nINFO: Start inference on 4 batches\n"
    (path / "inference" / "log.txt").write_text(evaluated)
    (path / "log.txt").write_text("INFO: Command line arguments: run(x)(\n" + BEGUN)
    assert read_commands(path) == ["run(x)(", "evaluated"]


def test_refused_commands_are_not_listed(folder):
    """Logs of before have them; each of these lines is of a command that was refused before it began."""
    path, log = folder("a"), LOG.format(resume=False)
    refused = log.replace("'SEED', '0'", "'SEED', 'x'")
    (path / "log.txt").write_text(refused + log + BEGUN + BEGUN + refused)
    (command,) = read_commands(path)
    assert "SEED 0" in command
    (path / "log.txt").write_text(refused)
    assert read_commands(path) == []


def test_a_command_without_a_step_is_listed(folder):
    path = folder("a")
    (path / "log.txt").write_text(
        LOG.format(resume=False) + "[11/25] aqdet.engine INFO: SOLVER.MAX_ITER is 0: no step\n"
    )
    assert len(read_commands(path)) == 1


def test_history_with_values_that_are_not_finite(folder):
    lines = ['{"iteration": 1, "total_loss": NaN, "lr": 1.0}', '{"iteration": 2, "total_loss": 3.0, "lr": Infinity}']
    (run,) = load_runs([str(folder("a", lines))])
    assert series(run, "total_loss") == ([2], [3.0]) and series(run, "lr") == ([1], [1.0])
    assert run.was_trained() and not any("cannot be read" in note for note in run.notes)


@pytest.mark.parametrize(
    "iterations, quantized, trained", [(0, True, False), (0, False, False), (2, True, False), (0, True, True)]
)
def test_post_training_quantization_is_known(folder, iterations, quantized, trained):
    lines = ('{"iteration": 0, "total_loss": 1.0}',) if trained else ('{"iteration": 0, "bbox/AP": 1.0}',)
    path = folder("a", lines, "SOLVER.MAX_ITER", str(iterations), "MODEL.QUANT.ENABLED", str(quantized))
    (run,) = load_runs([str(path)])
    assert run.is_post_training() == (iterations == 0 and quantized and not trained)
    (path / "metrics.json").unlink()
    (run,) = load_runs([str(path)])
    assert any("metrics.json is missing" in note for note in run.notes) != run.is_post_training()


def test_history_of_a_restarted_training(folder, caplog):
    def line(iteration, loss):
        return json.dumps({"iteration": iteration, "total_loss": loss})

    lines = [
        line(19, 9.0),
        line(39, 8.0),
        line(59, 7.0),
        line(39, 6.0),
        '{"iteration": 40, "bbox/AP": 1.5}',
        "",
        '{"ite',
    ]
    (run,) = load_runs([str(folder("a", lines))])
    assert series(run, "total_loss") == ([19, 39], [9.0, 6.0])
    assert series(run, "bbox/AP") == ([40], [1.5]) and series(run, "lr") == ([], [])
    assert any(note.endswith("cannot be read are left out: 1") for note in run.notes)
    assert any(note.endswith("replaced are left out: 2") for note in run.notes)
    assert "a: records of metrics.json" in caplog.text


def test_differences_between_configs(folder):
    paths = [
        folder("a", (), "SEED", "1"),
        folder("b", (), "SEED", "2", "MODEL.QUANT.RULES", '[["x", {"ENABLED": False}]]'),
    ]
    runs = load_runs(list(map(str, paths)))
    assert config_differences([run.cfg for run in runs]) == [
        ("MODEL.QUANT.RULES", ["[]", "[['x', {'ENABLED': False}]]"]),
        ("SEED", ["1", "2"]),
    ]
    assert config_differences([runs[0].cfg, runs[0].cfg]) == []


def test_overrides_and_another_config_file(folder, tmp_path):
    path = folder("a", (), "SEED", "1")
    (run,) = load_runs([str(path)], overrides=["SEED", "5"])
    assert run.cfg.SEED == 5
    (tmp_path / "other.yaml").write_text("SEED: 7\n")
    (run,) = load_runs([str(path)], config_file=str(tmp_path / "other.yaml"))
    assert run.cfg.SEED == 7


def test_what_a_folder_lacks_is_noted(tmp_path):
    (tmp_path / "inference").mkdir()
    (run,) = load_runs([str(tmp_path)])
    assert run.cfg is None and run.history == [] and run.weights() is None
    assert [note.split(":")[0] for note in run.notes] == [
        "config.yaml is missing",
        "neither done.json nor log.txt tells the command",
        "metrics.json is missing",
    ]


def test_weights_of_a_training_are_never_those_it_started_from(folder, tmp_path):
    start = tmp_path / "start.pth"
    start.write_bytes(b"x")
    trained, evaluated = folder("a"), folder("b", ())
    runs = load_runs([str(trained), str(evaluated)], overrides=["MODEL.WEIGHTS", str(start)])
    assert [run.weights() for run in runs] == [None, start]
    (trained / "model_0000009.pth").write_bytes(b"x")
    (trained / "last_checkpoint").write_text("model_0000009.pth")
    assert runs[0].weights() == trained / "model_0000009.pth"
    (trained / "model_final.pth").write_bytes(b"x")
    assert runs[0].weights() == trained / "model_final.pth"


def test_what_is_no_run_is_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    path = str(folder("a"))
    for paths, words in (
        ([str(tmp_path / "none")], "is no folder"),
        ([str(tmp_path / "empty")], "is no output folder of a training"),
        ([path, path + "/."], "the same output folder comes twice"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_runs(paths)
        assert "\n" not in str(error.value)


def test_the_config_of_an_evaluation_lies_with_its_results(tmp_path):
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "config.yaml").write_text("SEED: 9\n")
    assert load_runs([str(tmp_path)])[0].cfg.SEED == 9
    (tmp_path / "config.yaml").write_text("SEED: 8\n")
    (run,) = load_runs([str(tmp_path)])
    assert run.cfg.SEED == 8 and run.test_cfg.SEED == 9
    (tmp_path / "other.yaml").write_text("SEED: 7\n")
    (run,) = load_runs([str(tmp_path)], config_file=str(tmp_path / "other.yaml"))
    assert run.cfg.SEED == run.test_cfg.SEED == 7


def test_a_run_that_was_not_evaluated_has_the_test_sets_of_its_config(folder):
    (run,) = load_runs([str(folder("a"))])
    assert run.test_cfg is run.cfg and run.evaluation == {}


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_note_of_the_evaluation_is_passed_over(folder, text):
    path = folder("a")
    (path / "inference").mkdir()
    (path / "inference" / "evaluation.json").write_text(text)
    assert load_runs([str(path)])[0].evaluation == {}
