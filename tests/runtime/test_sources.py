"""What inputs mean, and where their pictures are written."""

import os

import pytest

from aqdet.runtime.sources import find_sources, output_paths


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with empty files of several kinds; names are relative to its parent."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.JPG", "grey.bmp", "moving.gif", "film.avi", "notes.txt", "deep er/ü.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def targets(*given, output=None):
    return [str(source.target) for source in find_sources([str(name) for name in given], output)[0]]


def test_sources_are_found_once(inputs):
    expected = ["a.JPG", "deep er/ü.png", "film.mp4", "grey.bmp", "moving.png"]
    assert targets("in") == expected and find_sources(["in"])[1] == 1
    assert targets("in", "in/*.JPG", "in/a.JPG", inputs / "in" / "a.JPG") == expected
    assert targets("in/*.??p") == ["grey.bmp"]
    assert [source.kind for source in find_sources(["in/film.avi", "in/a.JPG"])[0]] == ["video", "image"]


@pytest.mark.parametrize(
    "text, kind, target",
    [
        ("0", "stream", "camera_0.mp4"),
        ("rtsp://user:secret@10.0.0.7:554/live/main", "stream", "10.0.0.7_main.mp4"),
        ("https://example.org/films/a%20b.mp4?x=1", "video", "example.org_a_20b.mp4"),
        ("udp://@:1234", "stream", "stream.mp4"),
    ],
)
def test_cameras_and_streams(inputs, text, kind, target):
    ((source,), others) = find_sources([text])
    assert (source.name, source.kind, str(source.target), others) == (text, kind, target, 0)


def test_a_file_named_as_a_number_is_no_camera(inputs):
    (inputs / "0").touch()
    assert find_sources(["0"])[0][0].kind == "image"


def test_patterns_reach_into_folders(inputs):
    assert targets("in/**/*.png") == ["ü.png"]
    assert targets("in/**/*.*p*") == ["ü.png", "grey.bmp"]


def test_files_of_systems_and_links_to_nothing_are_counted(inputs):
    for name in ("._a.JPG", ".cache/b.jpg", "__MACOSX/c.jpg", "Thumbs.db"):
        (inputs / "in" / name).parent.mkdir(exist_ok=True)
        (inputs / "in" / name).touch()
    (inputs / "in" / "gone.jpg").symlink_to(inputs / "none.jpg")
    assert len(targets("in")) == 5 and find_sources(["in"])[1] == 6


def test_inputs_of_one_name_are_only_refused_where_pictures_are_written(inputs):
    (inputs / "twin").mkdir()
    (inputs / "twin" / "a.JPG").touch()
    assert targets("in/a.JPG", "twin/a.JPG") == ["a.JPG", "a.JPG"]


def test_pictures_of_an_earlier_run_are_not_read(inputs):
    written = inputs / "in" / "found"
    written.mkdir()
    (written / "a.JPG").touch()
    assert len(targets("in")) == 6
    assert len(targets("in", output="in/found")) == 5
    assert len(targets("in", output=".")) == 6  # the output may lie above
    assert len(targets("in/found", output="in")) == 1


@pytest.mark.parametrize(
    "given, output, expected",
    [
        (["in/a.JPG"], "one.png", ["one.png"]),
        (["in/a.JPG"], "new", ["new/a.JPG"]),
        (["in/a.JPG"], "run.2", ["run.2/a.JPG"]),
        (["in/a.JPG"], "one.png/", ["one.png/a.JPG"]),
        (["in/film.avi"], "out.mp4", ["out.mp4"]),
        (["0"], "out.mp4", ["out.mp4"]),
        (["in"], "o", ["o/a.JPG", "o/deep er/ü.png", "o/film.mp4", "o/grey.bmp", "o/moving.png"]),
    ],
)
def test_output_paths(inputs, given, output, expected):
    assert [str(path) for path in output_paths(find_sources(given)[0], output)] == expected


@pytest.mark.parametrize(
    "given, output, words",
    [
        (["none.jpg"], None, "input 'none.jpg': no such file or folder, and no match as a pattern"),
        (["empty"], None, "no image or video in empty"),
        (["in/a.JPG", "twin/a.JPG"], "o", "'in/a.JPG' and 'twin/a.JPG' would both be written to 'a.JPG'"),
        (["in/a.JPG"], "o.pdf", "--output 'o.pdf': pictures are written as .bmp, .jpeg"),
        (["in"], "o.pdf", "--output 'o.pdf': pictures are written as"),
        (["in"], "o.png", "--output 'o.png' is one file, for 5 inputs"),
        (["in/a.JPG"], "o.mp4", "in/a.JPG is an image"),
        (["in/film.avi"], "o.png", "in/film.avi is a video"),
        (["rtsp://10.0.0.7/live"], "o.png", "is a stream"),
        (["in/a.JPG"], "in/a.JPG", "would replace the input 'in/a.JPG'"),
        (["in/a.JPG"], "link.jpg", "would replace the input 'link.jpg'"),
        (["in"], "in", "would replace the input 'in/a.JPG'"),
    ],
)
def test_refusals(inputs, given, output, words):
    (inputs / "empty").mkdir()
    (inputs / "twin").mkdir()
    (inputs / "twin" / "a.JPG").touch()
    os.link("in/a.JPG", "link.jpg")
    with pytest.raises(ValueError) as error:
        output_paths(find_sources(given, output)[0], output)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in").mkdir()
    for path in (tmp_path / "elsewhere" / "a.png", tmp_path / "in" / "b.png"):
        path.write_bytes(b"")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "around").symlink_to(tmp_path / "in")
    sources, others = find_sources([str(tmp_path / "in")])
    assert sorted(str(source.target) for source in sources) == ["b.png", "linked/a.png"] and others == 0
    # A folder beside a link to it keeps its name, and what was written before is no input.
    (tmp_path / "in" / "run").mkdir()
    (tmp_path / "in" / "run" / "c.png").write_bytes(b"")
    (tmp_path / "in" / "latest").symlink_to(tmp_path / "in" / "run")
    sources, _ = find_sources([str(tmp_path / "in")], str(tmp_path / "elsewhere"))
    assert sorted(str(source.target) for source in sources) == ["b.png", "run/c.png"]
