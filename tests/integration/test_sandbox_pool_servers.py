"""The pool over two real executors, one of which is killed while it runs calls."""

import asyncio
import time

import pytest
from sandbox_server import Executor
from ztrl_sandbox.client_pool import ExecutorPool
from ztrl_sandbox.protocol import Status

OPTIONS = ("--workers", "2", "--preload", "math")


@pytest.fixture
async def executors():
    """Two of them; a test may kill and replace them."""
    running = [await asyncio.to_thread(Executor, "auto", *OPTIONS) for _ in range(2)]
    yield running
    for executor in running:
        await asyncio.to_thread(executor.stop)


async def restart(executor):
    """On the same port, as a supervisor would."""
    return await asyncio.to_thread(Executor, "auto", *OPTIONS, "--port", str(executor.ready["port"]))


def kill(executor):
    executor.process.kill()
    executor.process.wait()
    executor.process.stdout.close()


async def until(condition, seconds=10.0):
    """What the pool counts has no event for a test to wait for."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_no_call_is_lost_with_a_killed_executor_and_a_restarted_one_serves_again(executors):
    async with ExecutorPool([executor.url for executor in executors], max_concurrent_per_executor=8) as pool:
        victim, survivor = pool.executors
        calls = [
            asyncio.create_task(
                pool.execute(f"import time; time.sleep(0.05); print({n})", run_timeout_seconds=20.0)
            )
            for n in range(120)
        ]
        await until(lambda: victim.served >= 10 and victim.outstanding == 8)
        kill(executors[0])
        results = await asyncio.gather(*calls)
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(120)]
        assert {result.status for result in results} == {Status.OK}
        assert victim.ejected and not survivor.ejected

        served_before = victim.served
        executors[0] = await restart(executors[0])
        started_at = time.monotonic()
        await until(lambda: not victim.ejected)
        assert time.monotonic() - started_at < 7  # the longest pause between probes, and jitter
        again = await asyncio.gather(*(pool.execute("print(1)", run_timeout_seconds=20.0) for _ in range(20)))
        assert {result.stdout for result in again} == {"1\n"}
        assert victim.served > served_before


async def test_calls_outlast_a_restart_of_the_only_executor(executors):
    async with ExecutorPool([executors[0].url], max_concurrent_per_executor=4) as pool:
        calls = [
            asyncio.create_task(
                pool.execute(f"import time; time.sleep(0.1); print({n})", run_timeout_seconds=20)
            )
            for n in range(16)
        ]
        await until(lambda: pool.executors[0].served >= 2)
        kill(executors[0])
        await until(lambda: pool.executors[0].ejected)
        executors[0] = await restart(executors[0])
        assert [result.stdout for result in await asyncio.gather(*calls)] == [f"{n}\n" for n in range(16)]


async def test_the_token_opens_executors_that_ask_for_one():
    executor = await asyncio.to_thread(lambda: Executor("auto", *OPTIONS, token="a-token-of-the-test"))
    try:
        async with ExecutorPool([executor.url], token="a-token-of-the-test") as pool:
            assert (await pool.execute("print(2)", run_timeout_seconds=20.0)).stdout == "2\n"
        async with ExecutorPool([executor.url], token="not-the-token-of-it") as pool:
            with pytest.raises(ValueError, match="refuses the token"):
                await pool.execute("print(2)", run_timeout_seconds=20.0)
    finally:
        await asyncio.to_thread(executor.stop)
