"""Two GPUs compute what one does, however they share the work."""

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
LAYOUTS: dict[str, dict[str, Any]] = {
    "context parallel": {"context_parallel_size": SIZE},
    "tensor and sequence parallel": {"tensor_parallel_size": SIZE, "sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": SIZE},
    "interleaved pipeline": {"pipeline_parallel_size": SIZE, "virtual_pipeline_size": 2},
}


def run_rank(rank: int, layout: dict[str, Any], checkpoint: Path, directory: str, size: int) -> None:
    """Log-probs, and the statistics of three steps; saved by whichever rank has them."""
    model = actor_rank(checkpoint, rank, size, f"file://{directory}/meeting", **layout)
    packed = batch()
    everyone: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyone, model.logprobs(packed))
    (logprobs,) = (found for found in everyone if found is not None)
    targets = with_targets(packed, logprobs)
    stats = [model.train_step(targets, step) for step in range(3)]
    model.close()
    if stats[0] is not None:
        torch.save({"logprobs": trained(packed, logprobs), "stats": stats}, f"{directory}/run.pt")


def run(layout: dict[str, Any], checkpoint: Path, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.start_processes(
            run_rank, args=(layout, checkpoint, directory, size), nprocs=size, start_method="spawn"
        )
        return torch.load(f"{directory}/run.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Any]:
    if torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs")
    return run({}, checkpoint, 1)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_log_probs_and_steps_are_those_of_one_gpu_to_rounding(
    alone: dict[str, Any], layout: dict[str, Any], checkpoint: Path
) -> None:
    shared = run(layout, checkpoint, SIZE)
    gap = np.abs(alone["logprobs"] - shared["logprobs"])
    print(f"mean {gap.mean():.4f}, largest {gap.max():.3f} nats")
    assert gap.mean() < 0.02 and gap.max() < 0.3
    for expected, found in zip(alone["stats"], shared["stats"], strict=True):
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.03)
        assert found["loss"] == pytest.approx(expected["loss"], abs=0.01)


@pytest.mark.parametrize("size", [2, 4])
def test_transformer_engine_shares_sequences_in_the_same_way(size: int) -> None:
    import transformer_engine_torch as tex

    cu_seqlens = np.cumsum([0, 40, 17, 17, 3]).astype(np.int32)
    for rank in range(size):
        part = ContextPart.of(cu_seqlens, size=size, rank=rank, multiple=1)
        padded = torch.tensor(part.cu_seqlens, dtype=torch.int32, device="cuda")
        theirs = tex.thd_get_partitioned_indices(padded, int(padded[-1]), size, rank)
        assert theirs.tolist() == part.placed_T.tolist()
