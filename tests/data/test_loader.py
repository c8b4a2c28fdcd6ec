"""Training batches as a function of seed and iteration."""

import itertools
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from tiny_data import train_cfg, write_dataset

from aqdet.data import loader
from aqdet.data.loader import PlacedBatches, build_train_loader, seed_generators, seeded


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_generators_follow_the_key():
    seed_generators(3, 1)
    first = draws()
    assert draws() != first
    seed_generators(3, 1)
    assert draws() == first
    seed_generators(3, 2)
    assert not set(draws()) & set(first)


def test_seeded_gives_the_generators_back_even_after_an_error():
    seed_generators(0)
    expected = draws()
    seed_generators(0)
    with pytest.raises(KeyError), seeded(5):
        inside = draws()
        raise KeyError
    assert draws() == expected
    with seeded(5):
        assert draws() == inside


def take(batches, number):
    return list(itertools.islice(iter(batches), number))


def test_batches_of_one_group_and_their_shares():
    # Images 0, 2, 4 are wide. Worked out by hand for the order 0 1 2 3 4 0 1 2 3 4 ...
    group_of = bytes([1, 0, 1, 0, 1])

    def batches(**kwargs):
        return PlacedBatches(itertools.cycle(range(5)), 2, group_of=group_of, **kwargs)

    whole = [[(0, 0), (2, 2)], [(1, 1), (3, 3)], [(4, 4), (0, 5)], [(2, 7), (4, 9)], [(1, 6), (3, 8)]]
    # The third: 4 at place 4 and 0 at place 5. Then 1 waits at place 6, 2 at 7, 3 at 8 fills the other group.
    assert sorted(take(batches(), 5)) == sorted(whole)
    assert take(batches(), 5)[3] == [(1, 6), (3, 8)]
    assert take(batches(start=3), 2) == take(batches(), 5)[3:]
    shares = [take(batches(rank=rank, world_size=2), 5) for rank in range(2)]
    assert [[*a, *b] for a, b in zip(*shares, strict=True)] == take(batches(), 5)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), "tiny_stream", num_images=5)


def loader_of(entry, output, *overrides):
    random_size = ("INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)", "INPUT.CROP.ENABLED", "True")
    return build_train_loader(train_cfg(entry, output, *random_size, *overrides))


def images(loader, number):
    return [(x["file_name"], x["image"], x["instances"].gt_boxes.tensor) for b in take(loader, number) for x in b]


def equal(one, other):
    return all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def test_a_loader_starts_anywhere_with_any_number_of_workers(entry, tmp_path):
    whole = images(loader_of(entry, tmp_path), 6)
    for workers, start in (("0", 2), ("2", 3)):
        loader = loader_of(entry, tmp_path, "DATALOADER.NUM_WORKERS", workers)
        loader.start = start
        assert equal(images(loader, 6 - start), whole[2 * start :])
    assert len({image.shape for _, image, _ in whole}) > 2  # the augmentation is random
    assert {name for name, *_ in whole[:5]} == {name for name, *_ in whole}  # each image once before any twice


def test_seeds_differ_and_a_resume_sets_its_own(entry, tmp_path):
    first = images(loader_of(entry, tmp_path), 3)
    loader = loader_of(entry, tmp_path, "SEED", "2")
    assert not equal(images(loader, 3), first)
    loader.seed = 1
    assert equal(images(loader, 3), first)


def test_loading_leaves_the_random_states_of_training_alone(entry, tmp_path):
    loader = loader_of(entry, tmp_path)
    batches = iter(loader)
    seed_generators(0)
    expected = draws()
    seed_generators(0)
    next(batches)
    assert draws() == expected


def test_the_repeating_sampler_is_a_function_of_the_seed_too(entry, tmp_path):
    sampler = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", "4.0")
    one, other, different = (images(loader_of(entry, tmp_path, *sampler, "SEED", seed), 5) for seed in ("4", "4", "5"))
    assert equal(one, other) and not equal(one, different)
    names = [name for name, *_ in one]  # an epoch: sqrt(4 / 1) = 2, every image twice
    assert sorted(names) == sorted([*set(names)] * 2) and len(set(names)) == 5


def test_processes_share_the_batch_evenly_or_not_at_all(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    assert loader.comm is comm
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH must be a positive multiple of 3 processes, got 2"):
        loader_of(entry, tmp_path)


ORPHANS = """
import os, signal, torch
from aqdet.data.loader import start_worker

class Blocks(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return bytes(1 << 20)  # more than a pipe holds, so that a worker waits until it is taken

loader = torch.utils.data.DataLoader(Blocks(), batch_size=None, num_workers=2, worker_init_fn=start_worker)
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_training_process_is_killed():
    # The workers have the same stdout: this returns when they are gone.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ORPHANS], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 2


AT_EXIT = """
import torch
from aqdet.data.loader import start_worker

loader = torch.utils.data.DataLoader(range(100), batch_size=None, num_workers=2, worker_init_fn=start_worker)
batches = iter(loader)  # still referenced when the interpreter exits
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
"""


@pytest.mark.parametrize("last_line", ["", "raise SystemExit(3)"])
def test_a_script_whose_loader_still_exists_ends(last_line):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AT_EXIT + last_line], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (3 if "SystemExit" in last_line else 0), done.stderr
    assert len(done.stdout.split()) == 2


GROUP = """
import os, signal, sys, time, torch
from aqdet.data.loader import start_worker

os.setpgid(0, 0)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
loader = torch.utils.data.DataLoader(range(100), batch_size=None, num_workers=2, worker_init_fn=start_worker)
batches = iter(loader)
taken = [next(batches)]
workers = [worker.pid for worker in batches._workers]
sender = os.fork()
if not sender:  # another process, as a shell or a batch system
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(os.getpgid(0), number)
    os._exit(0)
os.waitpid(sender, 0)
time.sleep(1.5)
taken += batches
print(len(taken), workers == [worker.pid for worker in batches._workers])
"""


def test_workers_go_on_when_the_process_group_gets_a_signal():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", GROUP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["100", "True"]
