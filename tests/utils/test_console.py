"""A program whose output nobody reads any more ends in silence; a training goes on."""

import io
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from aqdet.utils.console import OUTPUT_CLOSED, errors_in_one_line, run_console

TOOLS = ROOT / "tools"
PROGRAM = """
import sys
from aqdet.utils.console import run_console

def main():
    try:
        for line in range(100_000):
            print(line)
    except OSError as error:
        sys.exit(f"error: {error}")
    open(sys.argv[1], "w").close()

run_console(main, goes_on=%s)
"""


def run_into_closed_pipe(command):
    """Status and error output of a command whose reader goes away after the first line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        first = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    return first, process.returncode, errors


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_program_ends_in_silence(tmp_path, unbuffered):
    ended = tmp_path / "ended"
    result = run_into_closed_pipe([sys.executable, *unbuffered, "-c", PROGRAM % False, ended])
    assert result == ("0\n", OUTPUT_CLOSED, "") and not ended.exists()


def test_a_training_goes_on_and_says_so(tmp_path):
    ended = tmp_path / "ended"
    result = run_into_closed_pipe([sys.executable, "-c", PROGRAM % True, ended])
    assert result == ("0\n", 0, "nobody reads the output any more; the work goes on\n") and ended.exists()


def test_output_that_is_still_buffered_at_the_end():
    """It fails to be written only after the program has done its work."""
    main = "lambda: (print(1), sys.stdin.read())"
    program = f"import sys; from aqdet.utils.console import run_console; run_console({main})"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.close()
        _, errors = process.communicate()
    assert (process.returncode, errors) == (OUTPUT_CLOSED, b"")


def test_the_command_lists_configs_into_a_closed_pipe():
    program = "import aqdet.main as command, aqdet.utils.configs as configs\n"
    program += "configs.shipped_configs = lambda: map(str, range(100_000))\ncommand.main()"
    result = run_into_closed_pipe([sys.executable, "-c", program, "configs"])
    assert result == ("0\n", OUTPUT_CLOSED, "")


def test_output_and_status_are_the_programs(capsys):
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as end:
        run_console(lambda: (print("out"), sys.exit(3)))
    assert end.value.code == 3 and capsys.readouterr().out == "out\n"
    assert (sys.stdout, sys.stderr) == streams


def test_a_file_gets_all_output_in_its_encoding(tmp_path):
    program = "from aqdet.utils.console import run_console; run_console(lambda: print('é' * 9000))"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-X", "utf8", "-c", program], stdout=out, check=True, cwd=ROOT)
    assert (tmp_path / "out").read_text("utf-8") == "é" * 9000 + "\n"


def test_every_program_is_run_so():
    """All but the one that makes aqdet importable in the first place."""
    ends = {path.name: path.read_text("utf-8").partition('__name__ == "__main__":')[2] for path in TOOLS.rglob("*.py")}
    others = {name for name, end in ends.items() if end and "run_console(" not in end}
    assert others == {"install_detectron2.py"}


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def main():
        raise KeyboardInterrupt

    monkeypatch.delenv("AQDET_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end:
        run_console(main)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"
    monkeypatch.setenv("AQDET_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        run_console(main)


SIGTERM_ARRIVES = """
import multiprocessing, os, signal, sys, time
from aqdet.utils.console import run_console
from aqdet.utils.files import replacing

def main():
    pool = multiprocessing.get_context("fork").Pool(1)
    pool.apply(abs, (1,))
    pool.terminate()  # whose process ends by the same signal
    pool.join()
    with replacing(sys.argv[1]) as aside:
        aside.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

run_console(main)
"""


def test_sigterm_is_one_line_and_leaves_no_half_written_file(tmp_path):
    command = [sys.executable, "-c", SIGTERM_ARRIVES, str(tmp_path / "file.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n" and os.listdir(tmp_path)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "stopped\n" and not os.listdir(tmp_path)


def test_a_stream_without_a_descriptor_is_left_alone(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    run_console(lambda: print("out"))
    assert stream.getvalue() == "out\n"


class Verdict(ValueError):
    exit_status = 3


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no such\nkey"), 2, "error: no such key (AQDET_DEBUG=1 shows where)\n"),
        (Verdict("not good enough"), 3, "error: not good enough\n"),
    ],
)
def test_only_an_error_in_the_input_says_how_to_see_where(error, status, line, capsys, monkeypatch):
    monkeypatch.delenv("AQDET_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end, errors_in_one_line():
        raise error
    assert end.value.code == status
    assert capsys.readouterr().err == line
