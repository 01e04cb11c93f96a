"""nginx in front of scripted executors: who gets which request, and what happens when one is down.

The text is always tested; what it does, where Debian's nginx is installed (`apt-get install nginx-light`).
"""

import asyncio
import contextlib
import os
import shutil
import socket

import aiohttp
import pytest
from ztrl_sandbox import cli
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.nginx import nginx_config
from ztrl_sandbox.protocol import Status

OK = {"status": "ok", "stdout": "out"}
ENDED = (204, {}, {})

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not on PATH")


def block(text, head):
    """The lines inside ``head { ... }``."""
    lines = iter(text.splitlines())
    indent = next(line for line in lines if line.strip() == head + " {").index(head)
    inside = []
    for line in lines:
        if line == " " * indent + "}":
            return inside
        inside.append(line.strip())
    raise AssertionError(f"{head} is not closed")


def test_calls_are_balanced_and_sessions_hashed(capsys):
    assert cli.main(["nginx-config", "http://10.0.0.1:8080", "http://node-2:81/", "--listen", "[::1]:9"]) == 0
    text = capsys.readouterr().out
    assert text == nginx_config(["http://10.0.0.1:8080", "http://node-2:81"], listen="[::1]:9")
    calls, sessions = block(text, "upstream executors"), block(text, "upstream sessions")
    assert "least_conn;" in calls and "zone executors 256k;" in calls
    assert [line.split()[1] for line in calls if line.startswith("server ")] == ["10.0.0.1:8080", "node-2:81"]
    assert "hash $session_id consistent;" in sessions
    assert [line for line in sessions if line.startswith("server ")] == [
        "server 10.0.0.1:8080 max_fails=0;",
        "server node-2:81 max_fails=0;",
    ]
    assert "listen [::1]:9;" in block(text, "server")
    assert block(text, "map $http_x_session_route $session_id")[0] == '"" $remote_addr;'
    for place in ("location = /v1/sessions", "location /v1/sessions/"):
        assert block(text, place) == ["proxy_pass http://sessions;", "proxy_next_upstream off;"]
    assert "non_idempotent;" not in text


@pytest.mark.parametrize(
    ("urls", "listen"),
    [
        ([], "127.0.0.1:1"),
        (["http://a:1", "http://a:1/"], "127.0.0.1:1"),
        (["https://a:1"], "127.0.0.1:1"),
        (["http://a:1/path"], "127.0.0.1:1"),
        (["http://user@a:1"], "127.0.0.1:1"),
        (["http://a:1;}"], "127.0.0.1:1"),
        (["a:1"], "127.0.0.1:1"),
        (["http://a:1"], "80; include /etc/passwd"),
    ],
)
def test_what_is_no_address_never_gets_into_the_configuration(urls, listen):
    with pytest.raises(ValueError, match="executor|listen"):
        nginx_config(urls, listen=listen)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
async def nginx(tmp_path):
    """Starts nginx in front of executors and gives a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(executors, **options):
            listen = f"127.0.0.1:{free_port()}"
            path = tmp_path / "nginx.conf"
            path.write_text(nginx_config([executor.url for executor in executors], listen=listen))
            user = "user root;" if os.geteuid() == 0 else ""  # who may enter this test's directory
            command = ["nginx", "-p", tmp_path, "-c", path, "-g", f"daemon off; {user}"]
            process = await asyncio.create_subprocess_exec(*command)
            stack.push_async_callback(process.wait)
            stack.callback(process.terminate)
            async with asyncio.timeout(60):
                while True:  # it tells nobody when it listens
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(*listen.split(":"))
                        writer.close()
                        break
                    assert process.returncode is None
                    await asyncio.sleep(0.02)
            return await stack.enter_async_context(ExecutorClient(f"http://{listen}", **options))

        yield start


async def run(caller, code="1", **options):
    return await caller.execute(code, run_timeout_seconds=1.0, **options)


def holding(session_id, seconds=0.0):
    """The script of an executor that knows one session."""

    async def step():
        await asyncio.sleep(seconds)
        return OK

    return [{"session_id": session_id}, step, step, step, ENDED]


@needs_nginx
async def test_calls_go_to_the_executor_with_the_fewest_connections(scripted, nginx):
    busy, idle = await scripted("hang"), await scripted(OK)
    client = await nginx([busy, idle])
    stuck = asyncio.create_task(run(client, deadline_seconds=30.0))
    await busy.received(1)
    for _ in range(20):
        assert (await run(client)).stdout == "out"
    assert (len(busy.requests), len(idle.requests)) == (1, 20)
    stuck.cancel()


@needs_nginx
async def test_headers_bodies_and_refusals_pass_through(scripted, nginx):
    executor = await scripted(OK, (429, {"status": "rejected"}, {"Retry-After": "7"}))
    client = await nginx([executor], token="a-token", max_attempts=1)
    code = "'\N{SNAKE}' * 2 #" * 300_000
    assert (await run(client, code)).status is Status.OK
    assert executor.bodies[0]["code"] == code
    assert executor.requests[0].headers["Authorization"] == "Bearer a-token"
    url = client.endpoint.url
    async with aiohttp.ClientSession() as http:
        async with http.post(url + "/run_code", json={}) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "7")
        async with http.get(url + "/ready") as response:
            assert (response.status, await response.json()) == (200, {"ready": True})
        async with http.get(url + "/metrics") as response:
            assert response.status == 404


@needs_nginx
async def test_a_client_that_hangs_up_is_heard_by_the_executor(scripted, nginx):
    executor = await scripted("hang")
    client = await nginx([executor])
    await run(client, deadline_seconds=2.0)
    await asyncio.wait_for(executor.abandoned.wait(), 60)


@needs_nginx
async def test_a_call_is_tried_elsewhere_when_nothing_was_sent(scripted, nginx):
    dead, good = await scripted(OK), await scripted(OK)
    client = await nginx([dead, good], max_attempts=1)
    await dead.stop()
    for _ in range(10):
        assert (await run(client)).status is Status.OK  # without a try of the client's own
    assert len(good.requests) == 10


@needs_nginx
async def test_a_call_that_was_sent_is_left_to_the_client_to_repeat(scripted, nginx):
    breaking = [await scripted("hang up") for _ in range(2)]
    client = await nginx(breaking, max_attempts=1)
    result = await run(client)
    assert (result.status, result.message.split()[1]) == (Status.SANDBOX_ERROR, "502")
    assert sum(len(executor.requests) for executor in breaking) == 1


@needs_nginx
async def test_every_request_of_a_session_reaches_the_executor_that_opened_it(scripted, nginx):
    executors = [await scripted((500, {}, {})) for _ in range(4)]
    client = await nginx(executors)
    homes = []
    for number in range(24):
        for executor in executors:
            executor.requests.clear()
            executor.script = holding(f"s{number}")
        async with client.session() as session:
            for _ in range(3):
                assert (await run(session)).status is Status.OK
        home, *others = sorted(executors, key=lambda executor: -len(executor.requests))
        assert len(home.requests) == 5 and not any(other.requests for other in others)
        homes.append(home)
    # Sessions are spread; by chance alone 24 of them leave two executors out once in millions of runs.
    assert len(set(homes)) >= 3


@needs_nginx
async def test_clients_that_know_nothing_of_routes_stay_with_one_executor(scripted, nginx):
    executors = [await scripted(OK) for _ in range(4)]
    client = await nginx(executors)
    async with aiohttp.ClientSession(client.endpoint.url) as http:
        for _ in range(3):
            async with http.post("/v1/sessions", json={}) as response:
                assert response.status == 200
            async with http.post("/v1/sessions/x/execute", json={}) as response:
                assert response.status == 200
    assert sorted(len(executor.requests) for executor in executors) == [0, 0, 0, 6]


@needs_nginx
async def test_sessions_are_opened_around_an_executor_that_is_down_and_survive_its_return(scripted, nginx):
    executors = [await scripted((500, {}, {})) for _ in range(2)]
    down, up = executors
    client = await nginx(executors, max_attempts=20)
    await down.stop()
    for _ in range(8):
        up.requests.clear()
        up.script = holding("s1")
        async with client.session() as session:
            assert (await run(session)).status is Status.OK
            await down.start()
            assert (await run(session)).status is Status.OK
            assert (await run(session)).status is Status.OK
            await down.stop()
        assert up.calls[-1] == "DELETE /v1/sessions/s1"
    assert down.requests == []


@needs_nginx
async def test_a_session_whose_executor_is_down_is_lost(scripted, nginx):
    executors = [await scripted(*holding("s1")) for _ in range(2)]
    client = await nginx(executors)
    async with client.session() as session:
        assert (await run(session)).status is Status.OK
        home = next(executor for executor in executors if executor.requests)
        await home.stop()
        assert (await run(session)).status is Status.SANDBOX_ERROR
        assert not session.alive
    assert sum(bool(executor.requests) for executor in executors) == 1
