"""More or fewer engines while a run goes on: ``ztrl engines RUN --count N`` asks, the driver does it.

A resumed run has as many as were asked for last.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.runtime.processes import read_processes

REQUEST_FILE = "engines.request"
"""In the run directory; the driver takes it away when it has read it."""
COUNT_FILE = "engines.json"
"""In the run directory: what was asked for last, and ``engine.count`` at that time."""
POLL_SECONDS = 1.0


def request_engines(run_directory: Path, count: int) -> None:
    """Asks the driver of a run for so many engines.

    Raises:
        ValueError: No run is going on there, or it needs more.
    """
    if count < 1:
        raise ValueError(f"--count: a run needs at least one engine, got {count}")
    read_processes(run_directory)
    _write(run_directory / REQUEST_FILE, f"{count}\n")


def with_standing_count(config: Config, run_directory: Path) -> Config:
    """The configuration with as many engines as were asked for last, unless ``engine.count`` has changed since."""
    path = run_directory / COUNT_FILE
    if path.exists():
        asked = json.loads(path.read_text())
        if asked["configured"] == config.engine.count:
            return dataclasses.replace(
                config, engine=dataclasses.replace(config.engine, count=asked["count"])
            )
    return config


def forget_requests(run_directory: Path) -> None:
    """A run begins, in a directory where one has been that did not get far."""
    for name in (REQUEST_FILE, COUNT_FILE):
        (run_directory / name).unlink(missing_ok=True)


async def follow_requests(
    run_directory: Path, configured: int, scale: Callable[[int], Awaitable[None]], note: Callable[[str], None]
) -> None:
    """Does what is asked for, for ever.

    Args:
        run_directory: Where the requests are.
        configured: ``engine.count``, as the user gave it.
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
                count = int(text)
                await scale(count)
            except ValueError as error:
                note(f"{path}: {error}")
            else:
                _write(
                    run_directory / COUNT_FILE, json.dumps({"count": count, "configured": configured}) + "\n"
                )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)  # nobody ever reads half of it
