"""Who may start a rollout, and in which order groups are trained.

Staleness is bounded by admission, never by throwing rollouts away: at most ``(max_staleness + 1) *
groups_per_step`` groups are admitted and not yet released, and groups are trained strictly in the order of
their admission. A group admitted under version v is then trained at version v + max_staleness at the latest.

That capacity is also the over-sampling, by a factor of ``max_staleness + 1``: what a step does not take, running
or finished, stays in the queue and is the next step's. There is no factor besides it. A larger one would break
the bound, at once: with S = 0 the surplus of a step would be trained under the next version. A smaller one is a
smaller ``max_staleness``. A long rollout loses nothing to short ones either: they cannot overtake it, and once
the capacity is full of groups behind it nothing new starts until its group is trained.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from megatron_ztrl.types import Prompt, RolloutGroup

RunGroup = Callable[[int, Prompt], Awaitable[RolloutGroup]]


@dataclass(kw_only=True)
class TakenGroups:
    """What one training step gets."""

    groups: list[RolloutGroup]
    """In admission order."""
    dropped: list[RolloutGroup] = field(default_factory=list)
    """Passed over on the way because the filter refused them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingGroup:
    """A group that was admitted and not yet taken."""

    group_id: int
    prompt: Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class _Admitted:
    pending: PendingGroup
    task: asyncio.Task[tuple[RolloutGroup, bool]]
    """The group, and whether the filter keeps it."""


class RolloutScheduler:
    """Keeps the admitted groups running.

    Args:
        next_prompt: Draws the next training prompt.
        run_group: Rolls out and scores one group.
        keep_group: The filter; a refused group is replaced by a new one at once.
        groups_per_step: B.
        max_staleness: S; 0 is synchronous.
    """

    def __init__(
        self,
        next_prompt: Callable[[], Prompt],
        run_group: RunGroup,
        keep_group: Callable[[RolloutGroup], bool],
        *,
        groups_per_step: int,
        max_staleness: int,
    ) -> None:
        self._next_prompt = next_prompt
        self._run_group = run_group
        self._keep_group = keep_group
        self._capacity = (max_staleness + 1) * groups_per_step
        self._unreleased = 0
        self._next_group_id = 0
        self._queue: deque[_Admitted] = deque()
        self._restored: deque[PendingGroup] = deque()

    @property
    def next_group_id(self) -> int:
        """What the next new group will be called."""
        return self._next_group_id

    def start(self, pending: Sequence[PendingGroup] = (), next_group_id: int = 0) -> None:
        """Admits groups up to the capacity.

        Args:
            pending: What ``pending()`` said in the run that this one resumes: first in line, under their ids.
            next_group_id: As it was then; above every id that was ever used.
        """
        self._restored.extend(pending)
        self._next_group_id = next_group_id
        self._admit()

    async def take(self, count: int) -> TakenGroups:
        """Waits for the oldest ``count`` groups that pass the filter. Errors of a rollout propagate.

        Groups leave the queue together at the end, so a call that is cancelled, or fails, loses nothing.
        """
        taken = TakenGroups(groups=[])
        seen = 0
        while len(taken.groups) < count:
            group, kept = await asyncio.shield(self._queue[seen].task)
            (taken.groups if kept else taken.dropped).append(group)
            seen += 1
        for _ in range(seen):
            self._queue.popleft()
        return taken

    def release(self, count: int) -> None:
        """Lets ``count`` new groups in. Call it after the policy that was trained on them is published."""
        self._unreleased -= count
        assert self._unreleased >= 0, "more groups released than taken"
        self._admit()

    def pending(self) -> list[PendingGroup]:
        """What was admitted and not yet taken, in order; also groups that are finished, kept or refused."""
        return [admitted.pending for admitted in self._queue] + list(self._restored)

    async def stop(self) -> None:
        """Cancels everything in flight."""
        tasks = [admitted.task for admitted in self._queue]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._queue.clear()

    def _admit(self) -> None:
        while self._unreleased < self._capacity:
            pending = self._restored.popleft() if self._restored else self._new()
            self._queue.append(_Admitted(pending=pending, task=asyncio.create_task(self._run(pending))))
            self._unreleased += 1

    def _new(self) -> PendingGroup:
        pending = PendingGroup(group_id=self._next_group_id, prompt=self._next_prompt())
        self._next_group_id += 1
        return pending

    async def _run(self, pending: PendingGroup) -> tuple[RolloutGroup, bool]:
        group = await self._run_group(pending.group_id, pending.prompt)
        kept = self._keep_group(group)
        if not kept:  # refill now, not when the queue reaches this group
            self._unreleased -= 1
            self._admit()
        return group, kept
