"""Every program has a row in tools/README.md, and its example names files and options that exist."""

import re
import shlex

import pytest
from helpers import ROOT

TOOLS = ROOT / "tools"
ROWS = {
    match[1]: (match[2].strip(), match[3])
    for match in re.finditer(r"^\| `([\w./]+)` \| (.+) \| `(.+)` \|$", (TOOLS / "README.md").read_text("utf-8"), re.M)
}


def programs():
    """The programs by their path below tools/: scripts, and Python files that run something."""
    for path in TOOLS.rglob("*"):
        if path.suffix in (".sh", ".mjs", ".cpp") or (
            path.suffix == ".py" and 'if __name__ == "__main__"' in path.read_text("utf-8")
        ):
            yield path.relative_to(TOOLS).as_posix()


def test_every_program_has_a_row_and_every_row_a_program():
    assert sorted(ROWS) == sorted(programs())
    assert all(text and text[0].islower() for text, _ in ROWS.values())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_example_is_of_the_program(name):
    words = shlex.split(ROWS[name][1])
    shared = (ROOT / "aqdet" / "utils" / "arguments.py").read_text("utf-8")
    source = (TOOLS / name).read_text("utf-8") + shared
    first = {".sh": "bash", ".mjs": "node", ".py": "python", ".cpp": "g++"}[(TOOLS / name).suffix]
    assert words[0] == first and f"tools/{name}" == next(word for word in words[1:] if not word.startswith("-"))
    for word in words[2:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
        if word.startswith("--") and name != "benchmark.py":  # whose parts parse elsewhere, too
            assert f'"{word}"' in source


def test_what_is_no_program_is_named_as_such():
    others = {path.name for path in TOOLS.glob("*.py")} - set(ROWS)
    sentence = (TOOLS / "README.md").read_text("utf-8").partition("\n\n`jobs.py`")[2].partition("are imported")[0]
    assert {"jobs.py", *re.findall(r"`([\w.]+)`", sentence)} == others
