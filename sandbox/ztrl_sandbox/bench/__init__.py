"""``ztrl-sandbox bench``: throughput, latency and truthfulness of an executor under load, through HTTP.

``loads`` says what is sent and what must come back, ``protocols`` how a server is asked, ``driver`` measures,
``floor`` measures what no executor can beat, ``command`` runs it all and prints.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from ztrl_sandbox.bench.loads import LOADS
from ztrl_sandbox.bench.protocols import PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--url", help="measure this server instead of starting one")
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), default="native")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the server that is started")
    parser.add_argument("--preload", default="math,sympy,numpy", help="of the server that is started")
    parser.add_argument("--isolation", default="auto", help="tier of the server that is started")
    parser.add_argument("--load", nargs="+", choices=list(LOADS), default=["trivial", "sympy", "mixed"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 256, 2048])
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of a row; each caller makes a call at least"
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    from ztrl_sandbox.bench.command import main  # aiohttp takes a fifth of a second to load

    return asyncio.run(main(arguments))
