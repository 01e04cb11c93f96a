"""``ztrl-sandbox serve | run FILE | bench | doctor``."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import sys
from pathlib import Path

from ztrl_sandbox import bench
from ztrl_sandbox.pool import PoolConfig, WorkerPool
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Limits, Status

_DEFAULT_LIMITS = Limits()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        return arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"ztrl-sandbox: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ztrl-sandbox", description="Runs model-written Python.")
    commands = parser.add_subparsers(required=True)
    pool = argparse.ArgumentParser(add_help=False)
    pool.add_argument("--workers", type=int, default=2, help="snippets that run at once")
    pool.add_argument("--preload", default="math,sympy", help="comma-separated modules")
    pool.add_argument("--isolation", default="auto", choices=["auto", "full", "user", "basic"])
    pool.add_argument("--queue-limit", type=int, default=4096, help="requests that may wait; more get 429")
    pool.add_argument("--memory-limit-bytes", type=int, default=_DEFAULT_LIMITS.memory_bytes)
    pool.add_argument("--output-limit-bytes", type=int, default=_DEFAULT_LIMITS.output_bytes)

    serve = commands.add_parser("serve", parents=[pool], help="serve HTTP; prints one JSON line when ready")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    serve.add_argument("--exit-with-parent", action="store_true", help="stop when the parent process ends")
    serve.set_defaults(command=_serve)

    run = commands.add_parser("run", parents=[pool], help="run one file; prints the result as JSON")
    run.add_argument("file", type=Path)
    run.add_argument("--run-timeout-seconds", type=float, default=20.0)
    run.add_argument("--print-last-expression", action="store_true")
    run.set_defaults(command=_run)

    measure = commands.add_parser("bench", help="throughput, latency and truthfulness under load")
    bench.add_arguments(measure)
    measure.set_defaults(command=bench.run)

    doctor = commands.add_parser("doctor", parents=[pool], help="what this machine can isolate")
    doctor.set_defaults(command=_doctor)
    return parser


def _pool_config(arguments: argparse.Namespace, workers: int | None = None) -> PoolConfig:
    return PoolConfig(
        workers=workers or arguments.workers,
        preload=[name for name in arguments.preload.split(",") if name],
        isolation=arguments.isolation,
        queue_limit=arguments.queue_limit,
        limits=Limits(memory_bytes=arguments.memory_limit_bytes, output_bytes=arguments.output_limit_bytes),
    )


def _serve(arguments: argparse.Namespace) -> int:
    from ztrl_sandbox.server import serve  # FastAPI takes most of a second to load

    config = _pool_config(arguments)
    asyncio.run(serve(arguments.host, arguments.port, config, exit_with_parent=arguments.exit_with_parent))
    return 0


async def _run_once(arguments: argparse.Namespace, request: ExecutionRequest) -> tuple[ExecutionResult, str]:
    """The result, and the isolation tier with its reason."""
    pool = WorkerPool(_pool_config(arguments, workers=1))
    await pool.start()
    try:
        return await pool.execute(request), f"{pool.isolation} ({pool.isolation_reason})"
    finally:
        await pool.stop()


def _run(arguments: argparse.Namespace) -> int:
    request = ExecutionRequest(
        code=arguments.file.read_text(),
        run_timeout_seconds=arguments.run_timeout_seconds,
        print_last_expression=arguments.print_last_expression,
    )
    result, isolation = asyncio.run(_run_once(arguments, request))
    print(json.dumps({"isolation": isolation, **dataclasses.asdict(result)}, indent=2))
    return 0 if result.status is Status.OK else 1


def _doctor(arguments: argparse.Namespace) -> int:
    probe = "import os; print(os.getuid(), sum(n.isdigit() for n in os.listdir('/proc')), os.getcwd())"
    result, isolation = asyncio.run(
        _run_once(arguments, ExecutionRequest(code=probe, run_timeout_seconds=10.0))
    )
    print(f"isolation  {isolation}")
    print(f"a snippet  {result.status} in {result.run_seconds * 1e3:.1f} ms {result.message}")
    if result.status is not Status.OK:
        return 1
    uid, visible_processes, directory = result.stdout.split()
    print(f"it sees    uid {uid}, {visible_processes} processes, working directory {directory}")
    return 0
