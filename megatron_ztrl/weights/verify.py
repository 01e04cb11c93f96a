"""The canary: one fixed token sequence whose log-probs trainer and engine must agree on after a publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_ztrl.types import TensorSlice


class PublishError(RuntimeError):
    """The engines do not serve what the trainer holds."""

    def __init__(self, message: str, lost: Mapping[str, str] | None = None) -> None:
        """Args:
        message: what failed, where.
        lost: by URL, why an engine must not sample again; the others serve either the new weights or the old.
        """
        super().__init__(message)
        self.lost = dict(lost or {})


@torch.no_grad()
def find_invalid(
    slices: Sequence[TensorSlice], parameter: Callable[[str], torch.Tensor], rank: int
) -> str | None:
    """Look for weights that must not reach an engine.

    Args:
        slices: what a trainer rank holds.
        parameter: returns the local parameter of a ``TensorSlice.param``.
        rank: of the trainer; named in the answer.

    Returns:
        Which tensor has values that are not finite, if any has.
    """
    views = [parameter(item.param).narrow(item.dim, item.start, item.length) for item in slices]
    # One pass and no memory: a sum is finite only if all its terms are.
    sums = torch.stack([view.sum(dtype=torch.float32) for view in views])
    for item, view, suspicious in zip(slices, views, (~sums.isfinite()).tolist(), strict=True):
        if suspicious and (count := int((~view.isfinite()).sum())):  # finite terms may add up to infinity
            return f"{item.tensor}: {count} of {view.numel()} values on trainer rank {rank} are not finite"
    return None


def canary_tokens(vocab_size: int, length: int = 32) -> list[int]:
    """Return the canary, [length]: ids spread over the whole vocabulary, so that every shard of it is
    touched.
    """
    step = max(1, round(vocab_size * 0.618))  # the golden ratio: neighbours end up far apart
    return [(1 + step * position) % vocab_size for position in range(length)]


def check_canary(
    trainer_logprobs: Sequence[float],
    engine_logprobs: Sequence[float],
    token_ids: Sequence[int],
    *,
    max_gap: float,
    version: int,
    engine: str,
) -> float:
    """Compare the log-probs of the canary under both.

    Args:
        trainer_logprobs: [L - 1] of every token after the first, in nats.
        engine_logprobs: [L - 1]
        token_ids: [L]
        max_gap: ``publish.max_logprob_gap``, in nats.
        version: weight version just published.
        engine: named in the error.

    Returns:
        The largest absolute difference, in nats.

    Raises:
        PublishError: the gap is larger than ``max_gap``, or not a number.
    """
    pairs = zip(trainer_logprobs, engine_logprobs, strict=True)
    gaps = [abs(trainer - served) for trainer, served in pairs]
    worst = max(range(len(gaps)), key=lambda i: gaps[i] if gaps[i] == gaps[i] else float("inf"))
    if not gaps[worst] <= max_gap:
        raise PublishError(
            f"version {version}: {engine} differs from the trainer by {gaps[worst]:.3g} nats at canary"
            f" position {worst + 1} (token {token_ids[worst + 1]}:"
            f" trainer {trainer_logprobs[worst]:.6f}, engine {engine_logprobs[worst]:.6f});"
            f" publish.max_logprob_gap is {max_gap:g}"
        )
    return gaps[worst]
