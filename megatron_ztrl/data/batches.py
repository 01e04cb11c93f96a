"""From the groups of one step to packed batches with advantages, one per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_ztrl.algorithms.advantages import gae, grpo, reinforce_pp_baseline, whiten
from megatron_ztrl.algorithms.importance import correction_of, importance_ratios, importance_weights
from megatron_ztrl.config.schema import AlgorithmConfig, Config, WorldConfig
from megatron_ztrl.data.mismatch import SampledTokens, gap_statistics, importance_statistics
from megatron_ztrl.data.packing import (
    PackedBatch,
    pack,
    split_minibatches,
    spread_trained,
    token_multiple,
    trained_values,
    with_per_token,
)
from megatron_ztrl.data.samples import build_samples
from megatron_ztrl.observability import names
from megatron_ztrl.types import RolloutGroup, TrainingSample

PerToken = Sequence[Sequence[np.ndarray]]
"""``arrays[rank][m]``: [T], as ``PackedBatch.microbatches`` lies."""


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """One optimizer step: the same samples, packed for each world that trains on them."""

    samples: list[TrainingSample]
    actor: PackedBatch
    critic: PackedBatch | None
    """None without a critic."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the models said of one ``Minibatch`` before it is trained on."""

    old_logprobs: PerToken | None = None
    """Of the actor; None takes what the engine reported."""
    reference_logprobs: PerToken | None = None
    values: PerToken | None = None
    """Of the critic, and laid out as its batch."""


def pack_minibatches(
    groups: Sequence[RolloutGroup], config: Config, rng: np.random.Generator
) -> list[Minibatch]:
    """Splits the step's samples at random, and packs every part for each world."""
    samples = build_samples(groups)
    has_critic = config.algorithm.advantage == "gae"
    minibatches = []
    for indices in split_minibatches(len(samples), config.algorithm.minibatches, rng):
        chosen = [samples[index] for index in indices]
        minibatches.append(
            Minibatch(
                samples=chosen,
                actor=_pack(chosen, config, config.actor),
                critic=_pack(chosen, config, config.critic) if has_critic else None,
            )
        )
    return minibatches


def with_targets(
    minibatches: Sequence[Minibatch], scores: Sequence[Scores], config: Config, version: int
) -> tuple[list[Minibatch], dict[str, float]]:
    """Attaches everything that the losses need.

    Advantages are computed over the whole step, so their statistics do not depend on the mini-batches.

    Args:
        minibatches: Of one step.
        scores: Of each.
        config: The run.
        version: Of the actor's weights behind the scores.

    Returns:
        (the mini-batches, statistics: ``critic/*`` of its values, ``mismatch/*`` and so on of the log-probs).
    """
    samples = [sample for minibatch in minibatches for sample in minibatch.samples]
    advantages, returns, values, statistics = _advantages(minibatches, scores, config.algorithm)
    weights = None
    if config.algorithm.old_logprobs == "trainer":
        tokens = SampledTokens.of(samples, _sample_logprobs(minibatches, scores), version)
        weights, weight_statistics = _importance_weights(tokens, config)
        statistics |= gap_statistics(tokens) | weight_statistics
    done, first = [], 0
    for minibatch, score in zip(minibatches, scores, strict=True):
        mine = slice(first, first + len(minibatch.samples))
        first = mine.stop
        actor = _with_policy_targets(minibatch.actor, score, advantages[mine])
        if weights is not None:
            actor = with_per_token(actor, "importance_weights", spread_trained(actor, weights[mine]))
        critic = minibatch.critic
        if critic is not None:
            critic = with_per_token(critic, "old_values", spread_trained(critic, values[mine]))
            critic = with_per_token(critic, "returns", spread_trained(critic, returns[mine]))
        done.append(replace(minibatch, actor=actor, critic=critic))
    return done, statistics


def sample_advantages(samples: Sequence[TrainingSample], algorithm: AlgorithmConfig) -> np.ndarray:
    """[B] One advantage per sample, the same for all its trained tokens."""
    rewards_B = torch.tensor([sample.reward for sample in samples])
    group_ids_B = torch.tensor([sample.group_id for sample in samples])
    if algorithm.advantage == "grpo":
        return grpo(rewards_B, group_ids_B).numpy()
    assert algorithm.advantage == "reinforce_pp_baseline", algorithm.advantage
    trained_tokens_B = torch.tensor([sum(sample.loss_mask) for sample in samples])
    return reinforce_pp_baseline(rewards_B, group_ids_B, trained_tokens_B).numpy()


def token_advantages(
    samples: Sequence[TrainingSample], values: Sequence[np.ndarray], algorithm: AlgorithmConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each sample, whitened advantages and plain returns of its trained tokens.

    Args:
        samples: Of the whole step.
        values: For each sample, the critic's value before each trained token.
        algorithm: ``gamma`` and ``gae_lambda``.
    """
    lengths = [len(part) for part in values]
    if not any(lengths):
        return list(values), list(values)
    values_BN = torch.nn.utils.rnn.pad_sequence([torch.tensor(part) for part in values], batch_first=True)
    trained = torch.tensor([index for index, length in enumerate(lengths) if length])
    lengths_B = torch.tensor(lengths)
    rewards_B = torch.tensor([sample.reward for sample in samples])
    advantages_BN, returns_BN = gae(
        values_BN[trained],
        lengths_B[trained],
        rewards_B[trained],
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
    )
    is_token_BN = torch.arange(values_BN.shape[1]) < lengths_B[trained, None]
    ends = np.cumsum(lengths)[:-1]
    return (
        np.split(whiten(advantages_BN[is_token_BN]).numpy(), ends),
        np.split(returns_BN[is_token_BN].numpy(), ends),
    )


def _pack(samples: Sequence[TrainingSample], config: Config, world: WorldConfig) -> PackedBatch:
    return pack(
        samples,
        max_tokens_per_microbatch=world.max_tokens_per_microbatch,
        data_parallel_size=world.data_parallel_size,
        pad_to_multiple=token_multiple(world, config.megatron.transformer),
    )


def _advantages(
    minibatches: Sequence[Minibatch], scores: Sequence[Scores], algorithm: AlgorithmConfig
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], dict[str, float]]:
    """For each sample, by trained token: advantages and, with a critic, returns and values; their statistics."""
    samples = [sample for minibatch in minibatches for sample in minibatch.samples]
    if algorithm.advantage == "gae":
        values = [
            part
            for minibatch, score in zip(minibatches, scores, strict=True)
            for part in _sample_values(minibatch, score)
        ]
        advantages, returns = token_advantages(samples, values, algorithm)
        return advantages, returns, values, _value_statistics(values, returns)
    counts = [sum(sample.loss_mask) for sample in samples]
    advantages_B = sample_advantages(samples, algorithm)
    return [np.full(n, value) for n, value in zip(counts, advantages_B, strict=True)], [], [], {}


def _importance_weights(
    tokens: SampledTokens, config: Config
) -> tuple[list[np.ndarray] | None, dict[str, float]]:
    """For each sample the weights of its trained tokens, None without a correction; their statistics."""
    correction = correction_of(config)
    if correction == "none":
        return None, {}
    algorithm = config.algorithm
    ratio_N = importance_ratios(
        tokens.trainer_logp_N, tokens.engine_logp_N, tokens.lengths, algorithm.importance_level
    )
    weight_N = importance_weights(
        ratio_N, correction, cap=algorithm.importance_cap, floor=algorithm.importance_floor
    )
    statistics = importance_statistics(tokens, ratio_N, weight_N)
    return np.split(weight_N, np.cumsum(tokens.lengths)[:-1]), statistics


def _sample_logprobs(minibatches: Sequence[Minibatch], scores: Sequence[Scores]) -> list[np.ndarray]:
    """For each sample what the trainer says of its trained tokens."""
    parts: list[np.ndarray] = []
    for minibatch, score in zip(minibatches, scores, strict=True):
        assert score.old_logprobs is not None
        parts += trained_values(minibatch.actor, score.old_logprobs, len(minibatch.samples))
    return parts


def _sample_values(minibatch: Minibatch, scores: Scores) -> list[np.ndarray]:
    assert minibatch.critic is not None and scores.values is not None
    return trained_values(minibatch.critic, scores.values, len(minibatch.samples))


def _with_policy_targets(batch: PackedBatch, scores: Scores, advantages: Sequence[np.ndarray]) -> PackedBatch:
    old_logprobs = scores.old_logprobs
    if old_logprobs is None:
        old_logprobs = [[mb.per_token["rollout_logprobs"] for mb in rank] for rank in batch.microbatches]
    batch = with_per_token(batch, "old_logprobs", old_logprobs)
    if scores.reference_logprobs is not None:
        batch = with_per_token(batch, "reference_logprobs", scores.reference_logprobs)
    return with_per_token(batch, "advantages", spread_trained(batch, advantages))


def _value_statistics(values: Sequence[np.ndarray], returns: Sequence[np.ndarray]) -> dict[str, float]:
    """Means, and how much of the returns' variance the values explain: 1 is all, below 0 is worse than none."""
    value_N, return_N = np.concatenate(values).astype(np.float64), np.concatenate(returns).astype(np.float64)
    spread = float(return_N.var())
    return {
        names.CRITIC_VALUE: float(value_N.mean()),
        names.CRITIC_RETURN: float(return_N.mean()),
        names.CRITIC_EXPLAINED_VARIANCE: 1.0 - float((return_N - value_N).var()) / spread
        if spread > 0
        else 0.0,
    }
