"""Parts of the executor that die in mid-call, and a disk that is full: nothing is lost but the call, if that."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import ALL, HONEST, HONEST_OUTPUT, OPTIONS, QUICKLY, WORKERS, calm, launcher_for
from sandbox_server import Executor, executor_with, running, until
from ztrl_sandbox.bench.soak import server_cgroups
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.proctree import descendants

pytestmark = pytest.mark.alone

SLOW = "import time; time.sleep(30)"
MAX_RECOVERY_SECONDS = 1.0


@pytest.fixture(scope="module", params=ALL)
def victim(request):
    """An executor of its own, since what dies here must not cost the tests of other files."""
    with executor_with(request.param, *OPTIONS, launcher=launcher_for(request.param)) as executor:
        yield executor


def seconds_to_next_answer(executor: Executor) -> float:
    """As a client waits that tries again when the executor says that it failed."""
    started_at = time.monotonic()
    while True:
        result = executor.execute(HONEST)
        if result["status"] != "sandbox_error":
            break
        assert time.monotonic() - started_at < 10 * MAX_RECOVERY_SECONDS
        time.sleep(0.02)
    assert (result["status"], result["stdout"]) == ("ok", HONEST_OUTPUT), result
    return time.monotonic() - started_at


class CallsInFlight:
    """One slow call in each worker."""

    def __init__(self, executor: Executor) -> None:
        self._threads = ThreadPoolExecutor(WORKERS)
        self._calls = [self._threads.submit(executor.execute, SLOW, 60.0) for _ in range(WORKERS)]
        assert until(lambda: not executor.idle_workers())

    def answers(self) -> list[dict]:
        return [call.result(timeout=10) for call in self._calls]


def test_the_next_call_works_within_a_second_of_the_death_of_every_worker(victim):
    before = victim.get("/health")
    family = descendants(victim.process.pid)
    calls = CallsInFlight(victim)
    for pid in before["worker_pids"]:
        os.kill(pid, signal.SIGKILL)
    assert seconds_to_next_answer(victim) < MAX_RECOVERY_SECONDS
    assert [answer["status"] for answer in calls.answers()] == ["sandbox_error"] * WORKERS
    assert until(lambda: calm(victim))
    assert victim.get("/health")["zygote_pid"] == before["zygote_pid"]
    assert until(lambda: not any(map(running, set(family) - {before["zygote_pid"]})))


def test_the_death_of_zygote_and_workers_takes_a_new_start_and_no_more(victim):
    before = victim.get("/health")
    family = descendants(victim.process.pid)
    calls = CallsInFlight(victim)
    for pid in (before["zygote_pid"], *before["worker_pids"]):
        os.kill(pid, signal.SIGKILL)
    assert seconds_to_next_answer(victim) < 10 * MAX_RECOVERY_SECONDS  # it imports everything again
    assert [answer["status"] for answer in calls.answers()] == ["sandbox_error"] * WORKERS
    assert until(lambda: calm(victim))
    assert until(lambda: not any(map(running, family)))


def test_a_zygote_that_dies_costs_no_call(victim):
    zygote = victim.get("/health")["zygote_pid"]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(victim.execute, "import time; time.sleep(0.5); print('lived')", 20.0)
        time.sleep(0.2)
        os.kill(zygote, signal.SIGKILL)
        assert seconds_to_next_answer(victim) < MAX_RECOVERY_SECONDS
        assert call.result()["stdout"] == "lived\n"
    assert until(lambda: victim.get("/health")["zygote_pid"] != zygote)
    _, session, _ = victim.post("/v1/sessions")  # its worker is forked once the new zygote has imported all
    victim.request("DELETE", f"/v1/sessions/{session['session_id']}")
    for pid in victim.get("/health")["worker_pids"]:
        os.kill(pid, signal.SIGKILL)
        assert seconds_to_next_answer(victim) < MAX_RECOVERY_SECONDS
    assert until(lambda: calm(victim))


@pytest.mark.parametrize("tier", ALL)
def test_a_client_outlives_its_server(tier):
    """Killed in mid-call and started again on the same port; the client's call is answered in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [*QUICKLY, "--port", str(port)]
    launcher = launcher_for(tier)

    async def call(url: str) -> str:
        async with ExecutorClient(url) as client:
            result = await client.execute(
                "import time; time.sleep(0.5); print('answered')", run_timeout_seconds=20
            )
            return result.stdout

    first = Executor(tier, *arguments, launcher=launcher)
    family = descendants(first.process.pid)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(asyncio.run, call(first.url))
        time.sleep(0.3)
        first.process.kill()
        first.process.wait()
        first.process.stdout.close()
        with executor_with(tier, *arguments, launcher=launcher) as second:
            assert second.url == first.url
            assert seconds_to_next_answer(second) < MAX_RECOVERY_SECONDS
            assert answer.result(timeout=20) == "answered\n"
    assert until(lambda: not any(map(running, family)))
    assert server_cgroups(first.process.pid) == []


@pytest.fixture(params=ALL)
def cramped(request, tmp_path):
    """An executor whose TMPDIR is a file system of 1 MiB, and the path under which the test sees that."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64,mode=1777", "tmpfs", small],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system: {mounted.stderr}")
    try:
        for directory in tmp_path.parents:
            if directory.is_relative_to("/tmp/pytest-of-root"):
                directory.chmod(0o755)
        launcher = ["env", f"TMPDIR={small}", *launcher_for(request.param)]
        with executor_with(request.param, *QUICKLY, launcher=launcher) as executor:
            yield executor, small
        assert list(small.glob("ztrl-*")) == []
    finally:
        subprocess.run(["umount", small], check=True)


def fill(directory: Path) -> None:
    """Take the last byte and the last inode."""
    with contextlib.suppress(OSError):
        (directory / "filler").write_bytes(bytes(2 << 20))
    with contextlib.suppress(OSError):
        for number in range(100):
            (directory / f"filler-{number}").touch()
    assert os.statvfs(directory).f_bavail == 0 and os.statvfs(directory).f_ffree == 0


def test_a_full_disk_is_no_fault_of_the_snippet(cramped):
    executor, disk = cramped
    assert executor.execute(HONEST)["stdout"] == HONEST_OUTPUT
    fill(disk)
    uses_the_disk = executor.isolation == "basic"
    for _ in range(2 * WORKERS):
        result = executor.execute("print(1)")
        assert (result["status"], result["stdout"]) in [("ok", "1\n")] + [
            ("sandbox_error", "")
        ] * uses_the_disk
    for pid in executor.get("/health")["worker_pids"]:
        os.kill(pid, signal.SIGKILL)
    if not uses_the_disk:
        assert seconds_to_next_answer(executor) < MAX_RECOVERY_SECONDS
    for filler in disk.glob("filler*"):
        filler.unlink()
    assert seconds_to_next_answer(executor) < MAX_RECOVERY_SECONDS
    assert until(lambda: calm(executor))
