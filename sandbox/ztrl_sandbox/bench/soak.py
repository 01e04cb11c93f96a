"""Whether an executor is after many calls what it was after few: processes, descriptors, mounts, files, memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ztrl_sandbox.bench.driver import Driver, Row
from ztrl_sandbox.bench.protocols import PROTOCOLS
from ztrl_sandbox.proctree import children, descendants, resident_bytes

_WARM_UP_CALLS = 200
"""Allocators and caches have their size after these."""
_SETTLE_SECONDS = 10.0
_POLL_SECONDS = 0.02
_RECOVERY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What an idle executor holds. Reading it takes root, or an executor of one's own in the basic tier."""

    processes: int
    """The server and everything below it."""
    descriptors: int
    """Of the server, the zygote and the workers."""
    mounts: int
    """As these see them."""
    files: int
    """In and below the snippets' directories."""
    cgroups: int
    """Made by the server."""
    server_bytes: int
    """Resident set; the next two are without what the snippets waiting for code share with them."""
    zygote_bytes: int
    workers_bytes: int

    @property
    def countable(self) -> tuple[int, ...]:
        """Everything that must be exactly the same, whatever has run."""
        return self.processes, self.descriptors, self.mounts, self.files, self.cgroups


def footprint(pid: int, health: dict[str, Any]) -> Footprint:
    """Of the server with this pid; ``health`` is what it says of itself.

    Raises:
        FileNotFoundError: a process of it has just ended.
    """
    workers = health["worker_pids"]
    keepers = [pid, health["zygote_pid"], *workers]
    # A worker that has outlived its zygote is nobody's child any more.
    tree = {*keepers, *(below for keeper in keepers for below in descendants(keeper))}
    scratch = [Path(f"/proc/{snippet}/cwd/..") for worker in workers for snippet in children(worker)]
    return Footprint(
        processes=len(tree),
        descriptors=sum(len(os.listdir(f"/proc/{keeper}/fd")) for keeper in keepers),
        mounts=sum(len(Path(f"/proc/{keeper}/mountinfo").read_text().splitlines()) for keeper in keepers),
        files=sum(len(list(directory.rglob("*"))) for directory in scratch),
        cgroups=len(server_cgroups(pid)),
        server_bytes=resident_bytes(pid),
        zygote_bytes=resident_bytes(health["zygote_pid"]),
        workers_bytes=sum(map(resident_bytes, workers)),
    )


def server_cgroups(pid: int) -> list[Path]:
    """The cgroups that the server with this pid has made, whether it lives or not."""
    roots = Path("/sys/fs/cgroup").rglob(f"ztrl-sandbox-{pid}")
    return [path for root in roots for path in (root, *root.glob("slot-*"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """The executor before and after."""

    row: Row
    before: Footprint
    after: Footprint


async def soak(url: str, pid: int, calls: int, concurrency: int) -> Soak:
    """Make ``calls`` of the load ``soak``, after a warm-up, and compare."""
    await _load(url, pid, _WARM_UP_CALLS, concurrency)
    before = await _settled(url, pid)
    row = await _load(url, pid, calls, concurrency)
    return Soak(row=row, before=before, after=await _settled(url, pid, before))


async def _load(url: str, pid: int, calls: int, concurrency: int) -> Row:
    # A session for each: when it is closed, the server has no descriptor of ours.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        driver = Driver(session, url, PROTOCOLS["native"], pid)
        return await driver.measure("soak", concurrency, calls=calls)


async def _health(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
        return await response.json()


async def _settled(url: str, pid: int, wanted: Footprint | None = None) -> Footprint:
    """The footprint once every slot waits for code; if it does not come to ``wanted``'s, as it is then."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        health = await _health(url)
        await asyncio.sleep(_POLL_SECONDS)  # until the server has closed that connection
        try:
            now = footprint(pid, health)
        except FileNotFoundError:
            continue
        waiting = (
            len(health["worker_pids"]) == health["workers"] and now.processes == 2 + 2 * health["workers"]
        )
        if waiting and (wanted is None or now.countable == wanted.countable):
            return now
        if time.monotonic() > deadline:
            return now


async def recovery_seconds(url: str, pids: Sequence[int]) -> float:
    """Kill these processes; seconds until a call, tried again and again, has its right answer."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    started_at = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while True:
            body = {"code": "print(6 * 7)", "run_timeout_seconds": 10}
            async with session.post(f"{url}/v1/execute", json=body) as response:
                answer = json.loads(await response.read())
            elapsed_seconds = time.monotonic() - started_at
            if (answer["status"], answer["stdout"]) == ("ok", "42\n"):
                return elapsed_seconds
            if elapsed_seconds > _RECOVERY_SECONDS:
                raise RuntimeError(f"after {elapsed_seconds:.0f} s the executor still says {answer}")
            await asyncio.sleep(_POLL_SECONDS)


async def recoveries(url: str, pid: int) -> dict[str, float]:
    """Seconds to the next right answer after each kind of death."""
    deaths: dict[str, Callable[[dict[str, Any]], list[int]]] = {
        "one worker": lambda health: health["worker_pids"][:1],
        "every worker": lambda health: health["worker_pids"],
        "zygote": lambda health: [health["zygote_pid"]],
        "zygote and every worker": lambda health: [health["zygote_pid"], *health["worker_pids"]],
    }
    measured = {}
    for name, victims in deaths.items():
        await _settled(url, pid)
        measured[name] = await recovery_seconds(url, victims(await _health(url)))
    return measured
