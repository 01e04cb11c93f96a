"""Policy losses over one packed microbatch.

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
) -> PolicyLoss:
    """Clipped surrogate of PPO (arXiv:1707.06347, eq. 7) with separate bounds (arXiv:2503.14476, eq. 8).

    Args:
        logp_T: [T] nats, of the policy being trained; carries the gradient.
        old_logp_T: [T] nats, of the policy the ratio is taken against.
        advantages_T: [T]
        mask_T: [T] bool. Entries where it is False may hold anything, even NaN.
        clip_low: The ratio is clipped below ``1 - clip_low``.
        clip_high: The ratio is clipped above ``1 + clip_high``.
    """
    zero = torch.zeros((), dtype=torch.float32, device=logp_T.device)
    # where() before exp(): a masked NaN or infinity must reach neither the sum nor the gradient.
    log_ratio_T = torch.where(mask_T, logp_T.float() - old_logp_T.float(), zero)
    advantages_T = torch.where(mask_T, advantages_T.float(), zero)
    ratio_T = log_ratio_T.exp()
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    loss_sum = -torch.minimum(unclipped_T, clipped_T).sum()
    with torch.no_grad():
        kl_T = torch.expm1(log_ratio_T) - log_ratio_T
        return PolicyLoss(
            loss_sum=loss_sum,
            clipped_sum=(clipped_T < unclipped_T).sum().float(),
            kl_sum=kl_T.sum(),
            ratio_sum=torch.where(mask_T, ratio_T, zero).sum(),
        )
