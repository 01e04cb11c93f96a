"""From the groups of one step to packed batches with advantages, one per optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ztrl.algorithms.advantages import grpo, reinforce_pp_baseline
from megatron_ztrl.config.schema import AlgorithmConfig, Config
from megatron_ztrl.data.packing import (
    PackedBatch,
    broadcast_per_sample,
    pack,
    split_minibatches,
    with_per_token,
)
from megatron_ztrl.data.samples import build_samples
from megatron_ztrl.types import RolloutGroup, TrainingSample


def training_batches(
    groups: Sequence[RolloutGroup], config: Config, rng: np.random.Generator
) -> list[PackedBatch]:
    """One packed batch per mini-batch, with ``advantages`` attached.

    Advantages are computed over the whole step before it is split, so their statistics do not depend on the
    mini-batches.
    """
    samples = build_samples(groups)
    advantages_B = sample_advantages(samples, config.algorithm)
    actor = config.actor
    batches = []
    for indices in split_minibatches(len(samples), config.algorithm.minibatches, rng):
        batch = pack(
            [samples[index] for index in indices],
            max_tokens_per_microbatch=actor.max_tokens_per_microbatch,
            data_parallel_size=actor.data_parallel_size,
            pad_to_multiple=actor.tensor_parallel_size if actor.sequence_parallel else 1,
        )
        batches.append(
            with_per_token(batch, "advantages", broadcast_per_sample(batch, advantages_B[indices]))
        )
    return batches


def sample_advantages(samples: Sequence[TrainingSample], algorithm: AlgorithmConfig) -> np.ndarray:
    """[B] One advantage per sample, the same for all its trained tokens."""
    rewards_B = torch.tensor([sample.reward for sample in samples])
    group_ids_B = torch.tensor([sample.group_id for sample in samples])
    match algorithm.advantage:
        case "grpo":
            advantages_B = grpo(rewards_B, group_ids_B)
        case "reinforce_pp_baseline":
            trained_tokens_B = torch.tensor([sum(sample.loss_mask) for sample in samples])
            advantages_B = reinforce_pp_baseline(rewards_B, group_ids_B, trained_tokens_B)
    return advantages_B.numpy()


def with_old_logprobs(
    batch: PackedBatch, trainer_logprobs: Sequence[Sequence[np.ndarray]] | None
) -> PackedBatch:
    """Attaches the ratio's denominator: the trainer's log-probs, or the engine's when there are none."""
    if trainer_logprobs is None:
        trainer_logprobs = [
            [microbatch.per_token["rollout_logprobs"] for microbatch in rank] for rank in batch.microbatches
        ]
    return with_per_token(batch, "old_logprobs", trainer_logprobs)


def logprob_gap(batch: PackedBatch) -> float:
    """The largest |trainer - engine| over the trained tokens, in nats."""
    return max(
        float(np.abs(mb.per_token["old_logprobs"] - mb.per_token["rollout_logprobs"]).max(initial=0.0))
        for rank in batch.microbatches
        for mb in rank
    )
