"""Losses of policy and critic over one packed microbatch.

Shape suffix: ``T`` packed tokens. Every function returns *sums* over the masked tokens: the caller divides
by the trained tokens of the whole batch, so the token-level mean does not depend on how samples were packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """Sums over the masked tokens of one microbatch; all but ``loss_sum`` are detached."""

    loss_sum: Tensor
    """[] Differentiable; to be minimised."""
    clipped_sum: Tensor
    """[] Tokens whose gradient the clip cut off."""
    kl_sum: Tensor
    """[] nats. The k3 estimate of KL(old || new), never negative (http://joschu.net/blog/kl-approx.html)."""
    ratio_sum: Tensor
    """[] Sum of new / old probability; the mean is 1 exactly on policy."""


def ppo_clip_loss(
    logp_T: Tensor,
    old_logp_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights_T: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate of PPO (arXiv:1707.06347, eq. 7) with separate bounds (arXiv:2503.14476, eq. 8).

    Args:
        logp_T: [T] nats, of the policy being trained; carries the gradient.
        old_logp_T: [T] nats, of the policy the ratio is taken against.
        advantages_T: [T]
        mask_T: [T] bool. Entries where it is False may hold anything, even NaN.
        clip_low: The ratio is clipped below ``1 - clip_low``.
        clip_high: The ratio is clipped above ``1 + clip_high``.
        weights_T: [T] Importance weights (``algorithms.importance``); None weighs every token 1. A weight of 0
            leaves a token no gradient. The other sums count it as before, and so does the caller's denominator.
    """
    zero = torch.zeros((), dtype=torch.float32, device=logp_T.device)
    # where() before exp(): a masked NaN or infinity must reach neither the sum nor the gradient.
    log_ratio_T = torch.where(mask_T, logp_T.float() - old_logp_T.float(), zero)
    advantages_T = torch.where(mask_T, advantages_T.float(), zero)
    ratio_T = log_ratio_T.exp()
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    surrogate_T = torch.minimum(unclipped_T, clipped_T)
    if weights_T is not None:
        surrogate_T = surrogate_T * torch.where(mask_T, weights_T.float(), zero)
    loss_sum = -surrogate_T.sum()
    with torch.no_grad():
        kl_T = torch.expm1(log_ratio_T) - log_ratio_T
        return PolicyLoss(
            loss_sum=loss_sum,
            clipped_sum=(clipped_T < unclipped_T).sum().float(),
            kl_sum=kl_T.sum(),
            ratio_sum=torch.where(mask_T, ratio_T, zero).sum(),
        )


def kl_penalty(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """[] Sum of the k3 estimates of KL(policy || reference), nats; differentiable in ``logp_N``.

    Unbiased for tokens that the policy sampled, and never negative (http://joschu.net/blog/kl-approx.html; the
    penalty of GRPO, arXiv:2402.03300, eq. 4).
    """
    log_ratio_N = reference_logp_N.float() - logp_N.float()
    return (torch.expm1(log_ratio_N) - log_ratio_N).sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueLoss:
    """Sums over the tokens of one microbatch; all but ``loss_sum`` are detached."""

    loss_sum: Tensor
    """[] Differentiable; to be minimised."""
    clipped_sum: Tensor
    """[] Tokens whose gradient the clip cut off."""
    squared_error_sum: Tensor
    """[] Of the values before this step."""


def value_loss(
    value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, value_clip: float | None
) -> ValueLoss:
    """Half the squared error, clipped as the policy is: ``max`` of the plain and the clipped error.

    The clip keeps a value within ``value_clip`` of the one that the advantages were computed with
    (the implementation of arXiv:1707.06347; described in arXiv:2005.12729, section 3).

    Args:
        value_N: [N] Carries the gradient.
        old_value_N: [N]
        return_N: [N] What the values should have been.
        value_clip: None clips nothing.
    """
    value_N = value_N.float()
    plain_N = (value_N - return_N).square()
    chosen_N = plain_N
    if value_clip is not None:
        # Not old + clamped difference: that rounds values which the clip leaves alone, and counts some as clipped.
        near_N = value_N.clamp(old_value_N - value_clip, old_value_N + value_clip)
        chosen_N = torch.maximum(plain_N, (near_N - return_N).square())
    return ValueLoss(
        loss_sum=0.5 * chosen_N.sum(),
        clipped_sum=(chosen_N > plain_N).sum().float(),
        squared_error_sum=plain_N.detach().sum(),
    )
