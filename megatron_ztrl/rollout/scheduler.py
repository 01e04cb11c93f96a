"""Who may start a rollout, and in which order groups are trained.

Staleness is bounded by admission, never by throwing rollouts away: at most ``(max_staleness + 1) *
groups_per_step`` groups are admitted and not yet released, and groups are trained strictly in the order of
their admission. A group admitted under version v is then trained at version v + max_staleness at the latest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
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


@dataclass(kw_only=True)
class _Admitted:
    group_id: int
    prompt: Prompt
    task: asyncio.Task[RolloutGroup]


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
        self._backlog: deque[Prompt] = deque()

    def start(self, backlog: list[Prompt] | None = None) -> None:
        """Admits groups up to the capacity.

        Args:
            backlog: Prompts that an interrupted run had admitted and not trained; they come first.
        """
        self._backlog.extend(backlog or [])
        self._admit()

    async def take(self, count: int) -> TakenGroups:
        """Waits for the oldest ``count`` groups that pass the filter. Errors of a rollout propagate.

        A cancelled call loses nothing: the groups it had seen go back to the head of the queue.
        """
        taken: list[_Admitted] = []
        dropped: list[RolloutGroup] = []
        try:
            while len(taken) < count:
                head = self._queue[0]
                group = await asyncio.shield(head.task)
                self._queue.popleft()
                if self._keep_group(group):
                    taken.append(head)
                else:
                    dropped.append(group)
        except asyncio.CancelledError:
            self._queue.extendleft(reversed(taken))
            raise
        return TakenGroups(groups=[admitted.task.result() for admitted in taken], dropped=dropped)

    def release(self, count: int) -> None:
        """Lets ``count`` new groups in. Call it after the policy that was trained on them is published."""
        self._unreleased -= count
        assert self._unreleased >= 0, "more groups released than taken"
        self._admit()

    def pending_prompts(self) -> list[Prompt]:
        """Prompts admitted and not yet taken, in order: what a resumed run must roll out first."""
        return [admitted.prompt for admitted in self._queue] + list(self._backlog)

    async def stop(self) -> None:
        """Cancels everything in flight."""
        tasks = [admitted.task for admitted in self._queue]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._queue.clear()

    def _admit(self) -> None:
        while self._unreleased < self._capacity:
            prompt = self._backlog.popleft() if self._backlog else self._next_prompt()
            task = asyncio.create_task(self._run(self._next_group_id, prompt))
            self._queue.append(_Admitted(group_id=self._next_group_id, prompt=prompt, task=task))
            self._next_group_id += 1
            self._unreleased += 1

    async def _run(self, group_id: int, prompt: Prompt) -> RolloutGroup:
        group = await self._run_group(group_id, prompt)
        if not self._keep_group(group):  # refill now, not when the queue reaches this group
            self._unreleased -= 1
            self._admit()
        return group
