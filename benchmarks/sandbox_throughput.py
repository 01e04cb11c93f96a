"""Latency and throughput of one executor, through its HTTP client, on this machine.

Starts an executor with sympy preloaded and runs ``print(1 + 1)`` one at a time, then many at a time. Prints a
table; ``--json FILE`` also writes the numbers.

    python benchmarks/sandbox_throughput.py --workers 2 --concurrency 1 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer


async def measure(client: ExecutorClient, code: str, concurrency: int, calls: int) -> dict[str, float]:
    """Run ``calls`` snippets, ``concurrency`` at a time. Milliseconds, and calls per second."""
    latencies_ms: list[float] = []
    remaining = iter(range(calls))

    async def caller() -> None:
        for _ in remaining:
            started_at = time.perf_counter()
            result = await client.execute(code, run_timeout_seconds=10.0)
            latencies_ms.append(1e3 * (time.perf_counter() - started_at))
            if result.status != "ok":
                raise RuntimeError(f"a snippet ended with {result.status}: {result.stderr}{result.message}")

    started_at = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    elapsed_seconds = time.perf_counter() - started_at
    cuts = statistics.quantiles(latencies_ms, n=20)
    return {
        "concurrency": concurrency,
        "calls": calls,
        "p05_ms": cuts[0],
        "median_ms": cuts[9],
        "p95_ms": cuts[18],
        "calls_per_second": calls / elapsed_seconds,
    }


def cpu_ms(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--preload", default="math,sympy")
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--code", default="print(1 + 1)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server = ExecutorServer(
        workers=arguments.workers, preload=arguments.preload.split(","), isolation=arguments.isolation
    )
    rows = []
    async with server, ExecutorClient(server.url) as client:
        await measure(client, arguments.code, 1, 20)
        print("concurrency   p05 ms  median ms   p95 ms  calls/s  server CPU ms")
        for concurrency in arguments.concurrency:
            server_cpu_ms = cpu_ms(server.pid)
            row = await measure(client, arguments.code, concurrency, arguments.calls)
            row["server_cpu_ms_per_call"] = (cpu_ms(server.pid) - server_cpu_ms) / arguments.calls
            rows.append(row)
            print(
                f"{concurrency:>11} {row['p05_ms']:>8.1f} {row['median_ms']:>10.1f} {row['p95_ms']:>8.1f} "
                f"{row['calls_per_second']:>8.0f} {row['server_cpu_ms_per_call']:>14.2f}"
            )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"load_average": os.getloadavg()[0], "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    asyncio.run(main())
