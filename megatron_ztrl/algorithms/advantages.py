"""Advantages from outcome rewards: one number per rollout (gamma = 1), or with a critic one per model token.

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


def gae(
    values_BN: Tensor, lengths_B: Tensor, rewards_B: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16), over model tokens only.

    A tool's reply lies between two model tokens without being a step of its own: gamma and lambda act once
    from one model token to the next, however long the reply. The reward follows the last model token.

    Args:
        values_BN: [B, N] What the critic expects before each model token of a rollout, first token first.
            Entries past a rollout's tokens may hold anything.
        lengths_B: [B] Model tokens of each rollout, at least 1.
        rewards_B: [B]
        gamma: Discount from one model token to the next.
        gae_lambda: 0 trusts the critic after one token, 1 waits for the reward.

    Returns:
        ([B, N] advantages, [B, N] returns, which are the critic's targets); float32, 0 past a rollout's tokens.
    """
    longest = values_BN.shape[1]
    is_token_BN = torch.arange(longest) < lengths_B[:, None]
    values_BN = torch.where(is_token_BN, values_BN.double(), 0.0)
    rewards_BN = torch.zeros_like(values_BN)
    rewards_BN.scatter_(1, lengths_B[:, None] - 1, rewards_B.double()[:, None])
    advantages_BN = torch.zeros_like(values_BN)
    next_value_B = next_advantage_B = torch.zeros_like(values_BN[:, 0])
    for token in reversed(range(longest)):
        surprise_B = rewards_BN[:, token] + gamma * next_value_B - values_BN[:, token]
        next_advantage_B = torch.where(
            is_token_BN[:, token], surprise_B + gamma * gae_lambda * next_advantage_B, 0.0
        )
        advantages_BN[:, token] = next_advantage_B
        next_value_B = values_BN[:, token]
    return advantages_BN.float(), (advantages_BN + values_BN).float()


def whiten(values_N: Tensor) -> Tensor:
    """[N] Shifted to mean 0 and scaled to standard deviation 1, over all model tokens of the batch."""
    values_N = values_N.double()
    return ((values_N - values_N.mean()) / values_N.std(correction=0).clamp(min=_MIN_STD)).float()


def _group_mean(values_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """[B] Each rollout's group mean."""
    groups_N, group_of_B = torch.unique(group_ids_B, return_inverse=True)
    sums_N = values_B.new_zeros(len(groups_N)).index_add_(0, group_of_B, values_B)
    counts_N = torch.bincount(group_of_B, minlength=len(groups_N))
    return (sums_N / counts_N)[group_of_B]
