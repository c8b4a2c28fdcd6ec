"""The start of processes, and their settings before anything is built."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable

import detectron2.engine
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls ``main(args)`` in this process, in one process for each of ``--num-gpus``, or in each of torchrun's.

    Under torchrun ``main`` calls :func:`join_process_group` when it knows the device.

    Raises:
        ValueError: If ``--num-gpus`` asks for more GPUs than there are, or one of the numbers is out of range.
    """
    if args.num_gpus < 0 or not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--num-gpus must not be negative, and --machine-rank be from 0 to below --num-machines, got "
            f"{args.num_gpus}, {args.machine_rank} and {args.num_machines}"
        )
    if dist.is_torchelastic_launched():
        if args.num_gpus * args.num_machines > 1:
            raise ValueError("--num-gpus and --num-machines are Detectron2's: under torchrun give --nproc_per_node")
        main(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if args.num_gpus * args.num_machines > 1 and torch.cuda.device_count() < args.num_gpus:
        raise ValueError(
            f"--num-gpus {args.num_gpus}, but there are {torch.cuda.device_count()} CUDA devices (on CPUs: torchrun "
            f"--nproc_per_node {args.num_gpus} {sys.argv[0]} ...)"
        )
    detectron2.engine.launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def join_process_group(device: str) -> None:
    """Joins the processes of torchrun by NCCL on GPUs and by gloo on CPUs; without torchrun it only checks the device.

    torchrun's store outlives a restart, and still has the addresses of the earlier processes. Therefore each attempt on
    one node gets its own keys. Several nodes may count attempts differently: for restarts there, set
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun, which then makes a new store each time.

    Args:
        device: ``MODEL.DEVICE``.

    Raises:
        ValueError: If there are fewer GPUs than processes, or the device is one GPU for all processes.
    """
    under_torchrun = dist.is_torchelastic_launched()
    size = int(os.environ["WORLD_SIZE"]) if under_torchrun else comm.get_world_size()
    if size > 1 and torch.device(device).index is not None:
        raise ValueError(f"MODEL.DEVICE {device} would put {size} processes on one GPU: cuda gives each its own")
    if not under_torchrun or dist.is_initialized():
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "nccl"
        local_size, num_devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if local_size > num_devices:
            raise ValueError(
                f"torchrun --nproc_per_node {local_size}, but there are {num_devices} CUDA devices "
                "(MODEL.DEVICE cpu trains on CPUs)"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(dist.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)
    comm.synchronize()


def rank_of_this_process() -> int:
    """Returns the process's rank in the run; under torchrun it is known before :func:`join_process_group`, too."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else comm.get_rank()


def is_restart() -> bool:
    """Returns whether torchrun started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def continuing_command() -> str:
    """Returns the command line that continues this run."""
    start = ["python"]
    if dist.is_torchelastic_launched():
        start = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
            start += ["--nnodes", os.environ["GROUP_WORLD_SIZE"]]
    return shlex.join([*start, sys.argv[0], "--resume", *(word for word in sys.argv[1:] if word != "--resume")])


def make_deterministic(cfg: CfgNode) -> None:
    """Applies ``SOLVER.DETERMINISTIC`` to torch; call it before the first use of a GPU.

    Raises:
        ValueError: If the key is on and there is no seed.
    """
    if not cfg.SOLVER.DETERMINISTIC:
        return
    if cfg.SEED < 0:
        raise ValueError(f"SOLVER.DETERMINISTIC needs a SEED of 0 or more, got {cfg.SEED}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without this variable
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
