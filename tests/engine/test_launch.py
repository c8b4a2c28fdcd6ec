"""What torchrun's environment means."""

import argparse
import sys

import pytest
import torch.distributed as dist

from aqdet.engine.launch import continuing_command, is_restart, join_process_group, launch


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of the second of four processes on the first of two nodes."""
    values = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": "4"}
    values |= {"LOCAL_RANK": "1", "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "8"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def arguments(**values):
    return argparse.Namespace(**{"num_gpus": 1, "num_machines": 1, "machine_rank": 0, **values})


def test_the_command_that_continues(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py", "--resume", "--config-file", "a b.yaml", "SEED", "1"])
    assert continuing_command() == "python tools/train_net.py --resume --config-file 'a b.yaml' SEED 1"


def test_the_command_that_continues_several_processes(torchrun):
    torchrun.setattr(sys, "argv", ["tools/train_net.py", "--config-file", "a.yaml"])
    expected = "torchrun --nproc_per_node 4 --nnodes 2 tools/train_net.py --resume --config-file a.yaml"
    assert continuing_command() == expected


def test_a_restart_is_known_by_its_count(torchrun):
    assert not is_restart()
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart()
    torchrun.delenv("TORCHELASTIC_RESTART_COUNT")
    assert not is_restart()


def test_torchrun_starts_the_processes_and_nothing_else_does(torchrun):
    called = []
    launch(called.append, arguments())
    assert len(called) == 1
    with pytest.raises(ValueError, match="under torchrun give --nproc_per_node"):
        launch(called.append, arguments(num_gpus=2))


def test_more_processes_than_gpus(torchrun):
    torchrun.setattr("torch.cuda.device_count", lambda: 1)
    words = r"torchrun --nproc_per_node 4, but there are 1 CUDA devices \(MODEL.DEVICE cpu trains on CPUs\)"
    with pytest.raises(ValueError, match=words):
        join_process_group("cuda")


def test_one_gpu_for_all_processes(torchrun):
    words = "MODEL.DEVICE cuda:1 would put 8 processes on one GPU: cuda gives each its own"
    with pytest.raises(ValueError, match=words):
        join_process_group("cuda:1")
    torchrun.delenv("TORCHELASTIC_RUN_ID")
    join_process_group("cuda:1")
    torchrun.setattr("detectron2.utils.comm.get_world_size", lambda: 8)
    with pytest.raises(ValueError, match=words):
        join_process_group("cuda:1")


def test_without_torchrun_there_is_no_group_to_join():
    join_process_group("cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize("values", [{"num_gpus": -1}, {"num_machines": 0}, {"num_machines": 2, "machine_rank": 2}])
def test_numbers_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="^--num-gpus must not be negative, and --machine-rank be from 0 to below"):
        launch(lambda args: pytest.fail("it is called"), arguments(**values))
