"""The benchmark's own arithmetic: what it sends, what it calls wrong or lost, and its percentiles."""

import contextlib
import io
import itertools
import math

import aiohttp
import pytest
from aiohttp import web
from ztrl_sandbox.bench.driver import Driver, percentile
from ztrl_sandbox.bench.loads import snippets
from ztrl_sandbox.bench.protocols import PROTOCOLS


def test_the_percentile_is_the_nearest_rank():
    values = [15, 20, 35, 40, 50]
    assert [percentile(values, percent) for percent in (5, 30, 40, 50, 99, 100)] == [15, 20, 20, 35, 50, 50]
    assert percentile(range(1, 201), 99) == 198
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize("load", ["trivial", "sympy"])
def test_the_expected_output_is_what_the_code_prints(load):
    for snippet in itertools.islice(snippets(load), 120):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(snippet.code, {})
        assert (snippet.status, snippet.stdout) == ("ok", printed.getvalue()), snippet.code


def test_a_mixed_load_has_five_percent_loops_and_two_percent_bombs():
    drawn = [snippet.status for snippet in itertools.islice(snippets("mixed"), 20_000)]
    assert drawn.count("timeout") / len(drawn) == pytest.approx(0.05, abs=0.005)
    assert drawn.count("memory") / len(drawn) == pytest.approx(0.02, abs=0.003)
    assert set(drawn) == {"ok", "timeout", "memory"}


def native(**fields) -> web.Response:
    answer = {"status": "ok", "stdout": "", "run_seconds": 0.002, "queue_seconds": 0.001}
    return web.json_response({**answer, **fields})


def fusion(status="Success", run_result: dict | None = None) -> web.Response:
    return web.json_response({"status": status, "run_result": run_result})


async def measured(path: str, protocol: str, answers: list):
    """The row of calls that get these answers, in turn."""
    remaining = iter(answers)

    async def answer(request: web.Request) -> web.Response:
        given = next(remaining)
        if given is None:
            request.transport.close()
        return given

    application = web.Application()
    application.router.add_post(path, answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            driver = Driver(session, url, PROTOCOLS[protocol], pid=None)
            return await driver.measure("trivial", 1, calls=len(answers))
    finally:
        await runner.cleanup()


async def test_wrong_and_lost_calls_are_counted_apart():
    row = await measured(
        "/v1/execute",
        "native",
        [
            native(stdout="2\n"),
            native(stdout="2\n"),  # of print(2 + 1)
            native(status="error"),
            native(status="sandbox_error"),
            native(stdout="6\n"),
            None,
            web.Response(status=500, text="oops"),
        ],
    )
    assert (row.calls, row.wrong, row.lost) == (7, 2, 3)
    assert [failure.partition(" gave ")[0] for failure in row.failures[:2]] == [
        "'print(2 + 1)'",
        "'print(3 + 1)'",
    ]
    assert len(row.failures) == 3 and "sandbox_error" in row.failures[2]
    assert (row.queue_p50_ms, row.run_p99_ms) == (pytest.approx(1), pytest.approx(2))
    assert row.server_cpu_ms_per_call is None


async def test_a_server_of_sandboxfusions_make_is_understood():
    run = {"status": "Finished", "return_code": 0, "stdout": "2\n", "stderr": "", "execution_time": 0.3}
    late = {**run, "status": "TimeLimitExceeded", "return_code": None, "stdout": None}
    row = await measured(
        "/run_code", "sandboxfusion", [fusion(run_result=run), fusion("Failed", late), fusion("SandboxError")]
    )
    assert (row.calls, row.wrong, row.lost) == (3, 1, 1)
    assert "status='timeout'" in row.failures[0]
    assert (row.queue_p50_ms, row.run_p99_ms) == (None, pytest.approx(300))
