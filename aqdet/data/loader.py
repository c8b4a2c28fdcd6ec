"""Training batches that depend on the seed and the iteration alone.

Detectron2's loader keeps its position in worker processes, in buckets of images that wait for others of their
aspect ratio, and in random states that advance from image to image; none of these can be saved in a checkpoint. This
loader has no state: the order is drawn from the seed, and every image is augmented with random numbers that belong to
its place in the order. So the same images come in the same iterations with any number of workers, with any number of
processes that share the batch, and after a resume.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .mask_check import check_masks

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0


def seed_generators(*key: int) -> None:
    """Seeds the generators of Python, numpy and torch, CUDA's included, by ``key`` alone.

    Args:
        key: non-negative integers; different keys give unrelated states.
    """
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the generators, but CUDA's, within a block by :func:`seed_generators`, and restores them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    try:
        random.seed(words[0])
        np.random.seed(words[1])
        torch.default_generator.manual_seed(words[2])
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _SeededDataset(Dataset):
    """A map-style dataset that is read by places, ``(index, position)``, each with random numbers of its own."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        index, position = place
        with seeded(self._seed, position):
            return self._dataset[index]


class PlacedBatches(Sampler):
    """Endless batches of places ``(index, position)``: one process's share of each.

    The whole batch is formed first and then dealt out, so that an iteration has the same images with any number of
    processes. Detectron2's processes form their own batches instead; the deviation is that with aspect ratio grouping
    the whole batch has one orientation, and not only each process's part.

    Args:
        indices: the endless order of images.
        batch_size: size of the whole batch.
        group_of: image index -> group; images of different groups do not share a batch.
        start: number of batches to pass over.
        rank, world_size: number of this process and of all processes.
    """

    def __init__(
        self,
        indices: Iterator[int],
        batch_size: int,
        *,
        group_of: Sequence[int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._indices = indices
        self._batch_size = batch_size
        self._group_of = group_of
        self._start = start
        self._share = slice(rank, None, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(self._whole_batches(), self._start, None):
            yield batch[self._share]

    def _whole_batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        for position, index in enumerate(self._indices):
            group = 0 if self._group_of is None else self._group_of[index]
            batch = waiting.setdefault(group, [])
            batch.append((index, position))
            if len(batch) == self._batch_size:
                yield waiting.pop(group)


class TrainLoader:
    """Endless training batches from a seed, from any iteration on.

    An iterator starts nothing before its first batch is asked for; until then a resume may set ``seed`` and ``start``.

    Args:
        dataset: map-style dataset, which loads and augments.
        order: seed -> the endless order of image indices, the same in all processes.
        batch_size: number of images of all processes together.
        group_of: see :class:`PlacedBatches`.
        num_workers: number of processes that load.
        seed: seed of the order and of the augmentation.

    Attributes:
        start: iteration whose batch comes first.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        order: Callable[[int], Iterator[int]],
        batch_size: int,
        group_of: Sequence[int] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.start = 0
        self._order = order
        self._group_of = group_of

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        batches = PlacedBatches(
            self._order(self.seed),
            self.batch_size,
            group_of=self._group_of,
            start=self.start,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )
        yield from DataLoader(
            _SeededDataset(self.dataset, self.seed),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # for seeds that nothing uses; the default one would change the main state
        )


def start_worker(worker: int) -> None:
    """Prepares a worker process of a data loader, as its ``worker_init_fn``.

    Only the training process answers a signal to the process group, as Ctrl-C sends it, and goes on loading until its
    iteration ends. Therefore the worker ignores SIGINT, and SIGTERM unless the training process itself has sent it:
    :mod:`multiprocessing` ends the workers of a loader in this way if it still exists when the interpreter exits, and
    then waits for them without a limit. A worker also ends by itself when the training process was killed. PyTorch's
    own watch does not cover this case: a worker whose batches nobody takes waits forever to hand over the last ones,
    and keeps memory and open files.

    Args:
        worker: The worker's number, which is not used.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        # Blocked in all threads, the signal waits until the thread below asks for it and for its sender.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when the parent process asks for it or is gone."""
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):  # on macOS PyTorch's handler stays, and any SIGTERM ends a worker
            time.sleep(_WATCH_SECONDS)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_SECONDS)
        if received is not None and received.si_pid == parent:
            os._exit(0)
    os._exit(1)


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict[str, Any]], Any] | None = None) -> TrainLoader:
    """Returns the loader of a config: Detectron2's dataset and sampler, read by :class:`TrainLoader`.

    Without a ``SEED`` in the config a seed is drawn, the same in all processes.

    Args:
        cfg: the config.
        mapper: record -> input of the model; None for the mapper of the config.

    Raises:
        ValueError: naming ``SOLVER.IMS_PER_BATCH``, if the processes cannot share the batch evenly; also as
            :func:`~aqdet.data.mask_check.check_masks` does.
    """
    world_size = comm.get_world_size()
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of {world_size} processes, got {batch_size}"
        )
    arguments = build_detection_train_loader.from_config(cfg, mapper=mapper)
    check_masks(cfg, arguments["dataset"])
    mapper = arguments["mapper"]
    group_of = None
    if arguments["aspect_ratio_grouping"]:
        group_of = bytes(record["width"] > record["height"] for record in arguments["dataset"])
    records = DatasetFromList(arguments["dataset"], copy=False)  # as bytes: the list can be freed

    def order(seed: int) -> Iterator[int]:
        # Newer samplers take their seed from the config, 0.6's from numpy.
        seeded_cfg = cfg.clone()
        seeded_cfg.defrost()
        seeded_cfg.SEED = seed
        with seeded(seed):
            sampler = build_detection_train_loader.from_config(seeded_cfg, mapper, dataset=records)["sampler"]
        return sampler._infinite_indices()  # before it is dealt out to processes

    return TrainLoader(
        MapDataset(records, mapper),
        order=order,
        batch_size=batch_size,
        group_of=group_of,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )


class OtherLoader:
    """Any iterable of training batches in the place of a :class:`TrainLoader`, such as Detectron2's own loader.

    Its order does not depend on the seed, so that a resumed training goes on with other images.

    Args:
        batches: the iterable.
        seed: seed of all random numbers but the loader's.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self.batches = batches
        self.seed = seed
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def as_train_loader(loader: Iterable[Any], cfg: CfgNode) -> TrainLoader | OtherLoader:
    """Returns a loader of ours as it is, and any other in an :class:`OtherLoader`, with a warning."""
    if isinstance(loader, TrainLoader | OtherLoader):
        return loader
    logger.warning(
        "build_train_loader gives a %s: its order is not a function of the iteration, and a resumed run does not go on "
        "where it stopped; aqdet.data.loader.build_train_loader(cfg, mapper) does, with any mapper",
        type(loader).__name__,
    )
    return OtherLoader(loader, cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed())
