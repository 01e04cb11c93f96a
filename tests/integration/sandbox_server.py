"""A real executor in a process of its own, started as a user starts it and asked over HTTP."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ztrl_sandbox
from ztrl_sandbox import tiers
from ztrl_sandbox.proctree import descendants

PACKAGE_ROOT = str(Path(ztrl_sandbox.__file__).parent.parent)
_PR_SET_NAME = 15
ENVIRONMENT = {**os.environ, "PYTHONPATH": PACKAGE_ROOT, "ZTRL_TEST_SECRET": "s3cr3t-of-the-server"}


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether ``condition`` comes true in time. Other processes' deaths give a test no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Executor:
    """``ztrl-sandbox serve`` as a user starts it.

    ``launcher`` is a command that runs the command that follows it (as another user, say), in its own process.
    ``token`` is what the server asks for and what is sent to it.
    """

    def __init__(
        self, isolation: str, *options: str, launcher: Sequence[str] = (), token: str | None = None
    ) -> None:
        command = ["-m", "ztrl_sandbox", "serve", "--exit-with-parent", "--port", "0"]
        command += ["--isolation", isolation, *options]
        self.process = subprocess.Popen(
            [*launcher, sys.executable, *command],
            env=ENVIRONMENT | ({} if token is None else {"ZTRL_SANDBOX_TOKEN": token}),
            stdout=subprocess.PIPE,
            text=True,
        )
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.isolation = isolation
        self.ready = json.loads(self.process.stdout.readline())
        self.url = self.ready["url"]

    def request(self, method: str, path: str, body: dict | None = None) -> tuple[int, dict, dict]:
        """Status, JSON answer (empty if there is none) and headers."""
        data = None if body is None else json.dumps(body).encode()
        headers = self.headers | ({} if body is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read() or b"{}"), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error), dict(error.headers)

    def post(self, path: str, **body) -> tuple[int, dict, dict]:
        return self.request("POST", path, body)

    def execute(self, code: str, run_timeout_seconds: float = 20.0, **options) -> dict:
        status, result, _ = self.post(
            "/v1/execute", code=code, run_timeout_seconds=run_timeout_seconds, **options
        )
        assert status == 200, result
        return result

    @contextlib.contextmanager
    def open_call(self, path: str, code: str) -> Iterator[None]:
        """A call that is under way in the block, at whose end its client hangs up."""
        body = json.dumps({"code": code, "run_timeout_seconds": 60}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.ready["port"])) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            yield

    def get(self, path: str) -> dict:
        status, answer, _ = self.request("GET", path)
        assert status == 200, answer
        return answer

    def idle_workers(self) -> int:
        with urllib.request.urlopen(self.url + "/metrics") as response:
            text = response.read().decode()
        return int(float(text.partition("\nztrl_sandbox_idle_workers ")[2].partition("\n")[0]))

    def settled(self) -> bool:
        """Whether the process tree is the zygote, the workers and one armed snippet process each."""
        workers = self.get("/health")["worker_pids"]
        return len(descendants(self.process.pid)) == 1 + 2 * len(workers)

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(timeout=20)
        self.process.stdout.close()
        return code


def announcing(name: str, code: str) -> str:
    """The code, run by a process that first takes this name, of at most 15 bytes."""
    return f"import ctypes\nctypes.CDLL(None).prctl({_PR_SET_NAME}, {name.encode()!r}, 0, 0, 0)\n{code}"


def announced(executor: Executor, *names: str) -> bool:
    """Whether code with each of these names has begun and its process is still there."""
    found = set()
    for pid in descendants(executor.process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(Path(f"/proc/{pid}/comm").read_text().rstrip("\n"))
    return found >= set(names)


def stopped_in_time(execute: Callable[..., dict], code: str, run_timeout_seconds: float, **options) -> dict:
    """The result of code that prints and then does not end.

    The time-out is short, so that many of these can be tested; a busy machine may need all of it before the code
    has printed. Then it is repeated with twice the time.
    """
    for factor in (1, 2, 4, 8, 16):
        result = execute(code, factor * run_timeout_seconds, **options)
        assert result["status"] == "timeout", result
        assert result["run_seconds"] >= factor * run_timeout_seconds
        if result["stdout"]:
            break
    return result


def available_tiers() -> list[str]:
    """The tiers that this machine can provide, weakest first."""

    def available(tier: str) -> bool:
        try:
            tiers.choose(tier)
        except ValueError:
            return False
        return True

    return [tier for tier in ("basic", "user", "full") if available(tier)]


@contextlib.contextmanager
def executor_with(
    isolation: str, *options: str, launcher: Sequence[str] = (), token: str | None = None
) -> Iterator[Executor]:
    executor = Executor(isolation, *options, launcher=launcher, token=token)
    try:
        yield executor
    finally:
        executor.stop()
