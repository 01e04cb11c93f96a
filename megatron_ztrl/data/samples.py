"""Rollouts become flat training samples."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ztrl.types import NOT_SAMPLED, Rollout, RolloutGroup, TrainingSample


def build_samples(groups: Sequence[RolloutGroup]) -> list[TrainingSample]:
    """Flattens prompt and response of every finished rollout, in group order.

    Rollouts that the infrastructure failed are left out: they count in no loss and no statistic.

    Raises:
        ValueError: A rollout has no reward yet.
    """
    return [
        _flatten(rollout, group.group_id)
        for group in groups
        for rollout in group.rollouts
        if rollout.trainable
    ]


def _flatten(rollout: Rollout, group_id: int) -> TrainingSample:
    if rollout.reward is None:
        raise ValueError(f"rollout {rollout.rollout_id} has no reward: score it before building samples")
    response_tokens = len(rollout.token_ids)
    lists = (rollout.loss_mask, rollout.logprobs, rollout.weight_versions)
    assert all(len(per_token) == response_tokens for per_token in lists), rollout.rollout_id
    prompt_tokens = len(rollout.prompt_ids)
    return TrainingSample(
        token_ids=rollout.prompt_ids + rollout.token_ids,
        loss_mask=[False] * prompt_tokens + rollout.loss_mask,
        rollout_logprobs=[0.0] * prompt_tokens + rollout.logprobs,
        weight_versions=[NOT_SAMPLED] * prompt_tokens + rollout.weight_versions,
        reward=rollout.reward,
        group_id=group_id,
    )
