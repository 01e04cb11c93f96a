"""A clock that never waits: an asyncio event loop that jumps to its next timer as soon as nothing else is to do."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualEventLoop(asyncio.SelectorEventLoop):
    """An event loop for programs that talk to nothing outside of it.

    What is due runs in the order of the real loop, so a program that draws its random numbers from seeds does
    exactly the same every time.
    """

    def __init__(self) -> None:
        self._now_seconds = 0.0
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_seconds

    def _jump(self, seconds: float) -> None:
        self._now_seconds += seconds


class _JumpingSelector(selectors.SelectSelector):
    """Returns at once, and puts the clock forward by the time it was to wait."""

    def __init__(self, jump: Any) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: every task waits for another, and no timer is set")
        self._jump(timeout)
        return []


def run_virtually(main: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run`` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualEventLoop) as runner:
        return runner.run(main)


class CpuMeter:
    """Tells the processor time of the driver's code from that of the simulation around it.

    What runs inside ``simulation()`` is the simulation's, all the rest of the process, its threads included, the
    driver's.
    """

    def __init__(self) -> None:
        self._began = time.process_time()
        self._simulation_seconds = 0.0

    @contextlib.contextmanager
    def simulation(self) -> Iterator[None]:
        """Not to be nested, and not to be awaited in."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._simulation_seconds += time.thread_time() - began

    @property
    def driver_seconds(self) -> float:
        """So far."""
        return time.process_time() - self._began - self._simulation_seconds
