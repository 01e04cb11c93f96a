"""The fused Adam of Transformer Engine, or apex, is the one that steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_policy import actor, batch, with_targets

pytestmark = pytest.mark.gpu


def test_a_fused_adam_updates_the_main_weights(checkpoint: Path) -> None:
    packed = batch()
    with actor(checkpoint) as rank:
        parts = getattr(rank._optimizer, "chained_optimizers", [rank._optimizer])
        for part in parts:
            module = type(part.optimizer).__module__
            assert module.startswith(("transformer_engine", "apex")), module
        rank.train_step(with_targets(packed, rank.logprobs(packed)), 0)
        main = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
        assert {p.dtype for p in main} == {torch.float32}


def test_its_first_step_is_the_learning_rate_in_the_gradients_direction(checkpoint: Path) -> None:
    # Adam's first update is lr * g / (|g| + eps): lr for all but the tiniest gradients.
    packed = batch()
    with actor(checkpoint) as rank:
        parts = getattr(rank._optimizer, "chained_optimizers", [rank._optimizer])
        main = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in main]
        rank.train_step(with_targets(packed, rank.logprobs(packed)), 0)
        moved = torch.cat([(p - b).abs().flatten() for p, b in zip(main, before, strict=True)])
    assert moved.max().item() == pytest.approx(1e-4, rel=0.02)
    assert moved.median().item() == pytest.approx(1e-4, rel=0.05)
