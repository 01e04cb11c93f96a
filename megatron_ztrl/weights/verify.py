"""The canary: one fixed token sequence whose log-probs trainer and engine must agree on after a publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class PublishError(RuntimeError):
    """The engines do not serve what the trainer holds."""

    def __init__(self, message: str, lost: Mapping[str, str] | None = None) -> None:
        """Args:
        message: what failed, where.
        lost: by URL, why an engine must not sample again; the others serve either the new weights or the old.
        """
        super().__init__(message)
        self.lost = dict(lost or {})


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
