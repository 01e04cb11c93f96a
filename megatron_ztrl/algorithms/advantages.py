"""Advantages from outcome rewards: one number per rollout, the same for all its model tokens (gamma = 1).

Shape suffixes: ``B`` rollouts of the batch, ``N`` groups. Rollouts whose loss is masked still count here;
those that the infrastructure failed must have been left out before.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_STD = 1e-4
"""Rewards are 0 or 1 up to shaping: a smaller spread is rounding, and must not be blown up to size one."""


def reinforce_pp_baseline(rewards_B: Tensor, group_ids_B: Tensor, trained_tokens_B: Tensor) -> Tensor:
    """REINFORCE++ with the group mean as baseline (arXiv:2501.03262): ``whiten(reward - group mean)``.

    The whitening is over all model tokens of the batch, so a rollout counts by its number of them. Since long
    and short rollouts weigh differently, a group with equal rewards gets minus the batch mean, not exactly 0.

    Args:
        rewards_B: [B]
        group_ids_B: [B] Any integers; equal ones are siblings.
        trained_tokens_B: [B] Model tokens of each rollout.

    Returns:
        [B] float32; all zeros when no group has any spread.
    """
    weights_B = trained_tokens_B.double()
    centred_B = rewards_B.double() - _group_mean(rewards_B.double(), group_ids_B)
    total = weights_B.sum().clamp(min=1.0)
    centred_B = centred_B - (weights_B * centred_B).sum() / total
    std = ((weights_B * centred_B.square()).sum() / total).sqrt()
    return (centred_B / std.clamp(min=_MIN_STD)).float()


def grpo(rewards_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """GRPO (arXiv:2402.03300): ``(reward - group mean) / group standard deviation``.

    The standard deviation is the population's (divisor n), so that a lone rollout is defined, too.

    Args:
        rewards_B: [B]
        group_ids_B: [B] Any integers; equal ones are siblings.

    Returns:
        [B] float32; zeros in a group without spread.
    """
    rewards_B = rewards_B.double()
    centred_B = rewards_B - _group_mean(rewards_B, group_ids_B)
    std_B = _group_mean(centred_B.square(), group_ids_B).sqrt()
    return (centred_B / std_B.clamp(min=_MIN_STD)).float()


def _group_mean(values_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """[B] Each rollout's group mean."""
    groups_N, group_of_B = torch.unique(group_ids_B, return_inverse=True)
    sums_N = values_B.new_zeros(len(groups_N)).index_add_(0, group_of_B, values_B)
    counts_N = torch.bincount(group_of_B, minlength=len(groups_N))
    return (sums_N / counts_N)[group_of_B]
