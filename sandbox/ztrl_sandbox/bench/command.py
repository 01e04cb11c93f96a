"""Starts or finds a server, runs every row, prints them beside the targets."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from ztrl_sandbox.bench.driver import Driver, Row
from ztrl_sandbox.bench.floor import forks_per_second
from ztrl_sandbox.bench.protocols import PROTOCOLS
from ztrl_sandbox.process import TOKEN_VARIABLE, ExecutorServer

_FLOOR_SECONDS = 1.0
_KEEP_ALIVE_SECONDS = 2.0
"""Shorter than any server's (uvicorn closes after 5 s): a request must not meet the end of its connection."""
_BUSY_CONCURRENCY = 32
"""From here on throughput is what counts, below it latency."""
_MIN_CALLS_PER_SECOND = 150.0
_MAX_CALL_P50_MS = 10.0
_MIN_FLOOR_MULTIPLE = 0.5

_TABLE_HEAD = """\
                              queue ms         run ms        whole call ms               CPU ms per call   bare
load     callers  calls/s    p50     p99    p50    p99      p50     p99  wrong lost  client  HTTP   all  forks/s"""


async def main(arguments: argparse.Namespace) -> int:
    """Measure and print. The exit code is 1 when a call was answered wrongly or lost."""
    preload = [name for name in arguments.preload.split(",") if name]
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        url, pid = arguments.url, None
        if url is None:
            server = ExecutorServer(workers=arguments.workers, preload=preload, isolation=arguments.isolation)
            await stack.enter_async_context(server)
            url, pid = server.url, server.pid
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, headers=headers))
        setting = {"machine": _machine(), "server": await _describe(session, url)}
        for name, text in setting.items():
            print(f"{name:8} {text}")
        driver = Driver(session, url, PROTOCOLS[arguments.protocol], pid)
        await driver.warm_up(arguments.load)
        print(f"\n{_TABLE_HEAD}", flush=True)
        for load in arguments.load:
            for concurrency in arguments.concurrency:
                beside_floor = pid is not None and load == "trivial" and concurrency >= _BUSY_CONCURRENCY
                # Right before and after: other tenants of the machine come and go within a minute.
                floors = [_floor(preload, arguments.workers)] if beside_floor else []
                row = await driver.measure(load, concurrency, seconds=arguments.seconds)
                if beside_floor:
                    floors.append(_floor(preload, arguments.workers))
                    row = dataclasses.replace(row, forks_per_second=sum(floors) / len(floors))
                rows.append(row)
                _print_row(row)
    _print_verdicts(rows)
    if arguments.json is not None:
        result = {**setting, "rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row.wrong or row.lost for row in rows))


def _floor(preload: list[str], workers: int) -> float:
    return forks_per_second(preload, forkers=workers, seconds=_FLOOR_SECONDS)


def _machine() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}"
    return f"{cores}, Linux {platform.release()}, load average {os.getloadavg()[0]:.2f}"


async def _describe(session: aiohttp.ClientSession, url: str) -> str:
    """What the server says of itself in ``/health``, as far as it is one of ours."""
    async with session.get(f"{url}/health") as response:
        ours = response.status == 200 and response.content_type == "application/json"
        health: Any = await response.json() if ours else None
    if not isinstance(health, dict) or "isolation" not in health:
        return f"at {url}, of another make"
    layers = health.get("isolation_layers") or []
    return (
        f"Python {health['python']}, tier {health['isolation']} ({health['isolation_reason']}), "
        f"layers {', '.join(layers) or '-'}, {health['workers']} workers, preload {','.join(health['preload'])}"
    )


def _number(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None or math.isnan(value) else f"{value:>{width}.{digits}f}"


def _print_row(row: Row) -> None:
    print(
        f"{row.load:8} {row.concurrency:>7} {row.calls_per_second:>8.1f} "
        f"{_number(row.queue_p50_ms, 6)} {_number(row.queue_p99_ms, 7)} "
        f"{_number(row.run_p50_ms, 6)} {_number(row.run_p99_ms, 6)} "
        f"{_number(row.call_p50_ms, 8)} {_number(row.call_p99_ms, 7)} {row.wrong:>6} {row.lost:>4} "
        f"{_number(row.client_cpu_ms_per_call, 7, 2)} {_number(row.server_cpu_ms_per_call, 5, 2)} "
        f"{_number(row.executor_cpu_ms_per_call, 5, 2)} {_number(row.forks_per_second, 8)}",
        flush=True,
    )
    for failure in row.failures:
        print(f"  {failure[:500]}", flush=True)


def _print_verdicts(rows: list[Row]) -> None:
    """The figures that have a target, each from its worst row."""
    print()
    busy_rows = [row for row in rows if row.load == "trivial" and row.concurrency >= _BUSY_CONCURRENCY]
    busy = [row.calls_per_second for row in busy_rows]
    multiples = [row.calls_per_second / row.forks_per_second for row in busy_rows if row.forks_per_second]
    alone = [row.call_p50_ms for row in rows if row.load == "trivial" and row.concurrency == 1]
    if busy:
        _verdict("trivial calls/s from 32 callers on", min(busy), ">=", _MIN_CALLS_PER_SECOND)
    if alone:
        _verdict("trivial p50 of one caller, ms", max(alone), "<=", _MAX_CALL_P50_MS)
    if multiples:
        _verdict("the same, times bare fork + exit", min(multiples), ">=", _MIN_FLOOR_MULTIPLE)
    _verdict("wrong statuses or outputs", sum(row.wrong for row in rows), "<=", 0)
    _verdict("lost calls", sum(row.lost for row in rows), "<=", 0)


def _verdict(what: str, value: float, relation: str, target: float) -> None:
    met = value >= target if relation == ">=" else value <= target
    digits = 0 if isinstance(value, int) else 2
    print(f"{what:40} {value:8.{digits}f}   target {relation} {target:g}: {'met' if met else 'MISSED'}")
