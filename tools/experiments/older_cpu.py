#!/usr/bin/env python
"""Runs a command as if this x86-64 processor were an older one.

    python tools/experiments/older_cpu.py [--level avx2|sse4] COMMAND ...

    avx2    without AVX-512, VNNI and AMX (as Haswell; the default)
    sse4    also without AVX, AVX2 and FMA (as Nehalem)

Speed and values of kernels that a library chooses by the processor can so be seen without that processor, at the
speed of this one, which an emulator does not have. The kernel lets a process fault at the instruction CPUID (Linux
4.12, arch_prctl(ARCH_SET_CPUID), where /proc/cpuinfo has the flag cpuid_fault); a small library, which is compiled by
gcc and loaded before all others, answers in its place, with the newer features left out. Instructions are hidden, not
disabled: what does not ask CPUID still uses them, as the C library does, which has asked before. Clock, caches and
memory are this machine's. The exit status is the command's, or 2 if the request cannot be met.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from debian import NotHere, program

from aqdet.utils.console import run_console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # machine.py
USER_ERROR = 2
LEAF_1, LEAF_7, LEAF_7_1 = (1, 0), (7, 0), (7, 1)
_NEWER_THAN_AVX2 = {
    # AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS, VP2INTERSECT, FP16;
    # AMX BF16, TILE, INT8.
    LEAF_7: (0, sum(1 << bit for bit in (16, 17, 21, 26, 27, 28, 30, 31)), 0x5842, 0x3C0010C),
    # AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10.
    LEAF_7_1: (0xA00030, 0, 0, 0x80430),
}
_NEWER_THAN_SSE4 = _NEWER_THAN_AVX2 | {
    LEAF_1: (0, 0, (1 << 12) | (1 << 28) | (1 << 29), 0),  # FMA, AVX, F16C
    # AVX2, too; VAES, VPCLMULQDQ.
    LEAF_7: (0, _NEWER_THAN_AVX2[LEAF_7][1] | 1 << 5, _NEWER_THAN_AVX2[LEAF_7][2] | 0x600, _NEWER_THAN_AVX2[LEAF_7][3]),
}
HIDDEN = {"avx2": _NEWER_THAN_AVX2, "sse4": _NEWER_THAN_SSE4}
"""Level -> (leaf, subleaf) of CPUID -> the bits of EAX, EBX, ECX and EDX that are cleared."""
_LIBRARY = """
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum {{ ARCH_SET_CPUID = 0x1012 }};
static const uint32_t hidden[][6] = {{{rows}}}; /* leaf, subleaf, EAX, EBX, ECX, EDX */
static struct sigaction former;

static void answer(int number, siginfo_t *info, void *context) {{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    (void)info;
    (void)number;
    if (code[0] != 0x0f || code[1] != 0xa2) {{ /* not CPUID: fault again, as without this library */
        sigaction(SIGSEGV, &former, NULL);
        return;
    }}
    uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], found[4];
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    for (size_t row = 0; row < sizeof hidden / sizeof *hidden; row++) {{
        if (hidden[row][0] == leaf && (leaf != 7 || hidden[row][1] == subleaf)) {{
            for (int i = 0; i < 4; i++) found[i] &= ~hidden[row][2 + i];
        }}
    }}
    registers[REG_RAX] = found[0];
    registers[REG_RBX] = found[1];
    registers[REG_RCX] = found[2];
    registers[REG_RDX] = found[3];
    registers[REG_RIP] += 2;
}}

__attribute__((constructor)) static void start(void) {{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &former);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) _exit({cannot});
}}
"""
_CANNOT = 117
"""Exit status of a process whose kernel or processor cannot fault at CPUID."""


def build(level: str, folder: Path) -> Path:
    """Compiles the library that hides the instructions that are newer than ``level``.

    Raises:
        NotHere: If this is no x86-64, gcc is missing, or the processor or its kernel cannot fault at CPUID.
    """
    if os.uname().machine != "x86_64":
        raise NotHere(f"this machine is {os.uname().machine}, and not x86-64")
    gcc = program("gcc", package="gcc")
    rows = ", ".join(
        "{" + ", ".join(f"{value:#x}u" for value in (*key, *bits)) + "}" for key, bits in HIDDEN[level].items()
    )
    source, library = folder / "older_cpu.c", folder / f"older_cpu_{level}.so"
    source.write_text(_LIBRARY.format(rows=rows, cannot=_CANNOT))
    subprocess.run([gcc, "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    if subprocess.run([program("true", package="coreutils")], env={"LD_PRELOAD": str(library)}, check=False).returncode:
        raise NotHere("this processor or its kernel cannot hide instructions (no cpuid_fault in /proc/cpuinfo)")
    return library


def environment(level: str, library: Path) -> dict[str, str]:
    """Returns the environment of a process for which the library of ``level`` hides instructions."""
    from machine import CPU_LEVEL

    others = os.environ.get("LD_PRELOAD", "")
    return {**os.environ, "LD_PRELOAD": f"{library} {others}".strip(), CPU_LEVEL: level}


def run(level: str, command: Sequence[str]) -> int:
    """Runs a command with newer instructions hidden, and returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(level, Path(folder))
        return subprocess.run(command, env=environment(level, library), check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=HIDDEN, default="avx2", help="the processor to be like (%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")
    args = parser.parse_args()
    if not args.command:
        parser.error("a COMMAND is missing, such as python tools/benchmark.py export ...")
    try:
        sys.exit(run(args.level, args.command))
    except (NotHere, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    run_console(main)
