"""Files are written whole or not at all, JSON is strict."""

import errno
import json
import math
import os
import subprocess
import sys
import types

import pytest
from helpers import ROOT

from aqdet.utils import files


def test_the_target_is_replaced_at_the_end(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with files.open_replacing(target) as file:
        file.write("é")
        assert not target.exists()
    assert target.read_bytes() == "é".encode()
    with files.open_replacing(target, "wb", durable=True) as file:
        file.write(b"\0")
    assert target.read_bytes() == b"\0" and os.listdir(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_the_target_and_nothing_beside_it(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)), files.open_replacing(target) as file:
        file.write("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_the_file_beside_the_target_keeps_the_ending_where_it_names_the_format(tmp_path):
    with files.replacing(tmp_path / "a.b.png", keep_ending=True) as aside:
        assert aside == tmp_path / "a.b.part.png"
        aside.write_bytes(b"1")
    with files.replacing(tmp_path / "a.json") as aside:
        assert aside.name == "a.json.part"
        aside.write_bytes(b"1")
    with files.replacing(tmp_path / "a.json", shared=True) as aside:
        assert aside.name == f"a.json.{os.getpid()}.part"
        aside.write_bytes(b"2")
    assert sorted(os.listdir(tmp_path)) == ["a.b.png", "a.json"] and (tmp_path / "a.json").read_bytes() == b"2"


def test_a_full_disk_names_the_target_and_the_free_room(tmp_path):
    target = tmp_path / "a.txt"
    with pytest.raises(OSError) as caught, files.open_replacing(target) as file:
        file.write("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(target)
    assert "No space left on device (" in str(caught.value) and "MB are free)" in str(caught.value)
    assert not os.listdir(tmp_path)
    needed = files.named(OSError(errno.ENOSPC, "full"), target, 250_000_000)
    assert needed.strerror.startswith("full (about 250 MB are needed, ")


def test_a_folder_in_place_of_the_file_is_said_to_be_one(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError, match="Is a directory.*a.txt'"):
        files.write_text(tmp_path / "a.txt", "x")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        files.write_text("/dev/null/out/a.txt", "x")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_is_strict(tmp_path):
    value = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, 2)], "c": {"d": None, "e": True}, "f": "NaN"}
    expected = {"a": None, "b": [None, 1.5, [None, 2]], "c": {"d": None, "e": True}, "f": "NaN"}
    assert json.loads(files.to_json(value)) == expected
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n") and json.loads(text, parse_constant=pytest.fail) == expected


def test_json_of_mappings_that_are_no_dict():
    assert files.to_json(types.MappingProxyType({"a": (1, math.inf)})) == '{"a": [1, null]}'


def test_endings_of_images():
    assert files.is_image("a/B.JPG") and files.is_image("x.tiff") and not files.is_image("x.txt")
    assert all(ending == ending.lower() and ending[0] == "." for ending in files.IMAGE_ENDINGS)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_nothing_but_the_standard_library_is_imported():
    code = "import sys; before = set(sys.modules); import files; new = set(sys.modules) - before - {'files'}; "
    code += "print(*(name for name in new if name.partition('.')[0] not in sys.stdlib_module_names))"
    folder = ROOT / "aqdet" / "utils"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_json_of_before_is_read(tmp_path):
    assert files.from_json('{"a": NaN, "b": [Infinity, -Infinity, 1.5]}') == {"a": None, "b": [None, None, 1.5]}
    with pytest.raises(ValueError):
        files.from_json('{"a": nan}')


def test_outputs_that_would_replace_an_input_or_each_other_are_refused(tmp_path):
    read = tmp_path / "read.json"
    read.write_text("{}")
    (tmp_path / "link.json").symlink_to(read)
    files.refuse_replacing([("--json", tmp_path / "new.json"), ("--csv", None), ("--output", "")], [read, None, ""])
    for path in (read, tmp_path / "link.json", tmp_path / "a" / ".." / "read.json"):
        with pytest.raises(ValueError, match="^--json .* would replace a file that is read: name another one$"):
            files.refuse_replacing([("--json", path)], [read])
    with pytest.raises(ValueError, match="^--json and --csv are both x: name two files$"):
        files.refuse_replacing([("--json", "x"), ("--csv", "x")])
