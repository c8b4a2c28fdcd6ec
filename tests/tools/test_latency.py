import sys
import time

import pytest
from latency import Times, interleave, peak_memory, saturating
from machine import Machine

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.0GHz
flags\t\t: fpu sse {flags}

processor\t: 1
model name\t: Some CPU @ 2.0GHz
flags\t\t: fpu sse {flags}
"""


@pytest.mark.parametrize(
    "flags, vnni, words",
    [
        ("avx2", (), "no VNNI"),
        ("avx512f avx512_vnni", ("avx512_vnni",), "VNNI (avx512_vnni)"),
        ("avx2 avx_vnni avx_vnni_int8", ("avx_vnni",), "VNNI (avx_vnni)"),
    ],
)
def test_machine(tmp_path, flags, vnni, words):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags))
    machine = Machine.here(str(tmp_path / "cpuinfo"))
    assert machine.processor == "Some CPU @ 2.0GHz" and machine.vnni == vnni and words in str(machine)


def test_machine_without_cpuinfo(tmp_path):
    machine = Machine.here(str(tmp_path / "none"))
    assert machine.processor and machine.vnni == ()


def conv(name, largest_input, largest_weight, kind="int8", key="layer"):
    codes = {"max_input_code": largest_input, "max_weight_code": largest_weight}
    return {"kind": "conv", key: name, "weight_type": kind, **codes}


def test_saturating():
    # 2 * 129 * 127 = 32766 fits int16, 2 * 128 * 128 = 32768 does not.
    layers = [
        {"kind": "pad"},
        conv("fits", 129, 127),
        conv("wide", 128, 128),
        conv("four bits", 15, 127),
        conv("wide", 128, 128),
        conv("stem", 255, 127),
        conv("unsigned", 255, 127, "uint8"),
    ]
    assert saturating(layers) == ["wide", "stem"]
    assert saturating([]) == []
    assert saturating([conv("of an older export", 128, 128, key="path")]) == ["of an older export"]


def test_times():
    ours, theirs = Times((1.0, 2.0, 4.0)), Times((3.0, 3.0, 4.0))
    assert ours.median == 2.0
    assert ours.speed_up(theirs) == (1.5, 1.0, 3.0)
    assert ours.speed_up(ours) == (1.0, 1.0, 1.0)


def test_interleave_takes_turns():
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.02))}, rounds=3)
    warm_up = len(calls) - 12
    assert sorted(calls[:warm_up]) == ["a"] * (warm_up // 2) + ["b"] * (warm_up // 2)
    # An untimed call before each timed one.
    assert calls[warm_up:] == ["a", "a", "b", "b"] * 3
    assert all(len(t.seconds) == 3 for t in times.values())
    assert min(times["b"].seconds) >= 0.02 > times["a"].median


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory():
    ballast = bytearray(200 << 20)  # of this process; a new interpreter's peak must not contain it
    small = peak_memory("import sys; assert sys.argv[1:] == ['x']", "x")
    large = peak_memory("a = bytearray(50 << 20); a[::4096] = b'1' * len(a[::4096]); del a")
    assert small < 40 << 20 and 49 << 20 < large - small < 60 << 20
    assert len(ballast)
    with pytest.raises(RuntimeError, match="ValueError: no"):
        peak_memory("raise ValueError('no')")
