"""The engines of a run, and which of them a rollout uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from megatron_ztrl.rollout.trajectory import Engine


class EngineFleet:
    """Assigns each rollout to the engine with the fewest; a rollout stays there, where its prefix is cached.

    Args:
        engines: One client per server.
        max_concurrent_per_engine: Rollouts beyond this wait here, not in the server's queue.
    """

    def __init__(self, engines: Sequence[Engine], *, max_concurrent_per_engine: int) -> None:
        self._load = dict.fromkeys(range(len(engines)), 0)
        self._engines = engines
        self._slots = asyncio.Semaphore(max_concurrent_per_engine * len(engines))

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """The engine of one rollout."""
        async with self._slots:
            index = min(self._load, key=self._load.__getitem__)
            self._load[index] += 1
            try:
                yield self._engines[index]
            finally:
                self._load[index] -= 1
