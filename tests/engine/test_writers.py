"""Scalars in strict JSON, written line by line, or not at all where there is no room."""

import errno
import io
import json
import logging
import math
import os

import pytest
from detectron2.utils.events import EventStorage

from aqdet.engine.run_log import RunLog
from aqdet.engine.writers import MetricsWriter, TensorboardWriter


def write(writer, iteration, **scalars):
    with EventStorage(iteration) as storage:
        storage.put_scalars(**scalars, smoothing_hint=False)
        writer.write()


def test_values_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(str(path))
    assert not path.exists()
    write(writer, 3, ap=math.nan, loss=math.inf, lr=0.5)
    write(writer, 7, loss=1.0)
    writer.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == [{"ap": None, "iteration": 3, "loss": None, "lr": 0.5}, {"iteration": 7, "loss": 1.0}]


def test_a_resume_cuts_back_and_goes_on(tmp_path):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(str(path))
    assert writer.state_dict() == {"bytes": 0, "last_write": -1}
    write(writer, 1, loss=1.0)
    state = writer.state_dict()
    write(writer, 2, loss=2.0)
    writer.close()
    second = MetricsWriter(str(path))
    second.load_state_dict(state)
    write(second, 1, loss=9.0)  # known
    write(second, 2, loss=3.0)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 3.0]


class Full(io.FileIO):
    """A file on a disk with room for ten bytes more."""

    def write(self, content):
        if self.tell() >= 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content[:10])


def test_a_full_disk_leaves_whole_lines_and_is_named(tmp_path):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(str(path))
    write(writer, 1, loss=1.0)
    before = path.read_text()
    writer.close()
    writer._file = Full(path, "ab")
    with pytest.raises(OSError, match=r"No space left on device \(.* are free\): .*metrics.json"):
        write(writer, 2, loss=2.0, other=3.0)
    writer.close()
    assert path.read_text() == before
    write(writer, 2, loss=2.0, other=3.0)  # once there is room
    assert len(path.read_text().splitlines()) == 2


def test_tensorboard_has_a_file_from_the_first_value_on(tmp_path):
    writer = TensorboardWriter(str(tmp_path))
    writer.close()
    assert not os.listdir(tmp_path)
    write(writer, 1, loss=1.0)
    writer.close()
    assert len(os.listdir(tmp_path)) == 1


def test_the_log_appears_with_its_folder_and_has_what_was_said_before(tmp_path):
    logger = logging.getLogger("aqdet.test")
    level = logging.getLogger("aqdet").level
    logging.getLogger("aqdet").setLevel(logging.INFO)
    value = ["early"]
    with RunLog() as log:
        logger.info("%s", value)
        value[0] = "changed"
        log.write_to(str(tmp_path / "out"))
        logger.warning("late")
    logger.warning("after the run")
    logging.getLogger("aqdet").setLevel(level)
    lines = (tmp_path / "out" / "log.txt").read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["aqdet.test INFO: ['early']", "aqdet.test WARNING: late"]
    with RunLog():
        logger.warning("refused")
    assert os.listdir(tmp_path) == ["out"]
