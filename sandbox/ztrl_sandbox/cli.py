"""``ztrl-sandbox serve | run FILE | bench | doctor | nginx-config URL...``."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path

from ztrl_sandbox import bench
from ztrl_sandbox.pool import TIERS, PoolConfig, WorkerPool
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Limits, Status
from ztrl_sandbox.sessions import SessionConfig

_LIMITS = Limits()
_POOL = PoolConfig()
_SESSIONS = SessionConfig()


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
    _add_pool_options(pool)

    serve = commands.add_parser(
        "serve",
        parents=[pool],
        help="serve HTTP; prints one JSON line when ready",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_server_options(serve)
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

    nginx = commands.add_parser("nginx-config", help="an nginx configuration in front of many executors")
    nginx.add_argument("urls", nargs="+", metavar="URL", help="http://host:port of an executor")
    nginx.add_argument("--listen", default="127.0.0.1:8000", help="address and port of nginx")
    nginx.set_defaults(command=_nginx_config)
    return parser


def _add_pool_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", type=int, default=_POOL.workers, help="snippets that run at once")
    add(
        "--preload",
        default=",".join(_POOL.preload),
        help="modules that snippets find imported, comma-separated",
    )
    add("--isolation", default="auto", choices=["auto", *TIERS], help="tier to use; auto is the strongest")
    add("--min-isolation", default=_POOL.min_isolation, choices=TIERS, help="do not start below this tier")
    add("--queue-limit", type=int, default=_POOL.queue_limit, help="requests that may wait; more get 429")
    add(
        "--recycle-after", type=int, default=_POOL.recycle_after, help="executions, then a worker is replaced"
    )
    add("--memory-limit-bytes", type=int, default=_LIMITS.memory_bytes, help="memory of a snippet")
    add("--output-limit-bytes", type=int, default=_LIMITS.output_bytes, help="kept of stdout and of stderr")
    add("--scratch-bytes", type=int, default=_LIMITS.scratch_bytes, help="files of a snippet (not in basic)")
    add("--process-limit", type=int, default=_LIMITS.processes, help="processes and threads of a snippet")


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; not loopback only with a token")
    add("--port", type=int, default=8080, help="0 takes a free one")
    add(
        "--token-file",
        type=Path,
        help="file with the bearer token that callers must send; else the environment's ZTRL_SANDBOX_TOKEN",
    )
    add("--max-sessions", type=int, default=_SESSIONS.max_sessions, help="open at once; then the idlest goes")
    add(
        "--session-ttl-seconds", type=float, default=_SESSIONS.ttl_seconds, help="unused for so long, it ends"
    )
    add("--session-max-calls", type=int, default=_SESSIONS.max_calls, help="calls of one session")
    add(
        "--session-max-run-seconds",
        type=float,
        default=_SESSIONS.max_run_seconds,
        help="run time of one session",
    )
    add("--exit-with-parent", action="store_true", help="stop when the parent process ends")


def _pool_config(arguments: argparse.Namespace, workers: int | None = None) -> PoolConfig:
    return PoolConfig(
        workers=workers or arguments.workers,
        preload=[name for name in arguments.preload.split(",") if name],
        isolation=arguments.isolation,
        min_isolation=arguments.min_isolation,
        queue_limit=arguments.queue_limit,
        recycle_after=arguments.recycle_after,
        limits=Limits(
            memory_bytes=arguments.memory_limit_bytes,
            output_bytes=arguments.output_limit_bytes,
            scratch_bytes=arguments.scratch_bytes,
            processes=arguments.process_limit,
        ),
    )


def _serve(arguments: argparse.Namespace) -> int:
    from ztrl_sandbox.auth import load_token
    from ztrl_sandbox.server import serve  # FastAPI takes most of a second to load

    session_config = SessionConfig(
        max_sessions=arguments.max_sessions,
        ttl_seconds=arguments.session_ttl_seconds,
        max_calls=arguments.session_max_calls,
        max_run_seconds=arguments.session_max_run_seconds,
    )
    asyncio.run(
        serve(
            arguments.host,
            arguments.port,
            _pool_config(arguments),
            session_config,
            token=load_token(arguments.token_file),
            exit_with_parent=arguments.exit_with_parent,
        )
    )
    return 0


async def _run_once(
    arguments: argparse.Namespace, request: ExecutionRequest
) -> tuple[ExecutionResult, WorkerPool]:
    """The result, and the stopped pool that it came from."""
    pool = WorkerPool(_pool_config(arguments, workers=1))
    await pool.start()
    try:
        return await pool.execute(request), pool
    finally:
        await pool.stop()


def _run(arguments: argparse.Namespace) -> int:
    request = ExecutionRequest(
        code=arguments.file.read_text(),
        run_timeout_seconds=arguments.run_timeout_seconds,
        print_last_expression=arguments.print_last_expression,
    )
    from ztrl_sandbox.schemas import native_shape  # pydantic takes a moment to load

    result, pool = asyncio.run(_run_once(arguments, request))
    isolation = {
        "isolation": pool.tier.name,
        "isolation_reason": pool.tier.reason,
        "isolation_layers": pool.isolation_layers,
    }
    print(json.dumps({**isolation, **native_shape(result)}, indent=2))
    return 0 if result.status is Status.OK else 1


def _doctor(arguments: argparse.Namespace) -> int:
    probe = "import os; print(os.getuid(), sum(n.isdigit() for n in os.listdir('/proc')), os.getcwd())"
    result, pool = asyncio.run(_run_once(arguments, ExecutionRequest(code=probe, run_timeout_seconds=10.0)))
    print(f"isolation  {pool.tier.name} ({pool.tier.reason})")
    for layer in pool.isolation_layers:
        print(f"           + {layer}")
    print(f"a snippet  {result.status} in {result.run_seconds * 1e3:.1f} ms {result.message}")
    if result.status is not Status.OK:
        return 1
    uid, visible_processes, directory = result.stdout.split()
    print(f"it sees    uid {uid}, {visible_processes} processes, working directory {directory}")
    return 0


def _nginx_config(arguments: argparse.Namespace) -> int:
    from ztrl_sandbox.nginx import nginx_config  # aiohttp takes a moment to load

    print(nginx_config(arguments.urls, listen=arguments.listen), end="")
    return 0
