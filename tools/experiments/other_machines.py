#!/usr/bin/env python
"""Checks that an exported detector computes the same on other machines, to the bit.

    python tools/experiments/other_machines.py DIR [DIR ...]

The program writes golden vectors with the codes of all layers of each folder on this machine, and runs the runtime's
self-test on them on processors that QEMU emulates. It runs the same with ONNX Runtime in JavaScript:

    here         this machine, against the golden vectors in the folder, and with those of all layers
    here-avx2    this x86-64 processor with AVX-512, VNNI and AMX hidden (older_cpu.py)
    here-sse4    this x86-64 processor with AVX hidden, too
    x86-avx2     x86-64 with AVX2, without AVX-512 and VNNI (Haswell)
    x86-sse4     x86-64 without AVX (Nehalem)
    arm-dot      aarch64 with products of 8-bit integers (Neoverse N1)
    arm          aarch64 without them (Cortex-A72)
    node, web    onnxruntime-node, and onnxruntime-web, which is WebAssembly
    c, c-arm     detector.c of export_model.py --c, compiled for this machine, and for 32-bit ARM with NEON

The program needs qemu-user-static; for aarch64 also Debian's apt-get and dpkg, and for JavaScript Node.js and npm, all
with their registries; for C gcc, and gcc-arm-linux-gnueabihf with libc6-dev-armhf-cross. Machines whose programs are
missing are left out, with a line that says why. The aarch64 system and the npm packages stay in the cache folder. Each
machine and folder takes about half a minute. The exit status is 1 if something differs and 2 if the request cannot be
met.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import older_cpu
from aarch64 import debian_system, runtime_packages, write_cpuinfo
from debian import SECONDS_LIMIT, Command, NotHere, fetch, last_line, program, run_program

from aqdet.utils.arguments import file_to_read
from aqdet.utils.console import run_console

if TYPE_CHECKING:
    import numpy as np

    from aqdet.runtime.golden import Check

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # machine.py
DIFFERS, USER_ERROR = 1, 2
BASE_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
ARM = {
    "arm-dot": ("neoverse-n1", f"{BASE_FEATURES} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp", "0xd0c"),
    "arm": ("cortex-a72", BASE_FEATURES, "0xd08"),
}
X86 = {"x86-avx2": "Haswell", "x86-sse4": "Nehalem"}
JAVASCRIPT = {"node": "onnxruntime-node", "web": "onnxruntime-web"}
# Compiler and flags, its package, and the program that runs what it makes.
C = {
    "c": (("gcc", "-O3"), "gcc", ""),
    "c-arm": (
        ("arm-linux-gnueabihf-gcc", "-static", "-O3", "-mfpu=neon"),
        "gcc-arm-linux-gnueabihf and libc6-dev-armhf-cross",
        "qemu-arm-static",
    ),
}
HERE_AS = {"here-avx2": "avx2", "here-sse4": "sse4"}
MACHINES = ("here", *HERE_AS, *X86, *ARM, *JAVASCRIPT, *C)
# Operations that write integer codes; behind QuantizeLinear there may be a Clip, which then has the codes.
CODES = ("QuantizeLinear", "Clip", "MaxPool", "Resize")
SELF_TEST = """
import platform, sys, numpy, onnxruntime
from aqdet.runtime.cli import main
simd = numpy.show_config("dicts")["SIMD Extensions"]
found = " ".join([*simd.get("baseline", ()), *simd.get("found", ())])
print(f"on {platform.machine()}, {found}, Python {platform.python_version()}, NumPy {numpy.__version__}, "
      f"ONNX Runtime {onnxruntime.__version__}", flush=True)
main([sys.argv[1], "--self-test", "--threads", "1"])
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a machine.

    Attributes:
        machine: The machine's name.
        about: The processor and versions, as far as they are known.
        checks: The comparisons; empty if it did not run.
        seconds: The duration of the run.
        skipped: The reason why it did not run; "" if it did.
    """

    machine: str
    about: str = ""
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0
    skipped: str = ""

    @property
    def differs(self) -> bool:
        return any(not check.passed for check in self.checks)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="exported detector")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="this one alone; may be given again")
    parser.add_argument("--image", type=file_to_read, help="image for the detector (default: golden.npz's)")
    cache = Path(os.environ.get("AQDET_CACHE") or "~/.cache/aqdet").expanduser() / "machines"
    parser.add_argument("--cache", type=Path, default=cache, help="folder of downloads (default: %(default)s)")
    return parser.parse_args()


# --- golden vectors of all layers ---


def inner_codes(model: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the tensors of ``model.onnx`` that are integer codes."""
    import onnx

    nodes = onnx.load(model).graph.node
    clipped = {node.input[0] for node in nodes if node.op_type == "Clip"}
    return [node.output[0] for node in nodes if node.op_type in CODES and node.output[0] not in clipped]


def write_all_layers(folder: Path, target: Path, image: np.ndarray | None) -> None:
    """Copies what is executed of an exported folder, with golden vectors of all layers as this machine has them.

    Args:
        folder: The exported detector.
        target: The folder to write.
        image: ``(H, W, 3)`` uint8 in BGR order; None for the image of the folder's own golden vectors.
    """
    import numpy as np

    from aqdet.runtime import read_description, write_description
    from aqdet.runtime.folder import DESCRIPTION, MODEL
    from aqdet.runtime.golden import GOLDEN, write_golden

    if image is None:
        if not (folder / GOLDEN).is_file():
            raise FileNotFoundError(f"{folder / GOLDEN} does not exist: give an --image")
        with np.load(folder / GOLDEN, allow_pickle=False) as golden:
            image = golden["image"]
    target.mkdir(parents=True)
    graphs = read_description(folder).needed
    for name in graphs:
        shutil.copyfile(folder / name, target / name)
    write_description(target, json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")), graphs)
    write_golden(target, image, inner_codes(target / MODEL))


# --- machines ---


def self_test(command: Command, folder: Path, packages: Sequence[Path] = ()) -> Outcome:
    """Runs the runtime's self-test with an interpreter.

    Args:
        command: The command that runs the interpreter.
        folder: The exported detector with golden vectors.
        packages: Folders to import from, in addition to this checkout.
    """
    # Variables of OpenBLAS choose kernels for this processor, which others cannot execute.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*packages, ROOT)))
    with tempfile.TemporaryDirectory() as cwd:  # for the core file of a crash
        done = run_program([*command, "-c", SELF_TEST, folder.resolve()], Path(cwd), environment)
    return read_self_test(done)


def read_self_test(done: subprocess.CompletedProcess[str]) -> Outcome:
    """Returns the checks that a self-test has printed."""
    from aqdet.runtime.golden import Check

    stdout = done.stdout
    about = next((line.removeprefix("on ") for line in stdout.splitlines() if line.startswith("on ")), "")
    found = re.findall(r"^(ok|FAILED) +(.+?): (.*)$", stdout, re.MULTILINE)
    checks = [Check(what, verdict == "ok", text) for verdict, what, text in found]
    finished = re.search(r"^\d+ of \d+ checks passed$", stdout, re.MULTILINE)
    if not finished or done.returncode != int(any(not check.passed for check in checks)):
        checks.append(Check("self-test", False, last_line(done)))
    return Outcome("", about, tuple(checks))


def here(folder: Path, all_layers: Path, cache: Path) -> Outcome:
    """This machine: the golden vectors of the export, where the folder has them, and its own again."""
    from machine import Machine

    from aqdet.runtime.golden import GOLDEN

    tested = [self_test([sys.executable], place) for place in (folder, all_layers) if (place / GOLDEN).is_file()]
    checks = tuple(check for outcome in tested for check in outcome.checks)
    return Outcome("", f"{Machine.here()}: {tested[-1].about}", checks)


def here_as(level: str, folder: Path) -> Outcome:
    """Runs the self-test on this x86-64 processor, with instructions newer than those of ``level`` hidden."""
    with tempfile.TemporaryDirectory() as temporary:
        library = older_cpu.build(level, Path(temporary))
        return self_test(["env", f"LD_PRELOAD={library}", sys.executable], folder)


def emulated_x86(processor: str, folder: Path) -> Outcome:
    """Runs the self-test on an x86-64 processor of QEMU's, with the Python of this machine."""
    if os.uname().machine != "x86_64":
        raise NotHere(f"the Python of this machine is {os.uname().machine}'s, and not x86-64's")
    qemu = program("qemu-x86_64-static", "qemu-x86_64", package="qemu-user-static")
    return self_test([qemu, "-cpu", processor, sys.executable], folder)


def emulated_arm(name: str, folder: Path, cache: Path) -> Outcome:
    """Runs the self-test on an aarch64 processor of QEMU's, with Debian's Python for it."""
    processor, features, part = ARM[name]
    qemu = program("qemu-aarch64-static", "qemu-aarch64", package="qemu-user-static")
    system = debian_system(cache)
    write_cpuinfo(system, features, part)
    python = next(path for path in sorted((system / "usr/bin").glob("python3.*")) if path.name[8:].isdigit())
    packages = runtime_packages(cache, python.name.removeprefix("python"))
    return self_test([qemu, "-cpu", processor, "-L", system, python], folder, [packages])


def javascript_packages(cache: Path, package: str) -> Path:
    """Returns the folder in whose ``node_modules`` a package of npm's is, and installs it there if it is missing."""
    place = cache / "javascript"
    if not (place / "node_modules" / package / "package.json").is_file():
        npm = program("npm", package="npm")
        place.mkdir(parents=True, exist_ok=True)
        # Its install script would download libraries for GPUs.
        fetch([npm, "install", "--ignore-scripts", "--no-fund", "--no-audit", package], f"npm install {package}", place)
    return place


def in_javascript(package: str, folder: Path, cache: Path) -> Outcome:
    """Compares the outputs of the graph, and the codes of all layers, with those of ONNX Runtime in Node.js."""
    import numpy as np

    from aqdet.runtime.folder import MODEL
    from aqdet.runtime.golden import GOLDEN, Check, compare_arrays

    node, place = program("node", package="nodejs"), javascript_packages(cache, package)
    about = json.loads((place / "node_modules" / package / "package.json").read_text(encoding="utf-8"))["version"]
    with np.load(folder / GOLDEN, allow_pickle=False) as file:
        golden = dict(file)
    checks = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        golden["input"].tofile(work / "input.bin")
        shape = [str(golden["input"].shape[axis]) for axis in (0, 2, 3)]
        (work / "codes_graph").mkdir()
        write_with_outputs(folder / MODEL, work / "codes_graph" / MODEL, inner_codes(folder / MODEL))
        for kind, graph, what in (("outputs", folder.resolve(), "output"), ("codes", work / "codes_graph", "codes of")):
            script, inputs, outputs = ROOT / "tools/onnxruntime_node.mjs", work / "input.bin", work / kind
            done = run_program([node, script, graph, *shape, inputs, outputs, package], place)
            if done.returncode:
                checks.append(Check(f"{package} on {kind}", False, last_line(done)))
                continue
            for name, expected in golden.items():
                if name.startswith(f"{kind}/"):
                    found = np.fromfile(work / f"{name}.bin", expected.dtype).reshape(expected.shape)
                    checks.append(compare_arrays(f"{what} {name.removeprefix(f'{kind}/')}", found, expected))
    return Outcome("", f"{package} {about}", tuple(checks))


def in_c(name: str, folder: Path) -> Outcome:
    """Compares the C program with the runtime on the golden vectors' image, at the size that the program is for."""
    import c_program
    import numpy as np

    from aqdet.runtime import Detector
    from aqdet.runtime.golden import GOLDEN, Check, compare_arrays
    from aqdet.runtime.preprocess import make_batch, resize

    (gcc, *flags), package, emulator = C[name]
    if not (folder / "detector.c").is_file():
        raise NotHere("the folder has no detector.c (export_model.py --c SIZE writes it)")
    compiler = program(gcc, package=package)
    before = [program(emulator, package="qemu-user-static")] if emulator else []
    header = (folder / "detector.h").read_text(encoding="utf-8")
    detector = Detector(folder, threads=1)
    with np.load(folder / GOLDEN, allow_pickle=False) as golden:
        image = resize(golden["image"], *c_program.image_size(header))
    batch, _ = make_batch([image], dataclasses.replace(detector.description, min_size=0))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            binary = c_program.build(folder, Path(temporary), compiler, *flags)
            found = c_program.predictions([*before, binary], header, batch)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            return Outcome("", gcc, (Check("detector.c", False, str(error)),))
    checks = [
        compare_arrays(f"output {output}", found[output], value)
        for level, values in zip(detector.description.levels, detector.run(batch), strict=True)
        for output, value in zip(level.outputs, values, strict=True)
    ]
    return Outcome("", f"{gcc} {' '.join(flags)}, {image.shape[0]}x{image.shape[1]} pixels", tuple(checks))


def write_with_outputs(model: Path, target: Path, names: Sequence[str]) -> None:
    """Writes a graph whose outputs are also these tensors."""
    import onnx

    graph = onnx.load(model)
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    onnx.save(graph, target)


# --- results ---


def counted(checks: Sequence[Check], prefix: str) -> str:
    """Returns the numbers of equal and of compared values in the checks whose name starts with a prefix."""
    equal = total = 0
    for check in checks:
        numbers = [int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", check.text)]
        if check.what.startswith(prefix) and check.passed:
            equal, total = equal + numbers[0], total + numbers[0]
        elif check.what.startswith(prefix) and "values differ" in check.text:
            equal, total = equal + numbers[1] - numbers[0], total + numbers[1]
    return f"{equal:,} of {total:,}" if total else "-"


def print_outcomes(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Prints a table, and below it the differences and the machines that were left out."""
    print(f"\n{folder}\n\n| machine | equal codes | equal outputs | detections | seconds |\n|---|---|---|---|---|")
    for outcome in outcomes:
        if not outcome.skipped:
            found = " / ".join(check.text for check in outcome.checks if check.what == "detections") or "-"
            cells = [counted(outcome.checks, kind) for kind in ("codes of ", "output ")]
            print(f"| {outcome.machine} | {cells[0]} | {cells[1]} | {found} | {outcome.seconds:.0f} |")
    print()
    for outcome in outcomes:
        if outcome.skipped:
            print(f"{outcome.machine}: skipped: {outcome.skipped}")
            continue
        print(f"{outcome.machine}: {outcome.about}")
        for check in outcome.checks:
            if not check.passed:
                print(f"{outcome.machine}: DIFFERS: {check.what}: {check.text}")


def run(name: str, folder: Path, all_layers: Path, cache: Path) -> Outcome:
    """Runs one machine on one folder."""
    from aqdet.runtime.golden import Check

    start = time.monotonic()
    runs: dict[str, Callable[[], Outcome]] = {"here": lambda: here(folder, all_layers, cache)}
    runs |= {key: functools.partial(here_as, HERE_AS[key], all_layers) for key in HERE_AS}
    runs |= {key: functools.partial(emulated_x86, X86[key], all_layers) for key in X86}
    runs |= {key: functools.partial(emulated_arm, key, all_layers, cache) for key in ARM}
    runs |= {key: functools.partial(in_c, key, folder) for key in C}
    runs |= {key: functools.partial(in_javascript, JAVASCRIPT[key], all_layers, cache) for key in JAVASCRIPT}
    try:
        outcome = runs[name]()
    except NotHere as reason:
        return Outcome(name, skipped=str(reason))
    except subprocess.TimeoutExpired:
        outcome = Outcome(name, checks=(Check("self-test", False, f"no end after {SECONDS_LIMIT} s"),))
    return dataclasses.replace(outcome, machine=name, seconds=time.monotonic() - start)


def main() -> None:
    args = parse_args()
    differs = False
    try:
        from aqdet.runtime.image import read_image

        image = read_image(args.image) if args.image else None
        for folder in map(Path, args.folders):
            with tempfile.TemporaryDirectory() as temporary:
                all_layers = Path(temporary) / "all_layers"
                write_all_layers(folder, all_layers, image)
                outcomes = []
                for name in args.machine or MACHINES:
                    print(f"{folder} on {name}", file=sys.stderr, flush=True)
                    outcomes.append(run(name, folder, all_layers, args.cache))
            print_outcomes(folder, outcomes)
            differs |= any(outcome.differs for outcome in outcomes)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)
    if differs:
        sys.exit(DIFFERS)


if __name__ == "__main__":
    run_console(main)
