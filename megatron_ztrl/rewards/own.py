"""A user's own reward function, kept to what the rest of the program counts on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


def bounded(
    function: Callable[[str, str], Awaitable[float]], name: str
) -> Callable[[str, str], Awaitable[float]]:
    """``function``, which ``reward.function`` names ``name``, refused as soon as it returns no number in [0, 1].

    Filters (``algorithm.min_accuracy``) and the reported accuracy are means of rewards.
    """

    async def score(response_text: str, ground_truth: str) -> float:
        reward = await function(response_text, ground_truth)
        if not (isinstance(reward, int | float) and 0 <= reward <= 1):  # NaN fails the comparison
            raise ValueError(f"reward.function: {name} must return a number from 0 to 1, returned {reward!r}")
        return float(reward)

    return score
