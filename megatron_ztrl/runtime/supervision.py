"""Servers that die during a run are started again; one that keeps dying ends the run, or is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_ztrl.runtime.services import HostedServer, ServerDied, Started

STEADY_SECONDS = 600.0
"""A server that has served for so long dies of something new: its deaths are counted afresh."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0


class ServerKeepsDying(ServerDied):
    """A server died too often; the message has the end of its log."""


class Charge(Protocol):
    """A server under supervision."""

    name: str
    server: HostedServer
    max_restarts: int

    async def fails(self) -> str:
        """Returns why the server is to be replaced although its process lives, when it is; or never returns."""
        ...

    def went_down(self) -> None:
        """It serves no more."""
        ...

    def came_up(self, started: Started) -> None:
        """It serves again."""
        ...

    def give_up(self) -> bool:
        """It stays down. Returns whether the run can go on without it."""
        ...


class Supervisor:
    """Watches servers while its block runs; an error of a watcher ends the block, and is raised from it.

    A process that ends is noticed at once: the host on its node waits for it.

    Args:
        note: Tells the user.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._body = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        while True:
            try:
                await asyncio.sleep(
                    0
                )  # here arrives what `_ended` has sent to a block that awaited nothing since
                while self._tasks:
                    await asyncio.wait(self._tasks)
                break
            except asyncio.CancelledError:  # by a watcher that failed, or by the user
                if self._error is None:
                    raise
        if self._error is not None and (kind is None or issubclass(kind, asyncio.CancelledError)):
            assert self._body is not None
            self._body.uncancel()
            raise self._error

    def watch(self, charge: Charge, *, started: bool = True) -> asyncio.Task[None]:
        """Keeps a server running until the task is cancelled.

        Args:
            charge: The server.
            started: Whether it serves already.
        """
        return self.spawn(self._keep(charge, up=started))

    def spawn(self, watcher: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs something else beside the block."""
        task = asyncio.create_task(watcher)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self._error is None:
            self._error = error
            assert self._body is not None
            self._body.cancel()

    async def _keep(self, charge: Charge, up: bool) -> None:
        deaths = 0
        while True:
            if not up:
                began = time.monotonic()
                try:
                    charge.came_up(await charge.server.restart())
                    self._note(f"{charge.name} started in {time.monotonic() - began:.1f} s")
                    up = True
                except ServerDied as error:
                    reason = str(error)
            if up:
                began = time.monotonic()
                reason = await _first(charge.server.wait(), charge.fails())
                charge.went_down()
                up = False
                if time.monotonic() - began > STEADY_SECONDS:
                    deaths = 0
            deaths += 1
            if deaths > charge.max_restarts:
                problem = f"{charge.name} died {deaths} times in a row; the last time: {reason}"
                if not charge.give_up():
                    raise ServerKeepsDying(problem)
                self._note(f"{problem}\nThe run goes on without {charge.name}.")
                return
            self._note(f"{reason.splitlines()[0]}: {charge.name} starts again")
            await asyncio.sleep(_pause_seconds(deaths))


def _pause_seconds(deaths: int) -> float:
    """Before a server starts again: none after the first death, then ever longer."""
    return 0.0 if deaths == 1 else min(FIRST_PAUSE_SECONDS * 2.0 ** (deaths - 2), LONGEST_PAUSE_SECONDS)


async def _first(*reasons: Coroutine[Any, Any, str]) -> str:
    """What the first of them returns; the others are cancelled."""
    tasks = [asyncio.ensure_future(reason) for reason in reasons]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
