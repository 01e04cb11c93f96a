"""Ctrl-C and SIGTERM: once ends the run at the next safe point, twice at once. Neither leaves a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the user asked the run to stop.

    Args:
        note: Tells the user what is happening.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.event = asyncio.Event()
        """Set by the first signal. The loop looks at it between its phases."""
        self.loop_is_running = False
        """While it is False (start, teardown) there is nothing to save, and a signal stops at once."""
        self._note = note
        self._task = asyncio.current_task()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._handle)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _handle(self) -> None:
        if self.loop_is_running and not self.event.is_set():
            self._note("stopping after the current phase and saving (interrupt again to stop at once)")
            self.event.set()
        else:
            self._note("stopping at once; the last saved checkpoint stays")
            assert self._task is not None
            self._task.cancel()


async def unless_stopped(stop: asyncio.Event, work: Awaitable[_T]) -> _T | None:
    """What ``work`` returns; None when ``stop`` is set already, or before the end: the work is cancelled then."""
    working = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        if stop.is_set():
            return None
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        stopped.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
