"""Runs a function on several gloo ranks and brings their results back.

The ranks are forked from one process that has imported Megatron already, which takes every rank seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

PRELOAD = ["megatron_ztrl.trainer.actor", "megatron_ztrl.trainer.critic"]
LIMIT_SECONDS = 540
"""A rank that fails inside a collective can leave its peers waiting."""


def launch(
    function: Callable[..., Any], world_size: int, *args: Any, limit_seconds: float = LIMIT_SECONDS
) -> list[Any]:
    """Calls ``function(rank, scratch, *args)`` in fresh processes; ``scratch`` is a directory of this launch.

    Args:
        function: Importable from a module, so that the new processes can find it.
        world_size: Ranks.
        *args: Passed on.
        limit_seconds: After which the ranks are killed.

    Returns:
        What each rank returned. The first error of a rank is raised here, and ends the others.
    """
    start_method = "spawn" if torch.cuda.is_available() else "forkserver"  # CUDA does not survive a fork
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.start_processes(
            _run, args=(function, directory, args), nprocs=world_size, join=False, start_method=start_method
        )
        deadline = time.monotonic() + limit_seconds
        while not context.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=5.0):
            if time.monotonic() >= deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"the ranks took more than {limit_seconds} seconds")
        return [torch.load(_result_path(directory, rank), weights_only=False) for rank in range(world_size)]


def _run(rank: int, function: Callable[..., Any], directory: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(function(rank, Path(directory), *args), _result_path(directory, rank))


def _result_path(directory: str, rank: int) -> Path:
    return Path(directory) / f"rank{rank}.pt"
