"""What an executor holds after 20,000 calls, compared with before, and how fast it recovers when parts are killed.

Every third call leaves something behind (daemons, files, descriptors, threads) or ends badly (endless loops,
memory bombs, crashes). Run it as root: others may not look into the workers.

    python benchmarks/sandbox_soak.py --calls 20000
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from ztrl_sandbox.bench.soak import Footprint, Soak, recoveries, server_cgroups, soak
from ztrl_sandbox.process import ExecutorServer
from ztrl_sandbox.proctree import descendants


async def measure(arguments: argparse.Namespace) -> tuple[Soak, dict[str, float], list[int]]:
    """The soak, the recoveries, and every process that the executor had at the end, itself first."""
    server = ExecutorServer(
        workers=arguments.workers, preload=["math", "sympy", "numpy"], isolation=arguments.isolation
    )
    async with server:
        result = await soak(server.url, server.pid, arguments.calls, arguments.concurrency)
        seconds = await recoveries(server.url, server.pid)
        return result, seconds, [server.pid, *descendants(server.pid)]


def report(result: Soak, seconds: dict[str, float]) -> None:
    """Print what was measured."""
    row = result.row
    print(f"{row.calls} calls, {row.calls_per_second:.0f}/s, wrong {row.wrong}, lost {row.lost}")
    for failure in row.failures:
        print(f"  {failure[:500]}")
    print(f"\n{'':16} {'before':>10} {'after':>10}")
    for field in dataclasses.fields(Footprint):
        before, after = (getattr(side, field.name) for side in (result.before, result.after))
        unit = 1 << 20 if field.name.endswith("_bytes") else 1
        print(f"{field.name.replace('_bytes', ', MiB'):16} {before / unit:>10.4g} {after / unit:>10.4g}")
    print("\nseconds to the next right answer after kill -9 of")
    for name, value in seconds.items():
        print(f"  {name:24} {value:.3f}")


def main() -> int:
    """Parse arguments, measure, print. The exit code is 1 when anything is left, wrong or lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result, seconds, family = asyncio.run(measure(arguments))
    report(result, seconds)
    processes = [pid for pid in family if Path(f"/proc/{pid}").exists()]
    cgroups = server_cgroups(family[0])
    print(f"\nafter the stop: {len(processes)} processes, {len(cgroups)} cgroups")
    if arguments.json:
        figures = {**dataclasses.asdict(result), "recovery_seconds": seconds}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    changed = result.before.countable != result.after.countable
    return int(bool(result.row.wrong or result.row.lost or changed or processes or cgroups))


if __name__ == "__main__":
    sys.exit(main())
