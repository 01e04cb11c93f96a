"""Who may ask a real executor, what it refuses, and that its workers are replaced without anybody noticing."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from sandbox_server import ENVIRONMENT, available_tiers, executor_with, running, until
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer

TOKEN = "correct-horse-battery-staple"


def refused_start(*options: str, token: str | None = None) -> tuple[int, str]:
    """Exit code and standard error of a server that must not come up."""
    finished = subprocess.run(
        [sys.executable, "-m", "ztrl_sandbox", "serve", "--port", "0", "--preload", "", *options],
        env=ENVIRONMENT | ({} if token is None else {"ZTRL_SANDBOX_TOKEN": token}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.stdout == ""
    return finished.returncode, finished.stderr


@pytest.fixture(scope="module")
def guarded():
    with executor_with("auto", "--workers", "1", "--preload", "", token=TOKEN) as executor:
        yield executor


def test_a_call_with_the_token_runs(guarded):
    assert guarded.execute("print(1)")["stdout"] == "1\n"


@pytest.mark.parametrize(
    "authorization",
    [None, "", TOKEN, "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff"],
)
@pytest.mark.parametrize(
    "path", ["/v1/execute", "/run_code", "/metrics", "/openapi.json", "/docs", "/nowhere"]
)
def test_without_the_token_every_other_route_is_closed(guarded, path, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    request = urllib.request.Request(guarded.url + path, b"{}", headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=10)
    with refusal.value as answer:
        assert (answer.code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "bearer token" in json.load(answer)["detail"]


def test_health_and_readiness_need_no_token(guarded):
    for path in ("/health", "/ready"):
        assert urllib.request.urlopen(guarded.url + path, timeout=10).status == 200


def test_a_snippet_of_the_servers_own_user_cannot_read_the_token():
    launcher = []
    if os.geteuid() == 0:
        if "full" not in available_tiers():
            pytest.skip("the server cannot be started as somebody else")
        launcher = [sys.executable, str(Path(__file__).parent / "sandbox_hostile" / "as_nobody.py")]
    code = """
import os
print(os.getuid() != 0, os.environ)
for path in ("self/environ", "{pid}/environ", "{pid}/mem", "{pid}/fd"):
    try:
        print(len((os.listdir if path.endswith("fd") else lambda p: open(p, "rb").read(1))("/proc/" + path)) > 0)
    except PermissionError as error:
        print("denied")
"""
    options = ("--workers", "1", "--preload", "")
    with executor_with("basic", *options, launcher=launcher, token=TOKEN) as executor:
        lines = executor.execute(code.replace("{pid}", str(executor.ready["pid"])))["stdout"].splitlines()
    assert lines[0].startswith("True ") and TOKEN not in lines[0]
    assert lines[1:] == ["True", "denied", "denied", "denied"]


def test_the_token_may_come_from_a_file(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with executor_with("basic", "--workers", "1", "--preload", "", "--token-file", str(file)) as executor:
        assert executor.post("/v1/execute", code="1")[0] == 401
        executor.headers["Authorization"] = f"bearer {TOKEN}"  # the scheme's case does not matter
        assert executor.execute("print(1)")["status"] == "ok"


@pytest.mark.parametrize("token", ["short", "with a space in its middle", "with-an-umlaut-\xe4\xf6\xfc"])
def test_a_token_that_cannot_serve_is_refused(token):
    code, message = refused_start(token=token)
    assert code == 2 and "ZTRL_SANDBOX_TOKEN" in message and token not in message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_a_public_address_needs_a_token(host):
    code, message = refused_start("--host", host)
    assert code == 2
    assert message.startswith("ztrl-sandbox: refusing to listen on ") and message.count("\n") == 1


def test_a_public_address_is_served_with_a_token():
    options = ("--host", "0.0.0.0", "--workers", "1", "--preload", "")
    with executor_with("basic", *options, token=TOKEN) as executor:
        executor.url = f"http://127.0.0.1:{executor.ready['port']}"
        assert executor.execute("print(1)")["stdout"] == "1\n"


def test_the_process_helper_passes_its_token_and_none_of_the_environment(monkeypatch):
    async def scenario(token: str | None) -> str:
        async with (
            ExecutorServer(workers=1, preload=[], token=token) as server,
            ExecutorClient(server.url, token=token) as client,
        ):
            return (await client.execute("print(6 * 7)", run_timeout_seconds=20.0)).stdout

    monkeypatch.setenv("ZTRL_SANDBOX_TOKEN", "the-token-of-somebody-else")
    assert asyncio.run(scenario(None)) == "42\n"
    assert asyncio.run(scenario(TOKEN)) == "42\n"


def test_a_tier_below_the_minimum_is_no_start():
    code, message = refused_start("--isolation", "basic", "--min-isolation", "user")
    assert code == 2 and message.count("\n") == 1
    assert "'basic' (requested)" in message and "'user'" in message


def test_the_strongest_tier_satisfies_itself_as_minimum():
    strongest = available_tiers()[-1]
    with executor_with("auto", "--workers", "1", "--preload", "", "--min-isolation", strongest) as executor:
        health = executor.get("/health")
        assert health["isolation"] == strongest
        assert len(health["isolation_layers"]) >= 4 and all(health["isolation_layers"])


def test_limits_of_the_command_line_hold():
    options = ("--workers", "1", "--preload", "", "--process-limit", "10", "--scratch-bytes", str(1 << 20))
    with executor_with(available_tiers()[-1], *options) as executor:
        limits = executor.get("/health")["limits"]
        assert (limits["processes"], limits["scratch_bytes"]) == (10, 1 << 20)
        threads = "import threading, time\nfor _ in range(20): threading.Thread(target=time.sleep, args=(1,)).start()"
        assert executor.execute(threads)["status"] in ("error", "killed")
        if executor.isolation != "basic":
            assert "No space left" in executor.execute("open('x', 'wb').write(bytes(2 << 20))")["stderr"]


def test_a_body_that_is_too_large_is_refused(guarded):
    status, answer, _ = guarded.post("/v1/execute", code="1", stdin="x" * (65 << 20))
    assert (status, answer["status"]) == (413, "rejected") and "bytes" in answer["message"]
    assert guarded.execute("print(1)")["stdout"] == "1\n"


def test_the_queue_is_first_in_first_out():
    with executor_with("basic", "--workers", "1", "--preload", "") as executor:
        started: dict[int, int] = {}

        def arrive(number: int) -> None:
            started[number] = int(executor.execute("import time; print(time.monotonic_ns())")["stdout"])

        threads = [threading.Thread(target=arrive, args=(number,)) for number in range(20)]
        with executor.open_call("/v1/execute", "import time; time.sleep(60)"):
            assert until(lambda: not executor.idle_workers())
            for count, thread in enumerate(threads):
                thread.start()
                assert until(lambda count=count: executor.get("/health")["queued"] == count + 1)
        for thread in threads:
            thread.join()
        assert sorted(started, key=started.__getitem__) == list(range(20))


def test_workers_are_recycled_under_load_and_every_answer_stays_right():
    options = ("--workers", "2", "--preload", "math", "--recycle-after", "10")
    with executor_with(available_tiers()[-1], *options) as executor:
        before = executor.get("/health")

        async def batch() -> list[tuple[str, str]]:
            async with ExecutorClient(executor.url, max_attempts=1) as client:
                calls = (client.execute(f"print({n} ** 2)", run_timeout_seconds=30.0) for n in range(300))
                return [(result.status, result.stdout) for result in await asyncio.gather(*calls)]

        batches = 0

        def recycled_ten_times() -> (
            bool
        ):  # a worker serves on until its successor is there, however many that are
            nonlocal batches
            assert asyncio.run(batch()) == [("ok", f"{n**2}\n") for n in range(300)]
            batches += 1
            return executor.get("/health")["workers_recycled"] >= 10

        assert until(recycled_ten_times, 60.0)
        after = executor.get("/health")
        assert after["workers_recycled"] <= 30 * batches
        assert after["worker_restarts"] == 0
        assert not set(before["worker_pids"]) & set(after["worker_pids"])
        assert until(lambda: not any(map(running, before["worker_pids"])))
        assert until(executor.settled)


def test_a_zygote_that_dies_is_replaced_before_it_is_needed():
    with executor_with("auto", "--workers", "1", "--preload", "") as executor:
        victim = executor.get("/health")["zygote_pid"]
        os.kill(victim, 9)
        assert until(lambda: executor.get("/health")["zygote_pid"] != victim)
        assert executor.execute("print(1)")["stdout"] == "1\n"


def resolve(document: dict, reference: str) -> dict:
    node = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def values_of(node, key: str):
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values_of(value, key)


def test_the_openapi_document_is_valid_and_true(guarded):
    document = guarded.get("/openapi.json")
    assert document["openapi"].startswith("3.1")
    references = list(values_of(document, "$ref"))
    assert references and all(resolve(document, reference) for reference in references)
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert all(operation["description"] for operation in operations.values())
    execute = operations["post", "/v1/execute"]
    assert {"200", "401", "413", "422", "429"} <= set(execute["responses"])
    assert "Retry-After" in execute["responses"]["429"]["headers"]
    assert execute["security"] == [{"HTTPBearer": []}]
    assert "security" not in operations["get", "/health"]

    def check(operation: dict, status: int, answer: dict) -> None:
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        Draft202012Validator({**document, **schema}).validate(answer)

    for body in ({"code": "print(1)"}, {"code": "#" * 2_000_000}, {"code": 1}):
        status, answer, _ = guarded.request("POST", "/v1/execute", body)
        check(execute, status, answer)
    check(operations["post", "/run_code"], 200, guarded.post("/run_code", code="print(1)")[1])
    _, session, _ = guarded.post("/v1/sessions")
    check(operations["post", "/v1/sessions"], 201, session)
    path = "/v1/sessions/{session_id}"
    for session_id, status in ((session["session_id"], 200), ("nobodys", 404)):
        real_path = path.format(session_id=session_id)
        check(operations["get", path], status, guarded.request("GET", real_path)[1])
        answer = guarded.post(real_path + "/execute", code="print(1)")[1]
        check(operations["post", path + "/execute"], status, answer)
    assert {"204", "401", "404", "422"} <= set(operations["delete", path]["responses"])
    check(operations["get", "/health"], 200, guarded.get("/health"))
    check(operations["get", "/ready"], 200, guarded.get("/ready"))
    guarded.headers.clear()
    try:
        check(execute, 401, guarded.post("/v1/execute", code="1")[1])
    finally:
        guarded.headers["Authorization"] = f"Bearer {TOKEN}"


def test_serve_help_documents_every_option():
    command = [sys.executable, "-m", "ztrl_sandbox", "serve", "--help"]
    text = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    readme = (Path(__file__).parents[2] / "sandbox" / "README.md").read_text()
    options = {word.strip("[],") for word in text.split() if word.strip("[],").startswith("--")} - {"--help"}
    assert len(options) >= 14
    assert [option for option in sorted(options) if f"`{option}" not in readme] == []
