"""The pool, and nginx, over two real executors, one of which is killed while it runs calls."""

import asyncio
import contextlib
import os
import shutil
import socket

import pytest
from sandbox_server import Executor, announced, announcing
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.client_pool import ExecutorPool
from ztrl_sandbox.nginx import nginx_config
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


async def until(condition, seconds=30.0):
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
        await until(lambda: not victim.ejected)
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


async def test_a_session_keeps_its_variables_while_others_use_the_same_executors(executors):
    async def count(session, number):
        outputs = []
        for _ in range(5):
            code = f"x = globals().get('x', {number}) + 1\nprint(x)"
            outputs.append((await session.execute(code, run_timeout_seconds=20.0)).stdout)
        return outputs, session.url

    async with (
        ExecutorPool([executor.url for executor in executors]) as pool,
        contextlib.AsyncExitStack() as stack,
    ):
        sessions = [await stack.enter_async_context(pool.session()) for _ in range(6)]
        counted = await asyncio.gather(*(count(session, 10 * n) for n, session in enumerate(sessions)))
        for n, (outputs, _) in enumerate(counted):
            assert outputs == [f"{10 * n + step}\n" for step in range(1, 6)]
        urls = [url for _, url in counted]
        assert [urls.count(executor.url) for executor in executors] == [3, 3]
        assert [executor.get("/health")["sessions"] for executor in executors] == [3, 3]
    assert [executor.get("/health")["sessions"] for executor in executors] == [0, 0]


async def test_what_a_session_survives_and_what_it_does_not(executors):
    async with ExecutorClient(executors[0].url) as client:
        async with client.session(memory_limit_bytes=256 << 20) as session:

            async def run(code, **options):
                return await session.execute(code, **{"run_timeout_seconds": 20.0, **options})

            assert (await run("x = 1")).status is Status.OK
            assert (await run("1 / 0")).status is Status.ERROR
            assert (await run("while True: pass", run_timeout_seconds=0.3)).status is Status.TIMEOUT
            assert (await run("x", print_last_expression=True)).stdout == "1\n"
            assert (await run("y = bytearray(300 << 20)")).status is Status.MEMORY
            assert (await run("import os; os._exit(3)")).exit_code == 3
            assert not session.alive
            after = await run("x")
            assert after.status is Status.REJECTED and "its process ended" in after.message
        async with client.session(ttl_seconds=2.0) as session:
            assert (await run("x = 1")).status is Status.OK
            await until(lambda: executors[0].get("/health")["sessions"] == 0)
            after = await run("x")
            assert after.status is Status.REJECTED and "expired after 2 s" in after.message


async def test_a_session_is_lost_with_its_killed_executor_and_says_so(executors):
    async with ExecutorPool([executor.url for executor in executors], max_attempts=2) as pool:
        async with pool.session() as session:
            await session.execute("x = 1", run_timeout_seconds=20.0)
            home = next(index for index, executor in enumerate(executors) if executor.url == session.url)
            call = asyncio.create_task(
                session.execute(announcing("doomed", "import time; time.sleep(60)"), run_timeout_seconds=60.0)
            )
            await until(lambda: announced(executors[home], "doomed"))
            kill(executors[home])
            assert (await call).status is Status.SANDBOX_ERROR
            after = await session.execute("x", run_timeout_seconds=20.0)
            assert after.status is Status.REJECTED and after.message.startswith("the session is lost: ")
        executors[home] = await restart(executors[home])
        async with pool.session() as session:
            assert (await session.execute("print(2)", run_timeout_seconds=20.0)).stdout == "2\n"


async def test_a_replay_from_memory_runs_nothing_and_goes_on_where_the_original_stopped(executors):
    first_calls = ["import random; random.seed(1); x = random.random()", "print(x)", "1 / 0"]
    async with ExecutorPool([executor.url for executor in executors], memo_entries=100) as pool:
        async with pool.session() as session:
            recorded = [await session.execute(code, run_timeout_seconds=20.0) for code in first_calls]
        served = sum(executor.served for executor in pool.executors)
        async with pool.session() as session:
            replayed = [await session.execute(code, run_timeout_seconds=20.0) for code in first_calls]
            assert replayed == recorded and sum(executor.served for executor in pool.executors) == served
            assert (await session.execute("print(x)", run_timeout_seconds=20.0)).stdout == recorded[1].stdout


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not on PATH")
async def test_nginx_makes_two_executors_look_like_one(executors, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen = f"127.0.0.1:{listener.getsockname()[1]}"
    path = tmp_path / "nginx.conf"
    path.write_text(nginx_config([executor.url for executor in executors], listen=listen))
    user = "user root;" if os.geteuid() == 0 else ""  # who may enter this test's directory
    nginx = await asyncio.create_subprocess_exec(
        "nginx", "-p", tmp_path, "-c", path, "-g", f"daemon off; {user}"
    )

    async def in_session(client, number):
        async with client.session() as session:
            await session.execute(f"x = {number}", run_timeout_seconds=20.0)
            return (await session.execute("print(x)", run_timeout_seconds=20.0)).stdout

    async def listens():
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*listen.split(":"))
            writer.close()
            return True
        return False

    try:
        async with asyncio.timeout(60):  # it tells nobody when it listens
            while not await listens():
                assert nginx.returncode is None
                await asyncio.sleep(0.02)
        async with ExecutorClient(f"http://{listen}") as client:
            calls = [client.execute(f"print({n})", run_timeout_seconds=20.0) for n in range(100)]
            sessions = [in_session(client, n) for n in range(20)]
            results, outputs = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*sessions))
            assert [result.stdout for result in results] == [f"{n}\n" for n in range(100)]
            assert outputs == [f"{n}\n" for n in range(20)]
            kill(executors[0])
            results = await asyncio.gather(
                *(client.execute(f"print({n})", run_timeout_seconds=20.0) for n in range(20))
            )
            assert [result.stdout for result in results] == [f"{n}\n" for n in range(20)]
            # Half of all routes lead to the dead one.
            outputs = await asyncio.gather(*(in_session(client, n) for n in range(40)))
            assert outputs == [f"{n}\n" for n in range(40)]
            executors[0] = await restart(executors[0])
    finally:
        nginx.terminate()
        await nginx.wait()
