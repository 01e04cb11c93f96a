"""Waiting for other tasks of an event loop by turns of it, which is the same on a machine of any speed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TURNS = 10_000


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until it is true. It must need nothing but them: no clock, file or process."""
    for _ in range(TURNS):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


async def settle() -> None:
    """Let the other tasks run until they would have done all that they can do, so that what they leave shows."""
    for _ in range(100):
        await asyncio.sleep(0)
