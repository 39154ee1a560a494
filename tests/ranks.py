"""Ranks of torch.distributed on a CPU, each in a process of its own."""

import os
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

RANKS = 2


def run_ranks(
    context: BaseContext, target: Callable[..., None], *arguments: Any, seconds: float = 300
) -> None:
    """Run ``target(rank, *arguments)`` in every rank; fail with the first that fails, for which the
    others would wait.
    """
    ranks = [context.Process(target=target, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    end = time.monotonic() + seconds
    while (alive := [p.sentinel for p in ranks if p.is_alive()]) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):
            break
        wait(alive, end - time.monotonic())
    for process in ranks:
        process.kill()
        process.join()
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * RANKS, f"the ranks must exit with 0, got {codes}"


def join_zero3(rank: int, store: Path) -> None:
    """Make this process a rank for DeepSpeed."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
        "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    import deepspeed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
