"""Sessions of a real executor: what persists, what does not, and how each of them can end."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from sandbox_server import (
    Executor,
    announced,
    announcing,
    available_tiers,
    executor_with,
    running,
    stopped_in_time,
    until,
)
from ztrl_sandbox.handles import ZygoteHandle
from ztrl_sandbox.proctree import descendants
from ztrl_sandbox.protocol import Limits

HOLDS_ON = "import time; print('begun', flush=True); time.sleep(60)"
OPTIONS = ("--workers", "2", "--preload", "math", "--memory-limit-bytes", str(300 << 20))


@pytest.fixture(scope="module", params=available_tiers())
def executor(request):
    with executor_with(request.param, *OPTIONS) as running_executor:
        yield running_executor


@pytest.fixture(scope="module")
def strongest():
    with executor_with("auto", *OPTIONS, "--max-sessions", "3") as running_executor:
        yield running_executor


class Session:
    """One session over HTTP, deleted at the end of its test."""

    made: ClassVar[list["Session"]] = []

    def __init__(self, executor: Executor, **options) -> None:
        status, self.opened, _ = executor.post("/v1/sessions", **options)
        assert status == 201, self.opened
        self.id = self.opened["session_id"]
        self.path = f"/v1/sessions/{self.id}"
        self._executor = executor
        Session.made.append(self)

    def post(self, code: str, run_timeout_seconds: float = 20.0, **options) -> tuple[int, dict, dict]:
        body = {"code": code, "run_timeout_seconds": run_timeout_seconds, **options}
        return self._executor.post(self.path + "/execute", **body)

    def execute(self, code: str, run_timeout_seconds: float = 20.0, **options) -> dict:
        status, answer, _ = self.post(code, run_timeout_seconds, **options)
        assert status == 200, answer
        return answer

    def open_call(self, code: str) -> contextlib.AbstractContextManager[None]:
        return self._executor.open_call(self.path + "/execute", code)

    def describe(self) -> dict:
        return self._executor.get(self.path)

    def pending(self, count: int) -> Callable[[], bool]:
        """Whether so many calls run or wait."""
        return lambda: self.describe()["pending_calls"] == count

    def loss(self) -> str:
        """What a lost session says of itself."""
        status, answer, _ = self.post("print(1)")
        assert status == 404, answer
        assert self._executor.request("GET", self.path)[:2] == (404, answer)
        return answer["detail"]

    def delete(self) -> int:
        return self._executor.request("DELETE", self.path)[0]


@pytest.fixture
def session(executor):
    return Session(executor)


@pytest.fixture(autouse=True)
def no_session_is_left():
    yield
    while Session.made:
        with contextlib.suppress(urllib.error.URLError):  # its executor may be gone
            Session.made.pop().delete()


def metric(executor: Executor, line: str) -> float:
    with urllib.request.urlopen(executor.url + "/metrics") as response:
        text = response.read().decode()
    return float(re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)[1])


def test_variables_imports_and_files_persist(session):
    assert session.execute("import json as j\nx = [1]\nopen('f', 'w').write('kept')")["stdout"] == ""
    assert session.execute("def double(n):\n  return 2 * n\nx.append(double(21))")["status"] == "ok"
    result = session.execute("print(j.dumps(x), open('f').read(), __name__)")
    assert (result["stdout"], result["session_alive"]) == ("[1, 42] kept __main__\n", True)
    assert result["message"] == "" and result["run_seconds"] < 10


def test_output_input_and_expressions_belong_to_their_own_call(session):
    assert session.execute("print('a'); line = input()", stdin="one\n")["stdout"] == "a\n"
    result = session.execute("import sys; print(input(), line, file=sys.stderr)", stdin="two\n")
    assert (result["stdout"], result["stderr"]) == ("", "two one\n")
    assert session.execute("line * 2", print_last_expression=True)["stdout"] == "'oneone'\n"
    assert session.execute("line * 2")["stdout"] == ""


def test_two_sessions_do_not_see_each_other(executor):
    one, two = Session(executor), Session(executor)
    assert one.id != two.id and min(len(one.id), len(two.id)) >= 32
    one.execute("import math; secret = math.marker = 5; open('f', 'w').write('5')")
    see = "import math, os\nprint('secret' in globals(), hasattr(math, 'marker'), os.path.exists('f'))"
    for stdout in (two.execute(see)["stdout"], executor.execute(see)["stdout"]):
        assert stdout == "False False False\n"
    assert one.execute("print(secret)")["stdout"] == "5\n"


def test_an_error_leaves_the_session_alive(session):
    session.execute("x = 1")
    failed = session.execute("y = 2\n1 / 0")
    assert (failed["status"], failed["exit_code"], failed["session_alive"]) == ("error", 1, True)
    assert failed["stderr"].splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert session.execute("x += ")["stderr"].splitlines()[-1] == "SyntaxError: invalid syntax"
    assert session.execute("print(x, y)")["stdout"] == "1 2\n"


def test_running_out_of_memory_leaves_the_session_alive_if_it_could_be_told(session):
    session.execute("x = 1")
    full = session.execute("y = bytearray(10**10)")
    assert (full["status"], full["session_alive"]) == ("memory", True)
    assert session.execute("print(x)")["stdout"] == "1\n"


def test_code_that_stops_when_interrupted_keeps_the_state(session):
    session.execute("x = 1")
    late = stopped_in_time(session.execute, "x = 2\nprint('set', flush=True)\nwhile True: pass", 0.5)
    assert (late["status"], late["session_alive"]) == ("timeout", True)
    assert late["stderr"].splitlines()[-1] == "KeyboardInterrupt"
    assert 0.5 <= late["run_seconds"] < 10
    assert session.execute("print(x)")["stdout"] == "2\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import sys; sys.exit(3)", "error"),
        ("import os; os._exit(0)", "ok"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        (f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{HOLDS_ON}", "timeout"),
        (f"while True:\n  try:\n    {HOLDS_ON}\n  except BaseException: pass", "timeout"),
    ],
)
def test_a_session_whose_process_ends_is_lost_and_says_so(executor, code, status):
    session = Session(executor)
    ends_late = status == "timeout"
    result = stopped_in_time(session.execute, code, 0.5) if ends_late else session.execute(code)
    assert (result["status"], result["session_alive"]) == (status, False)
    assert result["message"].startswith("the session has ended: its process ended")
    assert session.loss().startswith("the session has ended and its state is lost: its process ended")
    assert session.delete() == 404
    assert until(executor.settled)


def test_what_a_session_starts_ends_with_it(executor):
    session = Session(executor)
    code = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\n  os._exit(0)"
    assert session.execute(code)["session_alive"]
    assert session.execute("print(1)")["stdout"] == "1\n"
    assert not executor.settled()
    assert session.delete() == 204
    assert until(executor.settled)


def test_calls_of_one_session_run_in_the_order_of_their_arrival(session):
    session.execute("x = []")
    calls = []
    with ThreadPoolExecutor(10) as pool:
        with session.open_call("import time; time.sleep(60)"):
            assert until(session.pending(1))
            for number in range(10):
                calls.append(pool.submit(session.execute, f"x.append({number})"))
                assert until(session.pending(number + 2))
            time.sleep(0.5)
        results = [call.result() for call in calls]
    assert session.execute("print(x)")["stdout"] == f"{list(range(10))}\n"
    assert all(result["queue_seconds"] >= 0.5 and result["run_seconds"] < 30 for result in results)


def test_sessions_run_beside_each_other_and_beside_other_calls(executor):
    sessions = [Session(executor) for _ in range(2)]
    names = [f"beside-{number}" for number in range(4)]
    codes = [announcing(name, "import time; time.sleep(60)") for name in names]
    with contextlib.ExitStack() as calls:
        for code, session in zip(codes[:2], sessions, strict=True):
            calls.enter_context(session.open_call(code))
        for code in codes[2:]:
            calls.enter_context(executor.open_call("/v1/execute", code))
        assert until(lambda: announced(executor, *names))


def test_a_client_that_hangs_up_interrupts_its_code_and_keeps_the_session(executor, session):
    session.execute("x = 1")
    with session.open_call("x = 2\n" + announcing("x-is-2", "while True: pass")):
        assert until(lambda: announced(executor, "x-is-2"))
    started_at = time.monotonic()
    assert session.execute("print(x)")["stdout"] == "2\n"
    assert time.monotonic() - started_at < 30
    assert session.describe()["calls"] == 3


def test_a_client_that_hangs_up_while_it_waits_never_runs(executor, session):
    with session.open_call("import time; x = 1\n" + announcing("x-is-1", "time.sleep(60)")):
        assert until(lambda: announced(executor, "x-is-1"))
        with session.open_call("x = 2"):
            assert until(session.pending(2))
        assert until(session.pending(1))
    assert session.execute("print(x)")["stdout"] == "1\n"
    assert session.describe()["calls"] == 2


def test_a_session_describes_itself(executor):
    session = Session(executor, ttl_seconds=30, memory_limit_bytes=200 << 20)
    fresh = session.describe()
    assert fresh["idle_seconds"] >= 0 and {**fresh, "idle_seconds": 0} == {
        "session_id": session.id,
        "state": "idle",
        "pending_calls": 0,
        "ttl_seconds": 30,
        "idle_seconds": 0,
        "memory_limit_bytes": 200 << 20,
        "calls": 0,
        "max_calls": 10_000,
        "run_seconds": 0,
        "max_run_seconds": 3600,
    }
    session.execute("import time; time.sleep(0.2)")
    used = session.describe()
    assert used["calls"] == 1 and 0.1 <= used["run_seconds"] < 5


def test_a_sessions_memory_limit_is_set_when_it_is_opened(executor):
    session = Session(executor, memory_limit_bytes=100 << 20)
    result = session.execute("x = b'x' * (150 << 20)")
    assert result["status"] == "memory"
    if result["session_alive"]:
        assert session.post("1", memory_limit_bytes=50 << 20)[0] == 422
        assert session.delete() == 204


def test_a_thread_that_floods_between_calls_does_not_block_the_server(executor, session):
    code = "import threading\n"
    code += "def flood():\n  while True:\n    try: print('x' * 100_000)\n    except Exception: pass\n"
    code += "threading.Thread(target=flood, daemon=True).start()"
    assert session.execute(code)["status"] in ("ok", "output_truncated")
    started_at = time.monotonic()
    assert executor.execute("print(1)")["stdout"] == "1\n"
    assert time.monotonic() - started_at < 30


def test_an_unknown_session_is_told_from_an_ended_one(executor):
    status, answer, _ = executor.post("/v1/sessions/no-such-session/execute", code="1")
    assert status == 404 and answer["detail"].startswith("unknown session")
    session = Session(executor)
    assert session.delete() == 204
    assert session.loss().endswith("it was deleted")


def test_deleting_a_session_ends_what_runs_in_it(executor):
    session = Session(executor)
    with ThreadPoolExecutor(2) as pool:
        running_call = pool.submit(session.execute, "import time; time.sleep(60)", 60.0)
        assert until(session.pending(1))
        waiting_call = pool.submit(session.post, "1")
        assert until(session.pending(2))
        assert session.delete() == 204
        result = running_call.result()
        assert (result["status"], result["session_alive"]) == ("sandbox_error", False)
        assert result["message"].endswith("it was deleted")
        assert waiting_call.result()[0] == 404
    assert until(executor.settled)


def test_a_session_expires_when_it_is_not_used(strongest):
    expired = metric(strongest, 'ztrl_sandbox_sessions_ended_total{cause="expired"}')
    session = Session(strongest, ttl_seconds=3)
    opened_at = time.monotonic()
    while time.monotonic() < opened_at + 3.2:  # use prolongs its life
        assert session.execute("import time; time.sleep(0.3)")["session_alive"]
    session.execute("import time; time.sleep(3.2)")  # and a running call is no idleness
    assert session.execute("print(1)")["session_alive"]
    assert until(lambda: strongest.get("/health")["sessions"] == 0)
    assert session.loss().endswith("it expired after 3 s without a call")
    assert metric(strongest, 'ztrl_sandbox_sessions_ended_total{cause="expired"}') == expired + 1
    assert metric(strongest, "ztrl_sandbox_sessions") == 0


def test_the_longest_unused_session_makes_room_for_a_new_one(strongest):
    oldest, used, other = (Session(strongest) for _ in range(3))
    oldest.execute("x = 1")
    for session in (other, used):
        session.execute("x = 1")
    newest = Session(strongest)
    assert oldest.loss().endswith("it was the longest unused of 3 sessions, and a new one came")
    assert all(session.execute("print(1)")["status"] == "ok" for session in (used, other, newest))


def test_no_session_is_evicted_while_it_is_in_use(strongest):
    sessions = [Session(strongest) for _ in range(3)]
    with contextlib.ExitStack() as calls:
        for session in sessions:
            calls.enter_context(session.open_call("import time; time.sleep(60)"))
        assert until(lambda: all(session.describe()["state"] == "busy" for session in sessions))
        status, answer, headers = strongest.post("/v1/sessions")
        assert status == 429 and "3 sessions are in use" in answer["detail"]
        assert int(headers["retry-after"]) >= 1
    assert all(session.execute("print(1)")["session_alive"] for session in sessions)
    Session(strongest)


def test_a_session_ends_at_its_caps():
    options = ("--session-max-calls", "3", "--session-max-run-seconds", "1")
    with executor_with("auto", *OPTIONS, *options) as executor:
        session = Session(executor)
        assert [session.execute("print(1)")["session_alive"] for _ in range(3)] == [True, True, False]
        assert session.loss().endswith("it has made its 3 calls")
        session = Session(executor)
        run_seconds, alive = 0.0, True
        while alive:
            result = session.execute("import time; time.sleep(0.6); print('done')")
            run_seconds, alive = run_seconds + result["run_seconds"], result["session_alive"]
            assert (result["status"], result["stdout"], alive) == ("ok", "done\n", run_seconds < 1)
        assert session.loss().endswith("it has run for its 1 s")


def test_too_many_waiting_calls_get_429():
    with executor_with("auto", "--workers", "1", "--preload", "", "--queue-limit", "1") as executor:
        session = Session(executor)
        sleep = "import time; time.sleep(60)"
        with session.open_call(sleep), session.open_call(sleep):
            assert until(session.pending(2))
            status, answer, headers = session.post("1")
            assert (status, answer["status"], answer["session_alive"]) == (429, "rejected", True)
            assert int(headers["retry-after"]) >= 1


def test_a_session_whose_worker_is_killed_is_lost_and_says_so(strongest):
    assert until(strongest.settled)
    before = set(descendants(strongest.process.pid))
    session = Session(strongest)
    lost = metric(strongest, 'ztrl_sandbox_sessions_ended_total{cause="deleted"}')
    answers: list[dict] = []
    call = threading.Thread(
        target=lambda: answers.append(session.execute("import time; time.sleep(30)", 60.0))
    )
    call.start()
    assert until(session.pending(1))
    for pid in set(descendants(strongest.process.pid)) - before:
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    call.join(timeout=60)
    assert (answers[0]["status"], answers[0]["session_alive"]) in (
        ("sandbox_error", False),
        ("killed", False),
    )
    assert "died" in session.loss() or "ended" in session.loss()
    assert metric(strongest, 'ztrl_sandbox_sessions_ended_total{cause="deleted"}') == lost
    assert strongest.get("/health")["worker_restarts"] == 0
    assert until(strongest.settled)


def test_sessions_outlive_the_zygote_and_new_ones_get_another(strongest):
    session = Session(strongest)
    session.execute("x = 1")
    victim = strongest.get("/health")["zygote_pid"]
    os.kill(victim, signal.SIGKILL)
    other = Session(strongest)
    assert other.execute("print('x' in globals())")["stdout"] == "False\n"
    assert session.execute("print(x)")["stdout"] == "1\n"
    assert strongest.get("/health")["zygote_pid"] != victim


def test_a_zygote_that_has_closed_its_socket_forks_no_more_although_it_is_not_dead(tmp_path):
    async def scenario():
        zygote = ZygoteHandle(
            preload=(), isolation="basic", limits=Limits(), scratch_root=tmp_path / "slots", cgroups=None
        )
        await zygote.wait_ready()
        assert zygote.alive
        os.kill(zygote.pid, signal.SIGSTOP)  # so that it stays between the two for as long as this needs
        try:
            zygote._socket.shutdown(socket.SHUT_RDWR)
            assert not zygote.alive
            assert running(zygote.pid)
        finally:
            os.kill(zygote.pid, signal.SIGCONT)
            await zygote.close()

    asyncio.run(scenario())


def test_a_stop_ends_the_sessions():
    executor = Executor("auto", *OPTIONS)
    session = Session(executor)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(session.execute, "import time; time.sleep(30)", 60.0)
        assert until(session.pending(1))
        family = descendants(executor.process.pid)
        assert executor.stop() == 0
        assert (call.result()["status"], call.result()["session_alive"]) == ("sandbox_error", False)
    assert not any(map(running, family))
