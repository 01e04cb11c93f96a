"""How the client tells the executor's failures from the snippet's, against a scripted HTTP server."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
import uvicorn
import ztrl_sandbox
from ztrl_sandbox import endpoint
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.endpoint import KEEPALIVE_SECONDS, pause_after
from ztrl_sandbox.protocol import Status

OK = {"status": "ok", "stdout": "out", "exit_code": 0, "a_newer_servers": "field"}
SANDBOX_ERROR = {"status": "sandbox_error", "message": "the worker died"}
FULL = (429, {"status": "rejected", "message": "queue full"}, {})
CREATED = {"session_id": "s/1", "ttl_seconds": 60}


@pytest.fixture
async def against(scripted):
    """An executor with a script and a client of it: ``executor, client = await against(step, ...)``."""
    clients = []

    async def start(*script, **options):
        executor = await scripted(*script)
        clients.append(ExecutorClient(executor.url, **options))
        return executor, clients[-1]

    yield start
    for client in clients:
        await client.close()


async def run(client, code="1", **options):
    return await client.execute(code, run_timeout_seconds=1.0, **options)


async def test_a_sandbox_error_is_retried_until_it_succeeds(against):
    executor, client = await against(SANDBOX_ERROR, SANDBOX_ERROR, OK)
    result = await run(client)
    assert (result.status, result.stdout, len(executor.requests)) == (Status.OK, "out", 3)


async def test_a_broken_connection_is_retried(against):
    executor, client = await against("hang up", OK)
    assert (await run(client)).status is Status.OK
    assert len(executor.requests) == 2


async def test_a_full_queue_is_retried_after_the_time_it_names(against):
    executor, client = await against((429, {"status": "rejected"}, {"Retry-After": "1"}), OK)
    started_at = time.monotonic()
    assert (await run(client)).status is Status.OK
    assert len(executor.requests) == 2
    assert time.monotonic() - started_at >= 0.75  # 1 s less the jitter


@pytest.mark.parametrize("status", ["error", "timeout", "memory", "killed", "output_truncated"])
async def test_the_snippets_own_failure_is_final(against, status):
    executor, client = await against({"status": status}, OK)
    assert (await run(client)).status is Status(status)
    assert len(executor.requests) == 1


@pytest.mark.parametrize(
    "broken", [SANDBOX_ERROR, (500, OK, {}), (302, OK, {"Location": "/"}), {}, {"status": "new"}, "hang up"]
)
async def test_attempts_are_bounded_and_end_in_an_infrastructure_status(against, broken):
    executor, client = await against(broken, max_attempts=2)
    assert (await run(client)).status is Status.SANDBOX_ERROR
    assert len(executor.requests) == (1 if broken == {"status": "new"} else 2)


async def test_a_queue_that_stays_full_ends_as_rejected(against):
    executor, client = await against(FULL, max_attempts=2)
    result = await run(client)
    assert (result.status, result.message, len(executor.requests)) == (Status.REJECTED, "queue full", 2)


@pytest.mark.parametrize("payload", [{"status": "rejected", "message": "too long"}, {"error": "a proxy's"}])
async def test_code_that_is_too_long_is_rejected_at_once(against, payload):
    executor, client = await against((413, payload, {}))
    assert (await run(client)).status is Status.REJECTED
    assert len(executor.requests) == 1


async def test_an_executor_that_is_not_there_is_an_infrastructure_failure():
    async with ExecutorClient("http://127.0.0.1:9", max_attempts=2) as client:
        assert (await run(client)).status is Status.SANDBOX_ERROR


@pytest.mark.parametrize(
    ("http_status", "message"),
    [(422, "refuses the request"), (401, "refuses the token"), (404, "no executor of this version")],
)
async def test_what_only_the_caller_can_mend_raises(against, http_status, message):
    executor, client = await against((http_status, {"detail": "x"}, {}))
    with pytest.raises(ValueError, match=message):
        await run(client)
    assert len(executor.requests) == 1


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="must start with http"):
        ExecutorClient("localhost:8080")


async def test_the_token_is_sent_only_when_there_is_one(against):
    executor, client = await against(OK, token="secret")
    await run(client)
    assert executor.requests[0].headers["Authorization"] == "Bearer secret"
    executor, client = await against(OK)
    await run(client)
    assert "Authorization" not in executor.requests[0].headers


def test_pauses_double_up_to_a_cap_and_jitter_by_a_quarter():
    for attempt, seconds in [(1, 0.1), (2, 0.2), (5, 1.6), (7, 5.0), (10**6, 5.0)]:
        assert 0.75 * seconds <= pause_after(attempt) <= 1.25 * seconds
    assert pause_after(1, at_least_seconds=8.0) >= 6.0


def test_an_idle_connection_is_dropped_before_the_executor_drops_it():
    assert uvicorn.Config(None).timeout_keep_alive > KEEPALIVE_SECONDS


# Deadlines


async def test_no_pause_is_begun_that_ends_after_the_deadline(against):
    executor, client = await against((429, {"status": "rejected"}, {"Retry-After": "600"}), OK)
    started_at = time.monotonic()
    result = await run(client, deadline_seconds=60.0)
    assert (result.status, len(executor.requests)) == (Status.REJECTED, 1)
    assert time.monotonic() - started_at < 60


async def test_a_call_that_is_cut_off_by_its_deadline_is_not_the_snippets_timeout(against):
    executor, client = await against("hang", OK)
    result = await run(client, deadline_seconds=2.0)
    assert result.status is Status.SANDBOX_ERROR and "before the deadline" in result.message
    await asyncio.wait_for(executor.abandoned.wait(), 60)  # the executor is told, and stops the snippet
    assert len(executor.requests) == 1


async def test_a_deadline_that_has_passed_runs_nothing(against):
    executor, client = await against(OK)
    assert (await run(client, deadline_seconds=0.0)).status is Status.REJECTED
    assert executor.requests == []


async def test_a_failure_without_time_for_another_try_is_reported_as_it_is(against, monkeypatch):
    monkeypatch.setattr(endpoint, "_BACKOFF_BASE_SECONDS", 600.0)
    monkeypatch.setattr(endpoint, "_BACKOFF_CAP_SECONDS", 600.0)
    executor, client = await against(SANDBOX_ERROR, OK)
    result = await run(client, deadline_seconds=60.0)
    assert (result.status, result.message) == (Status.SANDBOX_ERROR, "the worker died")
    assert len(executor.requests) == 1


# Sessions


async def test_a_session_is_opened_by_its_first_call_and_deleted_at_its_end(against):
    executor, client = await against(
        CREATED, {**OK, "session_alive": True}, OK, (204, {}, {}), token="secret"
    )
    async with client.session(ttl_seconds=60.0, memory_limit_bytes=1 << 20) as session:
        assert executor.requests == [] and session.url is None
        assert (await run(session, "x = 1")).status is Status.OK
        assert (await run(session, "x", print_last_expression=True)).status is Status.OK
        assert (session.alive, session.url, client.endpoint.sessions) == (True, executor.url, 1)
    assert executor.calls == [
        "POST /v1/sessions",
        "POST /v1/sessions/s/1/execute",
        "POST /v1/sessions/s/1/execute",
        "DELETE /v1/sessions/s/1",
    ]
    assert executor.requests[1].raw_path == "/v1/sessions/s%2F1/execute"  # whatever an id contains
    assert executor.bodies[0] == {"ttl_seconds": 60.0, "memory_limit_bytes": 1 << 20}
    assert [body["code"] for body in executor.bodies[1:3]] == ["x = 1", "x"]
    assert [body["print_last_expression"] for body in executor.bodies[1:3]] == [False, True]
    assert {request.headers["Authorization"] for request in executor.requests} == {"Bearer secret"}
    routes = {request.headers["X-Session-Route"] for request in executor.requests}
    assert len(routes) == 1 and len(routes.pop()) == 32
    assert client.endpoint.sessions == 0
    assert (await run(session)).message == "the session is lost: it was closed"


async def test_an_unused_session_asks_nothing_of_the_executor(against):
    executor, client = await against(OK)
    async with client.session():
        pass
    assert executor.requests == []


async def test_opening_a_session_is_retried_under_another_route(against):
    executor, client = await against("hang up", FULL, CREATED, OK)
    async with client.session() as session:
        assert (await run(session)).status is Status.OK
    routes = [request.headers["X-Session-Route"] for request in executor.requests]
    assert len(set(routes[:3])) == 3 and len(set(routes[2:])) == 1


async def test_a_session_that_cannot_be_opened_is_not_lost(against):
    _, client = await against(FULL, CREATED, OK, max_attempts=1)
    async with client.session() as session:
        assert (await run(session)).status is Status.REJECTED
        assert session.alive
        assert (await run(session)).status is Status.OK


@pytest.mark.parametrize("broken", ["hang up", (502, {}, {}), SANDBOX_ERROR])
async def test_a_session_call_that_may_have_run_is_never_made_again(against, broken):
    executor, client = await against(CREATED, OK, broken, OK)
    async with client.session() as session:
        await run(session)
        assert (await run(session)).status is Status.SANDBOX_ERROR
        assert len(executor.requests) == 3 and not session.alive
        after = await run(session)
        assert after.status is Status.REJECTED and after.message.startswith("the session is lost: ")
        assert len(executor.requests) == 3


async def test_a_session_call_that_did_not_run_is_made_again(against):
    executor, client = await against(CREATED, FULL, FULL, OK)
    async with client.session() as session:
        assert (await run(session)).status is Status.OK
        assert session.alive and len(executor.requests) == 4


async def test_a_queue_that_stays_full_does_not_lose_a_session(against):
    _, client = await against(CREATED, FULL, FULL, OK, max_attempts=2)
    async with client.session() as session:
        assert (await run(session)).status is Status.REJECTED
        assert session.alive and (await run(session)).status is Status.OK


async def test_a_session_that_the_executor_forgot_is_lost(against):
    _, client = await against(CREATED, OK, (404, {"detail": "no such session"}, {}))
    async with client.session() as session:
        await run(session)
        result = await run(session)
        assert result.status is Status.REJECTED and "no such session (HTTP 404" in result.message
        assert not session.alive


@pytest.mark.parametrize(("alive", "later"), [(True, Status.OK), (False, Status.REJECTED)])
async def test_the_executor_says_whether_a_session_survived_its_call(against, alive, later):
    _, client = await against(CREATED, {"status": "timeout", "session_alive": alive}, OK)
    async with client.session() as session:
        assert (await run(session)).status is Status.TIMEOUT
        assert session.alive is alive
        assert (await run(session)).status is later


async def test_a_cancelled_call_loses_its_session(against):
    executor, client = await against(CREATED, "hang", OK)
    async with client.session() as session:
        call = asyncio.create_task(run(session))
        await executor.received(2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert "cancelled" in (await run(session)).message
    assert executor.calls[2:] == ["DELETE /v1/sessions/s/1"]


async def test_a_deadline_in_a_session_loses_it_only_if_its_call_was_made(against):
    executor, client = await against(CREATED, "hang", (204, {}, {}))
    async with client.session() as session:
        first = asyncio.create_task(run(session, deadline_seconds=3.0))
        await asyncio.sleep(0)
        second = await run(session, deadline_seconds=0.2)
        assert second.status is Status.REJECTED and "busy until the deadline" in second.message
        assert session.alive
        assert (await first).status is Status.SANDBOX_ERROR
        assert not session.alive and len(executor.requests) == 2


async def test_calls_of_one_session_run_one_after_the_other(against):
    async def slow():
        await asyncio.sleep(0.02)
        return OK

    executor, client = await against(CREATED, slow)
    async with client.session() as session:
        await asyncio.gather(*(run(session, str(n)) for n in range(5)))
    assert executor.most_in_flight == 1
    assert [body["code"] for body in executor.bodies[1:6]] == list("01234")


async def test_arguments_that_are_refused_leave_the_session_alive(against):
    _, client = await against(CREATED, (422, {"detail": "x"}, {}), OK)
    async with client.session() as session:
        with pytest.raises(ValueError, match="refuses the request"):
            await run(session)
        assert (await run(session)).status is Status.OK


# Imports


@pytest.mark.parametrize(
    "module", ["zygote", "worker", "harness", "isolation", "client_pool", "process", "pool"]
)
def test_a_module_loads_without_what_its_process_must_not_hold(module):
    forbidden = {"megatron_ztrl", "fastapi", "torch"} | (set() if module == "client_pool" else {"aiohttp"})
    root = str(Path(ztrl_sandbox.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); import ztrl_sandbox.{module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not forbidden & set(loaded)
