"""Wall-clock limits: a guard against what hangs, not a budget of the policy.

What a rollout may cost is bounded in tokens and tool calls, which the policy's own choices use up. How long that
takes is up to the machines, so a rollout that misses a deadline says nothing about the policy: it is neither wrong
nor truncated. It ends with ``StopReason.DEADLINE`` and counts like one that the infrastructure failed, masked in
the loss, left out of its group's baseline and reported as ``missed_deadlines``. It is not rolled out again
either: that would draw until the answer is short.

Leaving out the slowest is a bias of its own, towards short responses. So there is no limit unless one is set, and
it belongs well above what the longest response takes on a busy engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Time for one rollout, and for all siblings together. None is no limit.

    Waiting for an engine does not count: a rollout's time begins when it has one, a group's when its first
    rollout has.
    """

    rollout_seconds: float | None = None
    group_seconds: float | None = None


class GroupDeadline:
    """When the rollouts of one group have to end."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._group_ends_at: float | None = None

    def of_next_rollout(self) -> float | None:
        """The time of the event loop at which a rollout that begins now has to end."""
        now = asyncio.get_running_loop().time()
        limits = self._deadlines
        if limits.group_seconds is not None and self._group_ends_at is None:
            self._group_ends_at = now + limits.group_seconds
        own = None if limits.rollout_seconds is None else now + limits.rollout_seconds
        return min((end for end in (own, self._group_ends_at) if end is not None), default=None)
