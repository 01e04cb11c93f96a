"""More or fewer engines while a run goes on: ``ztrl engines RUN --count N`` asks, the driver does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_ztrl.runtime.processes import read_processes

REQUEST_FILE = "engines.request"
"""In the run directory; the driver takes it away when it has read it."""
POLL_SECONDS = 1.0


def request_engines(run_directory: Path, count: int) -> None:
    """Asks the driver of a run for so many engines.

    Raises:
        ValueError: No run is going on there.
    """
    read_processes(run_directory)
    temporary = run_directory / f"{REQUEST_FILE}.tmp"
    temporary.write_text(f"{count}\n")
    os.replace(temporary, run_directory / REQUEST_FILE)  # the driver never reads half of it


async def follow_requests(
    run_directory: Path, scale: Callable[[int], Awaitable[None]], note: Callable[[str], None]
) -> None:
    """Does what is asked for, for ever.

    Args:
        run_directory: Where the requests are.
        scale: Makes it so many engines.
        note: Tells the user what is wrong with a request.
    """
    path = run_directory / REQUEST_FILE
    path.unlink(missing_ok=True)  # to a driver that was killed
    while True:
        await asyncio.sleep(POLL_SECONDS)
        if path.exists():
            text = path.read_text().strip()
            path.unlink()
            try:
                await scale(int(text))
            except ValueError as error:
                note(f"{path}: {error}")
