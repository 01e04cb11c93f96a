"""The policy in Transformer Engine's layers is the checkpoint's policy, and trains as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_policy import actor, batch, reference, trained, with_targets

pytestmark = pytest.mark.gpu

NOISE_FACTOR = 4.0
"""The trainer may be this much further from float32 than transformers in bfloat16 is: both are rounding."""


@pytest.fixture
def policy(checkpoint: Path) -> Any:
    with actor(checkpoint) as rank:
        yield rank


def test_transformer_engine_is_what_auto_takes(policy: Any) -> None:
    modules = {type(module).__module__ for chunk in policy._chunks for module in chunk.modules()}
    assert any(name.startswith("transformer_engine.pytorch") for name in modules)
    assert "megatron_ztrl.trainer.cpu_compat.attention" not in modules


def test_logprobs_are_as_close_to_float32_as_transformers_in_bfloat16(policy: Any, checkpoint: Path) -> None:
    packed = batch()
    exact = reference(checkpoint, torch.float32)
    theirs = np.abs(reference(checkpoint, torch.bfloat16) - exact)
    ours = np.abs(trained(packed, policy.logprobs(packed)) - exact)
    assert ours.mean() <= NOISE_FACTOR * theirs.mean()
    assert ours.max() <= NOISE_FACTOR * theirs.max()


def test_export_under_fused_norm_names_is_the_checkpoint(
    policy: Any, checkpoint: Path, tmp_path: Path
) -> None:
    policy.export_hf(tmp_path)
    before = load_file(checkpoint / "model.safetensors")
    after = {
        name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(torch.bfloat16)), name


def test_a_step_on_positive_advantages_makes_the_tokens_likelier(checkpoint: Path) -> None:
    with actor(checkpoint) as rank:
        packed = batch()
        before = rank.logprobs(packed)
        targets = with_targets(packed, before)
        for mb in targets.microbatches[0]:
            mb.per_token["advantages"][:] = mb.loss_mask_T
        stats = rank.train_step(targets, 0)
        after = rank.logprobs(packed)
        assert stats["mean_ratio"] == pytest.approx(1.0, abs=0.02)
        assert np.isfinite(stats["grad_norm"]) and stats["grad_norm"] > 0
        assert trained(packed, after).mean() > trained(packed, before).mean() + 1e-3


def test_a_resumed_rank_goes_on_where_it_stopped(checkpoint: Path, tmp_path: Path) -> None:
    packed = batch()
    with actor(checkpoint) as rank:
        targets = with_targets(packed, rank.logprobs(packed))
        rank.train_step(targets, 0)
        rank.save_checkpoint(tmp_path)
        rank.finish_checkpoint()
        expected = rank.train_step(targets, 1)
    with actor(checkpoint) as rank:
        rank.load_checkpoint(tmp_path)
        found = rank.train_step(targets, 1)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_float32_takes_local_layers_and_agrees_with_transformers(checkpoint: Path) -> None:
    """Transformer Engine's attention over packed sequences has no float32."""
    packed = batch()
    with actor(checkpoint, "float32") as rank:
        modules = {type(module).__module__ for chunk in rank._chunks for module in chunk.modules()}
        assert "megatron_ztrl.trainer.cpu_compat.attention" in modules
        ours = trained(packed, rank.logprobs(packed))
    assert np.abs(ours - reference(checkpoint, torch.float32)).max() < 1e-3
