"""Two GPUs that share every sequence compute what one does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from small_policy import actor_rank, batch, trained, with_targets

from megatron_ztrl.trainer.context import ContextPart

pytestmark = pytest.mark.gpu

SIZE = 2


def run_rank(rank: int, size: int, checkpoint: Path, directory: str) -> None:
    """Log-probs, and the statistics of three steps, of a world that shares sequences."""
    model = actor_rank(
        checkpoint, rank, size, f"file://{directory}/meeting{size}", context_parallel_size=size
    )
    packed = batch()
    logprobs = model.logprobs(packed)
    everyone = [None] * size
    torch.distributed.all_gather_object(everyone, logprobs)
    targets = with_targets(packed, next(found for found in everyone if found is not None))
    stats = [model.train_step(targets, step) for step in range(3)]
    model.close()
    if rank == 0:
        torch.save({"logprobs": trained(packed, logprobs), "stats": stats}, f"{directory}/{size}.pt")


@pytest.fixture(scope="module")
def runs(checkpoint: Path) -> dict[int, dict[str, Any]]:
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs")
    with tempfile.TemporaryDirectory() as directory:
        for size in (1, SIZE):
            multiprocessing.start_processes(
                run_rank, args=(size, checkpoint, directory), nprocs=size, start_method="spawn"
            )
        return {size: torch.load(f"{directory}/{size}.pt", weights_only=False) for size in (1, SIZE)}


def test_log_probs_are_those_of_one_gpu_to_rounding(runs: dict[int, dict[str, Any]]) -> None:
    gap = np.abs(runs[1]["logprobs"] - runs[SIZE]["logprobs"])
    print(f"mean {gap.mean():.4f}, largest {gap.max():.3f} nats")
    assert gap.mean() < 0.02 and gap.max() < 0.3


def test_gradients_and_steps_are_those_of_one_gpu_to_rounding(runs: dict[int, dict[str, Any]]) -> None:
    for alone, shared in zip(runs[1]["stats"], runs[SIZE]["stats"], strict=True):
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.03)
        assert shared["loss"] == pytest.approx(alone["loss"], abs=0.01)


@pytest.mark.parametrize("size", [2, 4])
def test_transformer_engine_shares_sequences_in_the_same_way(size: int) -> None:
    import transformer_engine_torch as tex

    cu_seqlens = np.cumsum([0, 40, 17, 17, 3]).astype(np.int32)
    for rank in range(size):
        part = ContextPart.of(cu_seqlens, size=size, rank=rank, multiple=1)
        padded = torch.tensor(part.cu_seqlens, dtype=torch.int32, device="cuda")
        theirs = tex.thd_get_partitioned_indices(padded, int(padded[-1]), size, rank)
        assert theirs.tolist() == part.placed_T.tolist()
