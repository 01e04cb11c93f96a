"""Sends a load to a server and measures what comes back."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from ztrl_sandbox.bench.loads import Snippet, snippets
from ztrl_sandbox.bench.protocols import Answer, Protocol
from ztrl_sandbox.proctree import descendants

_ANSWER_TIMEOUT_SECONDS = 300.0
"""Longest wait for one answer beyond the snippet's own time-out; after it the call counts as lost."""
_WARM_UP_CALLS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One load at one concurrency.

    A call whose answer is not the expected one is *wrong*. One without an answer, or whose answer says nothing
    about the snippet (rejected, a failure of the executor), is *lost*; the latencies are of the others.
    """

    load: str
    concurrency: int
    calls: int
    calls_per_second: float
    """Answered ones."""
    queue_p50_ms: float | None
    """None, here and below: this server does not tell."""
    queue_p99_ms: float | None
    run_p50_ms: float
    run_p99_ms: float
    call_p50_ms: float
    """From before the request is written until the answer is parsed."""
    call_p99_ms: float
    wrong: int
    lost: int
    client_cpu_ms_per_call: float
    server_cpu_ms_per_call: float | None
    """Of the HTTP process."""
    executor_cpu_ms_per_call: float | None
    """Of the HTTP process, the zygote, the workers and the snippets together."""
    forks_per_second: float | None = None
    """The floor, measured right before and after the row."""
    failures: list[str]
    """The first call of each kind of answer that was wrong, and the first that was lost."""


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else float("nan")


class _Tally:
    """The answers of one row."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self.call_ms: list[float] = []
        self.run_ms: list[float] = []
        self.queue_ms: list[float] = []
        self.wrong = 0
        self.lost = 0
        self.failures: dict[tuple[str, str], str] = {}
        """Expected and actual status → the first such call."""

    def add(self, snippet: Snippet, answer: Answer, call_seconds: float) -> None:
        self.call_ms.append(1e3 * call_seconds)
        self.run_ms.append(1e3 * answer.run_seconds)
        if answer.queue_seconds is not None:
            self.queue_ms.append(1e3 * answer.queue_seconds)
        if not self._protocol.is_right(snippet, answer):
            self.wrong += 1
            self.failures.setdefault((snippet.status, answer.status), f"{snippet.code!r} gave {answer}")

    def add_lost(self, failure: str) -> None:
        self.lost += 1
        self.failures.setdefault(("lost", "lost"), failure)


class Driver:
    """Calls one server through one HTTP session.

    Args:
        session: Without a limit on its connections.
        url: ``http://host:port``.
        protocol: The server's.
        pid: The server's process, if it is on this machine: its CPU time is then measured too.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, protocol: Protocol, pid: int | None) -> None:
        self._session = session
        self._url = url + protocol.path
        self._protocol = protocol
        self._pid = pid

    async def warm_up(self, loads: Sequence[str]) -> None:
        """Run a few of each load, uncounted."""
        for load in loads:
            tally = _Tally(self._protocol)
            for snippet, _ in zip(snippets(load), range(_WARM_UP_CALLS), strict=False):
                await self._call(snippet, tally)

    async def measure(self, load: str, concurrency: int, *, seconds: float = 0.0, calls: int = 0) -> Row:
        """Keep ``concurrency`` calls open for ``seconds`` and ``calls``; each caller makes at least one."""
        tally = _Tally(self._protocol)
        source = snippets(load)
        sent = 0
        cpu_before = self._cpu_seconds()
        started_at = time.perf_counter()

        async def caller() -> None:
            nonlocal sent
            for snippet in source:
                sent += 1
                await self._call(snippet, tally)
                if sent >= calls and time.perf_counter() - started_at >= seconds:
                    return

        await asyncio.gather(*(caller() for _ in range(concurrency)))
        elapsed_seconds = time.perf_counter() - started_at
        client_ms, *server_ms = (
            1e3 * (after - before) / sent
            for before, after in zip(cpu_before, self._cpu_seconds(), strict=True)
        )
        return Row(
            load=load,
            concurrency=concurrency,
            calls=sent,
            calls_per_second=len(tally.call_ms) / elapsed_seconds,
            queue_p50_ms=percentile(tally.queue_ms, 50) if tally.queue_ms else None,
            queue_p99_ms=percentile(tally.queue_ms, 99) if tally.queue_ms else None,
            run_p50_ms=percentile(tally.run_ms, 50),
            run_p99_ms=percentile(tally.run_ms, 99),
            call_p50_ms=percentile(tally.call_ms, 50),
            call_p99_ms=percentile(tally.call_ms, 99),
            wrong=tally.wrong,
            lost=tally.lost,
            client_cpu_ms_per_call=client_ms,
            server_cpu_ms_per_call=server_ms[0] if server_ms else None,
            executor_cpu_ms_per_call=server_ms[1] if server_ms else None,
            failures=list(tally.failures.values()),
        )

    async def _call(self, snippet: Snippet, tally: _Tally) -> None:
        body = json.dumps(self._protocol.body(snippet)).encode()
        timeout = aiohttp.ClientTimeout(total=snippet.run_timeout_seconds + _ANSWER_TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json"}
        sent_at = time.perf_counter()
        try:
            async with self._session.post(self._url, data=body, headers=headers, timeout=timeout) as response:
                payload = await response.read()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            tally.add_lost(f"{type(error).__name__}: {error}")
            return
        answer = self._protocol.parse(json.loads(payload)) if response.status == 200 else None
        if answer is None:
            tally.add_lost(f"HTTP {response.status}: {payload[:300].decode(errors='replace')}")
        else:
            tally.add(snippet, answer, time.perf_counter() - sent_at)

    def _cpu_seconds(self) -> list[float]:
        """So far: of this process and, if its pid is known, of the HTTP process and of the whole executor."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = [usage.ru_utime + usage.ru_stime]
        if self._pid is not None:
            fields = {pid: _time_fields(pid) for pid in (self._pid, *descendants(self._pid))}
            spent.append(sum(fields[self._pid][:2]) / os.sysconf("SC_CLK_TCK"))
            spent.append(sum(map(sum, fields.values())) / os.sysconf("SC_CLK_TCK"))
        return spent


def _time_fields(pid: int) -> list[int]:
    """Clock ticks of a process in user and system mode, then those of its reaped children."""
    try:
        return list(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    except (FileNotFoundError, ProcessLookupError):
        return []  # a snippet that has just ended; its worker's fields include it
