"""Importance weights, for what lies between the policy that sampled a token and the one that is trained.

The *behaviour* policy is the engine's: its numerics, and weights that may be a few steps old. The *proximal*
policy is the trainer's at the start of the step. Decoupled PPO (arXiv:2505.24298, eq. 5) clips the ratio against
the proximal policy and multiplies by proximal / behaviour, without a gradient: that is the weight made here.

Shape suffixes: ``N`` trained tokens, sample after sample; ``B`` samples; ``L`` tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_ztrl.config.schema import Config

LARGEST_LOG_RATIO = 20.0
"""Nats. Past every useful cap; keeps the product over a long response a finite number."""


def correction_of(config: Config) -> Literal["none", "truncate", "mask"]:
    """``algorithm.importance_correction``, or what it defaults to in this run."""
    algorithm = config.algorithm
    if algorithm.importance_correction is not None:
        return algorithm.importance_correction
    if algorithm.old_logprobs == "engine":  # the clipped ratio is against the behaviour policy already
        return "none"
    agree = config.rollout.max_staleness == 0 and config.model.dtype == "float32"
    return "none" if agree else "truncate"


def importance_ratios(
    proximal_N: np.ndarray,
    behaviour_N: np.ndarray,
    lengths_B: Sequence[int],
    level: Literal["token", "sequence", "geometric"],
) -> np.ndarray:
    """Proximal / behaviour probability, of each token or of the response it belongs to.

    Over a response it is the product of its tokens' ratios: unbiased, and wide for long responses. The geometric
    mean of them (GSPO, arXiv:2507.18071, eq. 7) does not grow with the length.

    Args:
        proximal_N: [N] nats.
        behaviour_N: [N] nats, each token's under the weights that sampled it.
        lengths_B: [B] Trained tokens of each sample.
        level: Whose probability.

    Returns:
        [N] float64, at most e^20.
    """
    log_ratio_N: np.ndarray = proximal_N.astype(np.float64) - behaviour_N.astype(np.float64)
    if level != "token":
        sample_of_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
        log_ratio_B: np.ndarray = np.bincount(sample_of_N, log_ratio_N, minlength=len(lengths_B))
        if level == "geometric":
            log_ratio_B = log_ratio_B / np.maximum(lengths_B, 1)
        log_ratio_N = log_ratio_B[sample_of_N]
    return np.exp(np.minimum(log_ratio_N, LARGEST_LOG_RATIO))


def importance_weights(
    ratio_N: np.ndarray, correction: Literal["truncate", "mask"], *, cap: float, floor: float
) -> np.ndarray:
    """What the loss of each token is multiplied by.

    ``truncate``: ``min(ratio, cap)`` (truncated importance sampling: Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). ``mask``: the ratio inside ``[floor, cap]``, 0 outside (IcePop,
    arXiv:2510.18855).

    Args:
        ratio_N: [N] From ``importance_ratios``.
        correction: One of the above.
        cap: Largest weight.
        floor: Smallest weight of ``mask``.

    Returns:
        [N] float64.
    """
    if correction == "truncate":
        return np.minimum(ratio_N, cap)
    return np.where((ratio_N >= floor) & (ratio_N <= cap), ratio_N, 0.0)


def effective_share(weight_N: np.ndarray) -> float:
    """How many equally weighted tokens would tell as much (Kish 1965), as a share of N; 0 if all weigh nothing."""
    squares = float(np.square(weight_N).sum())
    return float(weight_N.sum()) ** 2 / squares / weight_N.size if squares else 0.0


def turns_and_positions(loss_mask_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in its rollout each model token stands. A run of False between two model tokens is a tool reply.

    Args:
        loss_mask_L: [L] bool, True at model tokens.

    Returns:
        ([N] turn, the first is 1; [N] model tokens before it in its turn).
    """
    place_N = np.flatnonzero(loss_mask_L)
    starts_turn_N = np.diff(place_N, prepend=-2) > 1
    turn_N = np.cumsum(starts_turn_N)
    start_N = place_N[starts_turn_N][turn_N - 1]
    return turn_N, place_N - start_N
