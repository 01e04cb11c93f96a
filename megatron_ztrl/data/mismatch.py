"""How far trainer and engine are apart at the tokens of one step, and what the importance weights made of it.

Tokens sampled under the trainer's own weights show the *mismatch* of the two implementations: numerics, and every
defect of a publish or of the tokens that were handed over. At older tokens the policy has moved as well:
*staleness*. Both are told by turn, and by distance from a tool reply, where such defects begin.

Shape suffixes: see ``algorithms.importance``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ztrl.algorithms.importance import effective_share, turns_and_positions
from megatron_ztrl.observability import names
from megatron_ztrl.types import TrainingSample

FIRST_TOKENS = 8
"""Model tokens that stand right after a tool reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """The trained tokens of a step, sample after sample."""

    lengths: list[int]
    """[B] Trained tokens of each sample."""
    trainer_logp_N: np.ndarray
    """[N] nats, at the start of the step."""
    engine_logp_N: np.ndarray
    """[N] nats, when they were sampled."""
    staleness_N: np.ndarray
    """[N] steps. The trainer's version less the one that sampled the token."""
    places_N: dict[str, np.ndarray]
    """[N] bool for each of ``names.PLACES``."""

    @classmethod
    def of(
        cls, samples: Sequence[TrainingSample], trainer_logprobs: Sequence[np.ndarray], version: int
    ) -> SampledTokens:
        """Picks the trained tokens.

        Args:
            samples: Of the whole step.
            trainer_logprobs: For each sample the log-probs of its trained tokens.
            version: Of the weights behind ``trainer_logprobs``.
        """
        engine, versions, turns, positions = [], [], [], []
        for sample in samples:
            count = len(sample.loss_mask)
            mask_L = np.frombuffer(bytes(sample.loss_mask), dtype=bool)
            engine.append(np.fromiter(sample.rollout_logprobs, dtype=np.float32, count=count)[mask_L])
            versions.append(np.fromiter(sample.weight_versions, dtype=np.int32, count=count)[mask_L])
            turn_N, position_N = turns_and_positions(mask_L)
            turns.append(turn_N)
            positions.append(position_N)
        lengths = [len(part) for part in engine]
        assert lengths == [len(part) for part in trainer_logprobs]
        staleness_N = version - np.concatenate(versions)
        assert (staleness_N >= 0).all(), "a token of weights that the trainer has not made yet"
        return cls(
            lengths=lengths,
            trainer_logp_N=np.concatenate(trainer_logprobs),
            engine_logp_N=np.concatenate(engine),
            staleness_N=staleness_N,
            places_N=_places(np.concatenate(turns), np.concatenate(positions)),
        )


def gap_statistics(tokens: SampledTokens) -> dict[str, float]:
    """``mismatch/*`` and ``staleness/*``; what there are no tokens for is left out."""
    log_ratio_N = tokens.trainer_logp_N.astype(np.float64) - tokens.engine_logp_N
    fresh_N = tokens.staleness_N == 0
    statistics = {names.STALENESS_SHARE: float(1.0 - fresh_N.mean())} if fresh_N.size else {}
    for group, chosen_N in ((names.MISMATCH, fresh_N), (names.STALENESS, ~fresh_N)):
        if not chosen_N.any():
            continue
        log_ratio = log_ratio_N[chosen_N]
        gap = np.abs(log_ratio)
        statistics |= {
            names.gap_key(group, names.GAP_MEAN): float(gap.mean()),
            names.gap_key(group, names.GAP_P99): float(np.quantile(gap, 0.99)),
            names.gap_key(group, names.GAP_MAX): float(gap.max()),
            names.gap_key(group, names.GAP_KL): float((np.expm1(log_ratio) - log_ratio).mean()),
        }
        places = {place: place_N[chosen_N] for place, place_N in tokens.places_N.items()}
        statistics |= _means(places, gap, f"{group}/gap")
    return statistics


def importance_statistics(
    tokens: SampledTokens, ratio_N: np.ndarray, weight_N: np.ndarray
) -> dict[str, float]:
    """``importance/*``.

    Args:
        tokens: Of the step.
        ratio_N: Before truncating or masking.
        weight_N: After it.
    """
    if not weight_N.size:
        return {}
    cut_N = weight_N != ratio_N
    return {
        names.IMPORTANCE_MEAN: float(weight_N.mean()),
        names.IMPORTANCE_LARGEST: float(ratio_N.max()),
        names.IMPORTANCE_CUT: float(cut_N.mean()),
        names.IMPORTANCE_EFFECTIVE: effective_share(weight_N),
    } | _means(tokens.places_N, cut_N, names.IMPORTANCE_CUT)


def mismatch_warning(metrics: Mapping[str, float], limit: float, step: int) -> str | None:
    """A line for the terminal when the mean gap of fresh tokens is above ``limit`` nats, else None."""
    gap = metrics[names.MISMATCH_MEAN]
    if gap <= limit:
        return None
    places = {place: f"{names.MISMATCH}/gap_{place}" for place in names.PLACES}
    worst = ", ".join(f"{place} {metrics[key]:.2g}" for place, key in places.items() if key in metrics)
    return (
        f"warning: step {step}: trainer and engine differ by {gap:.2g} nats on average at tokens sampled under the "
        f"same weights (algorithm.mismatch_alarm is {limit:g}): {worst}"
    )


def _places(turn_N: np.ndarray, position_N: np.ndarray) -> dict[str, np.ndarray]:
    follows_reply_N, near_N = turn_N > 1, position_N < FIRST_TOKENS
    masks = (
        turn_N == 1,
        turn_N == 2,
        turn_N > 2,
        follows_reply_N & near_N,
        follows_reply_N & ~near_N,
    )
    return dict(zip(names.PLACES, masks, strict=True))


def _means(places: Mapping[str, np.ndarray], values: np.ndarray, prefix: str) -> dict[str, float]:
    found = {place: values[mask] for place, mask in places.items()}
    return {f"{prefix}_{place}": float(part.mean()) for place, part in found.items() if part.size}
