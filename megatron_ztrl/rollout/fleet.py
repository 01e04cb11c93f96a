"""The engines of a run, which may come and go, and which of them a rollout uses.

No sglang-router stands in front of them: the driver knows which engine has a rollout's prefix cached, which a
router would have to guess anew from the tokens of every call, and a publish pauses each engine by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ztrl.engines.client import EngineUnreachable
from megatron_ztrl.rollout.trajectory import Engine
from megatron_ztrl.types import Completion, FinishReason

NO_TOKENS = Completion(
    token_ids=[],
    logprobs=[],
    finish_reason=FinishReason.ABORT,
    matched_stop=None,
    version_spans=[],
    cached_tokens=0,
)
"""What a call returns whose engine went away: the rollout goes on where it was."""


@dataclass(eq=False, kw_only=True)
class _Member:
    """One engine, and what the fleet knows about it."""

    engine: Engine
    open: bool = True
    """Rollouts may call it."""
    rollouts: int = 0
    """That are seated here, whether they generate or wait for a tool."""
    calls: set[asyncio.Timeout] = field(default_factory=set)
    """That it has not answered; a timeout that is moved to now ends its call."""
    quiet: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when its last call has ended."""

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[asyncio.Timeout]:
        """Around one call."""
        self.quiet.clear()
        async with asyncio.timeout(None) as call:
            self.calls.add(call)
            try:
                yield call
            finally:
                self.calls.discard(call)
                if not self.calls:
                    self.quiet.set()


_Ticket = tuple[bool, int]
"""Whether others go first, and when it came."""


@dataclass(order=True)
class _Waiter:
    ticket: _Ticket
    seated: asyncio.Future[_Member] = field(compare=False)


class EngineFleet:
    """Assigns each rollout to the engine with the fewest; a rollout stays there, where its prefix is cached.

    A rollout whose engine is removed, or cannot be reached, moves to another, or waits until there is one. It
    notices nothing but a call that was interrupted with no tokens. What a dead engine had sampled and not yet
    returned was never part of a rollout: it is sampled again.

    Args:
        engines: One client per server.
        max_concurrent_per_engine: Rollouts that one engine has at a time. More wait here, not in its queue, and
            the one that came first is seated first, even if it loses its engine meanwhile; urgent ones before all
            others.
        on_unreachable: Told of an engine that the fleet removed because a call found nobody there; it may add
            it again. Without it an error that leaves no engine is raised to the rollout.
    """

    def __init__(
        self,
        engines: Sequence[Engine] = (),
        *,
        max_concurrent_per_engine: int,
        on_unreachable: Callable[[Engine], None] | None = None,
    ) -> None:
        self._max_concurrent_per_engine = max_concurrent_per_engine
        self._on_unreachable = on_unreachable
        self._members: dict[Engine, _Member] = {}
        self._waiting: list[_Waiter] = []
        self._tickets = itertools.count()
        for engine in engines:
            self.add(engine)

    @property
    def engines(self) -> list[Engine]:
        """Those that rollouts may call."""
        return [member.engine for member in self._members.values() if member.open]

    @property
    def capacity(self) -> int:
        """Rollouts that have a place at once."""
        return len(self.engines) * self._max_concurrent_per_engine

    def load(self, engine: Engine) -> int:
        """Rollouts that an engine has."""
        return self._members[engine].rollouts

    def add(self, engine: Engine) -> None:
        """Lets rollouts use ``engine``; it must have the weights that the others have."""
        self._members.setdefault(engine, _Member(engine=engine)).open = True
        self._seat_waiters()

    def remove(self, engine: Engine) -> None:
        """No call begins on ``engine`` any more; those that it has go on. Its rollouts move at their next call."""
        member = self._members.get(engine)
        if member is not None:
            member.open = False
            self._forget_if_empty(member)

    async def drain(self, engine: Engine) -> None:
        """Removes ``engine``, and returns when its last call has ended."""
        self.remove(engine)
        member = self._members.get(engine)
        if member is not None and member.calls:
            await member.quiet.wait()

    def abandon(self, engine: Engine) -> None:
        """Removes ``engine``, which is dead: nobody waits for its answers any more."""
        self.remove(engine)
        member = self._members.get(engine)
        if member is not None:
            while member.calls:
                member.calls.pop().reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def engine(self, *, urgent: bool = False) -> AsyncIterator[Engine]:
        """The engine of one rollout, whichever that is from call to call."""
        seat = _Seat(self, (not urgent, next(self._tickets)))
        await seat.take()
        try:
            yield seat
        finally:
            seat.leave()

    async def take_place(self, ticket: _Ticket) -> _Member:
        """A place on the engine with the fewest rollouts; of those that wait, the lowest ticket has it first."""
        member = self._least_loaded()  # nobody waits while a place is free
        if member is not None:
            member.rollouts += 1
            return member
        waiter = _Waiter(ticket, asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, waiter)
        try:
            return await waiter.seated
        except asyncio.CancelledError:
            if waiter.seated.done() and not waiter.seated.cancelled():  # given at the very moment
                self.leave_place(waiter.seated.result())
            raise

    def leave_place(self, member: _Member) -> None:
        """The next one may have it."""
        member.rollouts -= 1
        self._forget_if_empty(member)
        self._seat_waiters()

    def unreachable(self, member: _Member, error: EngineUnreachable) -> None:
        """A call found nobody there."""
        if member.open:
            self.remove(member.engine)
            if self._on_unreachable is not None:
                self._on_unreachable(member.engine)
        if self._on_unreachable is None and not self.engines:
            raise error

    def _least_loaded(self) -> _Member | None:
        free = [
            member
            for member in self._members.values()
            if member.open and member.rollouts < self._max_concurrent_per_engine
        ]
        return min(free, key=lambda member: member.rollouts, default=None)

    def _seat_waiters(self) -> None:
        while self._waiting and (member := self._least_loaded()) is not None:
            waiter = heapq.heappop(self._waiting)
            if not waiter.seated.done():  # else its rollout was cancelled
                member.rollouts += 1
                waiter.seated.set_result(member)

    def _forget_if_empty(self, member: _Member) -> None:
        if not member.open and not member.rollouts:
            self._members.pop(member.engine, None)


class _Seat:
    """One rollout's engine, as `run_rollout` sees it."""

    def __init__(self, fleet: EngineFleet, ticket: _Ticket) -> None:
        self._fleet = fleet
        self._ticket = ticket
        self._member: _Member | None = None
        """None while it waits for a place."""

    async def take(self) -> None:
        self._member = await self._fleet.take_place(self._ticket)

    def leave(self) -> None:
        if self._member is not None:
            member, self._member = self._member, None
            self._fleet.leave_place(member)

    async def generate(self, input_ids: Sequence[int], **request: Any) -> Completion:
        """`Engine.generate` of the engine; where no answer will come, an interruption without tokens."""
        member = self._member
        assert member is not None
        if member.open:
            try:
                async with member.call() as call:
                    return await member.engine.generate(input_ids, **request)
            except EngineUnreachable as error:
                self._fleet.unreachable(member, error)
            except TimeoutError:
                if not call.expired():  # not the fleet's doing
                    raise
        self.leave()
        await self.take()
        return NO_TOKENS
