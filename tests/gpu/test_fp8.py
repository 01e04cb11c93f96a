"""FP8 recipes run, stay near bfloat16, and train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_policy import actor, batch, trained, with_targets

pytestmark = pytest.mark.gpu

MEAN_GAP, LARGEST_GAP = 0.08, 1.5
"""Nats from bfloat16's log-probs, over the trained tokens of a random policy."""
NEEDS = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


@pytest.fixture(params=NEEDS)
def recipe(request: pytest.FixtureRequest) -> str:
    if torch.cuda.get_device_capability() < NEEDS[request.param]:
        pytest.skip(f"{request.param} needs compute capability {NEEDS[request.param]}")
    return request.param


@pytest.fixture(scope="module")
def bfloat16(checkpoint: Path) -> np.ndarray:
    packed = batch()
    with actor(checkpoint) as rank:
        return trained(packed, rank.logprobs(packed))


def test_logprobs_stay_near_bfloat16(recipe: str, checkpoint: Path, bfloat16: np.ndarray) -> None:
    packed = batch()
    with actor(checkpoint, fp8="hybrid", fp8_recipe=recipe) as rank:
        found = trained(packed, rank.logprobs(packed))
    gap = np.abs(found - bfloat16)
    print(f"{recipe}: mean {gap.mean():.4f}, largest {gap.max():.3f} nats")
    assert 0 < gap.mean() < MEAN_GAP  # 0 would mean that nothing was computed in FP8
    assert gap.max() < LARGEST_GAP


def test_gradients_are_finite_and_near_bfloat16s(recipe: str, checkpoint: Path) -> None:
    packed = batch()
    with actor(checkpoint) as rank:
        targets = with_targets(packed, rank.logprobs(packed))
        expected = rank.train_step(targets, 0)
    with actor(checkpoint, fp8="hybrid", fp8_recipe=recipe) as rank:
        found = [rank.train_step(targets, step) for step in range(3)]
    assert found[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.25)
    assert all(np.isfinite(stats["loss"]) and np.isfinite(stats["grad_norm"]) for stats in found)


def test_a_recipe_of_a_later_generation_is_refused(checkpoint: Path) -> None:
    if torch.cuda.get_device_capability() >= NEEDS["mxfp8"]:
        pytest.skip("this GPU runs every recipe")
    with (
        pytest.raises(ValueError, match=r"megatron.transformer.fp8_recipe: mxfp8 needs Blackwell"),
        actor(checkpoint, fp8="hybrid", fp8_recipe="mxfp8"),
    ):
        pass
