"""Wall time of one step, by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PhaseClock:
    """Starts with the step; each phase adds to its own total."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times one phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self, name: str) -> float:
        """Total of one phase so far."""
        return self._seconds.get(name, 0.0)

    def step_seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._started

    def other_seconds(self) -> float:
        """Time of the step outside every phase: the driver's own work."""
        return self.step_seconds() - sum(self._seconds.values())
