"""How the client tells the executor's failures from the snippet's, against a scripted HTTP server."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ztrl_sandbox
from aiohttp import web
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.protocol import ExecutionResult, Status


def run_against(answers: list[web.Response | str], **client_options) -> tuple[ExecutionResult, int, float]:
    """The client's result, how many requests it made, and how long it took (seconds)."""

    async def scenario() -> tuple[ExecutionResult, int, float]:
        seen = 0

        async def handle(request: web.Request) -> web.StreamResponse:
            nonlocal seen
            answer = answers[min(seen, len(answers) - 1)]
            seen += 1
            if answer == "hang up":
                request.transport.abort()
                return web.Response()
            return web.Response(
                status=answer.status,
                body=answer.body,
                headers=answer.headers,
                content_type="application/json",
            )

        app = web.Application()
        app.router.add_post("/v1/execute", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        started_at = time.monotonic()
        try:
            async with ExecutorClient(f"http://{host}:{port}", **client_options) as client:
                result = await client.execute("1", run_timeout_seconds=1.0)
            return result, seen, time.monotonic() - started_at
        finally:
            await runner.cleanup()

    return asyncio.run(scenario())


def answer(status: str, http_status: int = 200, **headers: str) -> web.Response:
    response = web.json_response({"status": status, "stdout": "out", "exit_code": 0}, status=http_status)
    response.headers.update(headers)
    del response.headers["Content-Type"]
    return response


def test_a_sandbox_error_is_retried_until_it_succeeds():
    result, requests, _ = run_against([answer("sandbox_error"), answer("sandbox_error"), answer("ok")])
    assert (result.status, result.stdout, requests) == (Status.OK, "out", 3)


def test_a_broken_connection_is_retried():
    result, requests, _ = run_against(["hang up", answer("ok")])
    assert (result.status, requests) == (Status.OK, 2)


def test_a_full_queue_is_retried_after_the_time_it_names():
    rejected = answer("rejected", 429, **{"Retry-After": "1"})
    result, requests, seconds = run_against([rejected, answer("ok")])
    assert (result.status, requests) == (Status.OK, 2)
    assert seconds >= 0.75  # 1 s less the jitter


@pytest.mark.parametrize("status", ["error", "timeout", "memory", "killed", "output_truncated"])
def test_the_snippets_own_failure_is_final(status):
    result, requests, _ = run_against([answer(status), answer("ok")])
    assert (result.status, requests) == (Status(status), 1)


@pytest.mark.parametrize("broken", [answer("sandbox_error"), answer("ok", 500), "hang up"])
def test_attempts_are_bounded_and_end_in_an_infrastructure_status(broken):
    result, requests, _ = run_against([broken], max_attempts=3)
    assert requests == 3
    assert result.status is Status.SANDBOX_ERROR


def test_a_queue_that_stays_full_ends_as_rejected():
    result, requests, _ = run_against([answer("rejected", 429)], max_attempts=2)
    assert (result.status, requests) == (Status.REJECTED, 2)


def test_an_executor_that_is_not_there_is_an_infrastructure_failure():
    async def scenario() -> ExecutionResult:
        async with ExecutorClient("http://127.0.0.1:9", max_attempts=2) as client:
            return await client.execute("1", run_timeout_seconds=1.0)

    assert asyncio.run(scenario()).status is Status.SANDBOX_ERROR


def test_refused_arguments_raise():
    with pytest.raises(ValueError, match="refuses the request"):
        run_against([answer("", 422)])


@pytest.mark.parametrize("module", ["zygote", "worker", "harness", "isolation", "client", "process", "pool"])
def test_a_module_loads_without_what_its_process_must_not_hold(module):
    forbidden = {"megatron_ztrl", "fastapi", "torch"} | (set() if module == "client" else {"aiohttp"})
    root = str(Path(ztrl_sandbox.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); import ztrl_sandbox.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not forbidden & set(loaded)
