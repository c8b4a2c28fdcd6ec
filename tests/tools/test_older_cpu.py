"""Commands that run as if this processor were an older one."""

import signal
import subprocess
import sys

import debian
import older_cpu
import pytest
from machine import CPU_LEVEL, Machine

FEATURES = "import numpy; print(*numpy.show_config('dicts')['SIMD Extensions'].get('found', ()))"


@pytest.fixture(params=older_cpu.HIDDEN)
def level(request, tmp_path):
    try:
        older_cpu.build(request.param, tmp_path)
    except debian.NotHere as reason:
        pytest.skip(str(reason))
    return request.param


def run(level, *command):
    program = [sys.executable, older_cpu.__file__, "--level", level, *command]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_newer_instructions_are_hidden_from_libraries(level):
    found = run(level, sys.executable, "-c", FEATURES)
    assert found.returncode == 0, found.stderr
    assert "AVX512" not in found.stdout and "X86_V4" not in found.stdout
    if level == "sse4":
        assert "AVX2" not in found.stdout and "X86_V3" not in found.stdout


def test_the_status_of_the_command_and_its_crash_pass_through(level):
    assert run(level, sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    crash = "import ctypes, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); ctypes.string_at(0)"
    status = run(level, sys.executable, "-c", crash).returncode
    assert status % 256 == -signal.SIGSEGV % 256


def test_threads_that_are_started_later_are_hidden_from_as_well(level):
    code = (
        f"import threading; thread = threading.Thread(target=exec, args=({FEATURES!r},)); thread.start(); thread.join()"
    )
    found = run(level, sys.executable, "-c", code)
    assert found.returncode == 0 and "AVX512" not in found.stdout and found.stdout.strip() != "error"


def test_the_bits_are_those_of_the_manual():
    # Intel's manual, volume 2, CPUID: AVX512F is EBX bit 16 of leaf 7, AVX512_VNNI ECX bit 11, AMX-INT8 EDX bit 25,
    # AVX-VNNI EAX bit 4 of subleaf 1; AVX2 is EBX bit 5, AVX ECX bit 28 of leaf 1, SSE4.2 its bit 20.
    avx2, sse4 = older_cpu.HIDDEN["avx2"], older_cpu.HIDDEN["sse4"]
    _, ebx, ecx, edx = avx2[older_cpu.LEAF_7]
    assert ebx >> 16 & 1 and ecx >> 11 & 1 and edx >> 25 & 1 and not ebx >> 5 & 1
    assert avx2[older_cpu.LEAF_7_1][0] >> 4 & 1
    assert sse4[older_cpu.LEAF_7][1] >> 5 & 1 and sse4[older_cpu.LEAF_1][2] >> 28 & 1
    assert not sse4[older_cpu.LEAF_1][2] >> 20 & 1


def test_a_missing_command_and_an_unable_machine_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(older_cpu.os, "uname", lambda: type("", (), {"machine": "riscv64"}))
    monkeypatch.setattr(sys, "argv", ["older_cpu.py", "true"])
    with pytest.raises(SystemExit) as end:
        older_cpu.main()
    assert end.value.code == older_cpu.USER_ERROR
    assert capsys.readouterr().err == "error: this machine is riscv64, and not x86-64\n"
    monkeypatch.setattr(sys, "argv", ["older_cpu.py"])
    with pytest.raises(SystemExit):
        older_cpu.main()
    assert "a COMMAND is missing" in capsys.readouterr().err


def test_the_machine_of_a_measurement_says_what_is_hidden(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: avx2 avx512_vnni\n")
    monkeypatch.setenv(CPU_LEVEL, "avx2")
    machine = Machine.here(str(tmp_path / "cpuinfo"))
    assert machine.vnni == () and str(machine).endswith("no VNNI (newer instructions than AVX2 hidden)")
