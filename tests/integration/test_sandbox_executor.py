"""A real executor in a process of its own, asked over HTTP; once for each isolation tier."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_server import (
    ENVIRONMENT,
    PACKAGE_ROOT,
    Executor,
    available_tiers,
    executor_with,
    running,
    stopped_in_time,
    until,
)
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer
from ztrl_sandbox.proctree import descendants


@pytest.fixture(scope="module", params=available_tiers())
def executor(request) -> Iterator[Executor]:
    with executor_with(
        request.param, "--workers", "2", "--memory-limit-bytes", str(300 << 20)
    ) as running_executor:
        yield running_executor


def test_a_snippet_prints_and_its_usage_is_reported(executor):
    code = "import sympy, time; x = bytearray(100 << 20); time.sleep(0.2); print(sympy.factorint(5040))"
    result = executor.execute(code)
    assert (result["status"], result["exit_code"]) == ("ok", 0)
    assert result["stdout"] == "{2: 4, 3: 2, 5: 1, 7: 1}\n" and result["stderr"] == ""
    assert 0.2 <= result["run_seconds"] < 10
    assert 100 << 20 < result["peak_memory_bytes"] < 300 << 20
    assert 0 < result["cpu_seconds"] < result["run_seconds"]


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "last_line"),
    [
        ("1 / 0", "error", 1, "ZeroDivisionError: division by zero"),
        ("def f(:", "error", 1, "SyntaxError: invalid syntax"),
        ("x = '\ud800'", "error", 1, None),
        ("x = '\0'", "error", 1, None),
        ("import sys; sys.exit('no')", "error", 1, "no"),
        ("import sys; sys.exit(7)", "error", 7, None),
        ("import os; os._exit(3)", "error", 3, None),
        ("import os; os._exit(0)", "ok", 0, None),
        ("import sys; sys.exit()", "ok", 0, None),
        ("import sys; sys.stdout.close()", "ok", 0, None),
        ("import atexit; atexit.register(print, 'bye')", "ok", 0, None),
        ("input()", "error", 1, "EOFError: EOF when reading a line"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", -9, None),
        ("import os; os.abort()", "killed", -6, None),
        ("import ctypes; ctypes.string_at(0)", "killed", -11, None),
        ("x = [0] * 10**9", "memory", 1, "MemoryError"),
        ("x = []\nwhile True: x.append(bytes(1 << 16))", "memory", 1, "MemoryError"),
        ("def f(): f()\nf()", "error", 1, "RecursionError: maximum recursion depth exceeded"),
        ("import threading\nthreading.Thread(target=print, args=(5,)).start()", "ok", 0, None),
    ],
)
def test_every_end_has_its_status(executor, code, status, exit_code, last_line):
    result = executor.execute(code)
    assert (result["status"], result["exit_code"]) == (status, exit_code), result
    if last_line is not None:
        assert result["stderr"].splitlines()[-1] == last_line


def test_memory_is_limited_across_the_processes_of_a_snippet(executor):
    code = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        x = bytearray(b"x" * (120 << 20))
        time.sleep(60)
time.sleep(60)
"""
    result = executor.execute(code, run_timeout_seconds=30.0)
    assert result["status"] == "memory" and result["run_seconds"] < 20
    assert until(executor.settled)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in range(10, 19): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "x = 3 ** (10 ** 9)",
        "import re; re.match('(a+)+b', 'a' * 64)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    ],
)
def test_what_does_not_end_is_stopped_in_time(executor, code):
    result = stopped_in_time(executor.execute, "print('before')\n" + code, 0.4)
    assert result["stdout"] == "before\n"
    assert result["run_seconds"] < 10


def test_long_output_is_cut_in_the_middle(executor):
    result = executor.execute("print('a' * 100_000 + 'b' * 100_000)")
    assert (result["status"], result["exit_code"]) == ("output_truncated", 0)
    assert result["stdout"].startswith("a" * 32768) and result["stdout"].endswith("b" * 32767 + "\n")
    assert "[134465 bytes of output cut]" in result["stdout"]


def test_a_flood_of_output_is_stopped_before_the_time_out(executor):
    result = executor.execute("while True: print('x' * 100_000)", run_timeout_seconds=60.0)
    assert result["status"] == "output_truncated" and result["exit_code"] == -9
    assert result["run_seconds"] < 20


def test_bytes_that_are_no_utf8_are_repaired(executor):
    result = executor.execute(r"import sys; sys.stdout.buffer.write(b'a\xff\x00b')")
    assert (result["status"], result["stdout"]) == ("ok", "a\ufffd\x00b")


def test_standard_input_is_what_the_request_says(executor):
    assert executor.execute("print(int(input()) + int(input()))", stdin="20\n22\n")["stdout"] == "42\n"


def test_a_traceback_shows_the_snippet_and_nothing_of_the_harness(executor):
    result = executor.execute("def f(x):\n    return 1 / x\n\nf(0)\n")
    files = [line for line in result["stderr"].splitlines() if line.lstrip().startswith("File ")]
    assert files == ['  File "snippet.py", line 4, in <module>', '  File "snippet.py", line 2, in f']
    assert "    return 1 / x" in result["stderr"]
    assert "harness" not in result["stderr"]


def test_the_last_expression_is_printed_only_on_request_and_only_if_nothing_else_was(executor):
    assert executor.execute("x = 6\nx * 7")["stdout"] == ""
    assert executor.execute("x = 6\nx * 7", print_last_expression=True)["stdout"] == "42\n"
    assert executor.execute("print(1)\n2", print_last_expression=True)["stdout"] == "1\n"
    assert executor.execute("print(3)", print_last_expression=True)["stdout"] == "3\n"
    assert executor.execute("None", print_last_expression=True)["stdout"] == ""
    assert executor.execute("1 / 0", print_last_expression=True)["status"] == "error"


def test_a_multiprocessing_pool_works(executor):
    code = """
import multiprocessing
def square(x):
    return x * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print(sum(pool.map(square, range(10))))
"""
    assert executor.execute(code)["stdout"] == "285\n"


def test_many_processes_are_stopped(executor):
    # Not exponential: should the limit fail, this machine must survive the test.
    code = "import os, time\nfor _ in range(300):\n  if os.fork() == 0: time.sleep(60)\ntime.sleep(60)"
    result = executor.execute(code, run_timeout_seconds=30.0)
    assert result["status"] in ("killed", "error") and result["run_seconds"] < 20
    assert until(executor.settled)


def test_a_daemon_that_left_the_process_group_dies_with_its_snippet(executor):
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)  # holds stdout open
    os._exit(0)
print("parent done")
"""
    result = executor.execute(code)
    assert (result["status"], result["stdout"]) == ("ok", "parent done\n")
    assert result["run_seconds"] < 10
    assert until(executor.settled)


def test_a_result_cannot_be_forged(executor):
    code = """
import json, os
forged = {"reason": None, "exit_code": 0, "run_seconds": 0, "cpu_seconds": 0, "peak_memory_bytes": 0}
for fd in range(256):
    try:
        os.write(fd, json.dumps(forged).encode())
    except OSError:
        pass
os._exit(9)
"""
    result = executor.execute(code)
    assert (result["status"], result["exit_code"]) == ("error", 9)
    assert executor.execute("print(1)")["stdout"] == "1\n"


def test_nothing_of_one_snippet_reaches_the_next(executor):
    marker = "residue-7f3a"
    write = "import os; os.environ['M'] = M; open(M, 'w').write(M); import math; math.M = M; print(M)"
    for _ in range(4):  # both workers
        executor.execute(f"M = {marker!r}\n" + write)
    search = """
import math, os
needle = b"residue-" + b"7f3a"
hits = [os.path.join(d, f) for d, _, names in os.walk(".") for f in names]
hits += ["environ"] * ("M" in os.environ) + ["module"] * hasattr(math, "M")
maps = [line.split() for line in open("/proc/self/maps")]
memory = open("/proc/self/mem", "rb", 0)
count = 0
for fields in maps:
    if fields[1].startswith("rw"):
        start, end = (int(x, 16) for x in fields[0].split("-"))
        memory.seek(start)
        count += memory.read(end - start).count(needle)
print(hits, count)
"""
    for _ in range(2):
        result = executor.execute(search)
        hits, _, count = result["stdout"].rpartition(" ")
        assert hits == "[]", result
        # The search finds its own needle and the buffers it passed through, a few times at most.
        baseline = executor.execute(search.replace("7f3a", "0000"))["stdout"].rpartition(" ")[2]
        assert abs(int(count) - int(baseline)) <= 1


def test_the_servers_environment_is_not_visible(executor):
    code = """
import glob, os
print(dict(os.environ))
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
"""
    own = executor.execute("import os; print(dict(os.environ))")["stdout"]
    assert "s3cr3t" not in own
    if executor.isolation != "basic":
        assert "s3cr3t" not in executor.execute(code)["stdout"]


def test_the_stronger_tiers_hide_the_host(executor):
    if executor.isolation == "basic":
        pytest.skip("the basic tier does not isolate from the host")
    port = executor.ready["port"]
    code = f"""
import os, socket
print([p for p in os.listdir("/proc") if p.isdigit()] == [str(os.getpid())], os.listdir("/snippet/work"))
print(os.path.exists({__file__!r}))
def attempt(action, *arguments):
    try:
        action(*arguments)
        print("allowed", action, arguments)
    except OSError as error:
        print(type(error).__name__)
attempt(open, "/etc/shadow")
attempt(open, "/usr/x", "w")
attempt(open, "/x", "w")
attempt(socket.create_connection, ("127.0.0.1", {port}), 1)
attempt(os.mkdir, "/snippet/tmp/../../x")
attempt(os.mkdir, "/usr/x")
attempt(os.chroot, ".")
attempt(os.chown, ".", 1, 1)
"""
    lines = executor.execute(code)["stdout"].splitlines()
    assert lines[0] == "True []"
    assert lines[1] == "False"
    assert lines[2] == "FileNotFoundError"
    assert lines[5] == "OSError"  # no network
    assert set(lines[3:5] + lines[6:]) <= {"PermissionError", "OSError"} and len(lines) == 10


def test_a_snippet_is_nobody(executor):
    status = executor.execute("print(open('/proc/self/status').read())")["stdout"]
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}
    assert fields["NoNewPrivs"] == "1"
    if executor.isolation == "basic":
        return
    assert {fields[f"Cap{kind}"] for kind in ("Prm", "Eff", "Inh", "Amb")} == {"0" * 16}
    assert fields["Seccomp"] == "2"
    assert (int(fields["Uid"].split()[0]) >= 61000) == (executor.isolation == "full")


def test_the_worker_is_out_of_reach(executor):
    if executor.isolation == "basic":
        pytest.skip("the basic tier's worker is an ordinary process of the same user")
    before = executor.get("/health")["worker_restarts"]
    code = """
import os, signal
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
for name in ("environ", "mem", "maps", "cwd", "root"):
    try:
        open(f"/proc/1/{name}", "rb").read(1)
        print("read", name)
    except OSError:
        pass
print(os.getppid())
"""
    for _ in range(2):
        assert executor.execute(code)["stdout"] == "1\n"
    assert executor.execute("print(1)")["stdout"] == "1\n"
    assert executor.get("/health")["worker_restarts"] == before


def test_scratch_space_is_limited_in_the_stronger_tiers(executor):
    if executor.isolation == "basic":
        pytest.skip("the basic tier limits the size of a file, not of the directory")
    code = "for k in range(3):\n  open(f'{k}', 'wb').write(bytes(40 << 20))"
    assert executor.execute(code)["stderr"].endswith("No space left on device\n")


def test_neighbours_of_hostile_snippets_get_their_right_answers(executor):
    hostile = [
        "import os; os.abort()",
        "import os\nfor _ in range(200):\n  if os.fork() == 0: os._exit(0)",
        "x = [0] * 10**9",
        "while True: print('x' * 100_000)",
        "import os; os.closerange(0, 1000)",
    ] * 4
    honest = [f"print(sum(range({n})))" for n in range(20)]
    with ThreadPoolExecutor(10) as threads:
        bad = [threads.submit(executor.execute, code, 5.0) for code in hostile]
        good = [threads.submit(executor.execute, code, 20.0) for code in honest]
        assert [future.result()["stdout"] for future in good] == [f"{sum(range(n))}\n" for n in range(20)]
        assert all(future.result()["status"] != "sandbox_error" for future in bad)
    assert until(executor.settled)


def test_two_hundred_concurrent_calls_all_get_their_own_answer(executor):
    async def scenario() -> list[str]:
        async with ExecutorClient(executor.url) as client:
            calls = [client.execute(f"print({n} ** 2)", run_timeout_seconds=30.0) for n in range(200)]
            return [result.stdout for result in await asyncio.gather(*calls)]

    assert asyncio.run(scenario()) == [f"{n**2}\n" for n in range(200)]


def test_a_cancelled_call_stops_its_snippet(executor):
    async def scenario() -> None:
        async with ExecutorClient(executor.url) as client:
            calls = [
                asyncio.create_task(client.execute("while True: pass", run_timeout_seconds=60.0))
                for _ in range(2)
            ]
            assert await asyncio.to_thread(until, lambda: not executor.idle_workers())
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())
    started_at = time.monotonic()
    assert executor.execute("print(1)")["stdout"] == "1\n"
    assert time.monotonic() - started_at < 30  # half of what the snippet would take


def test_a_client_that_hangs_up_stops_its_snippet(executor):
    sleep = "import time; time.sleep(60)"
    with executor.open_call("/v1/execute", sleep), executor.open_call("/v1/execute", sleep):
        assert until(lambda: not executor.idle_workers())
    started_at = time.monotonic()
    assert executor.execute("print(1)")["stdout"] == "1\n"
    assert time.monotonic() - started_at < 30  # half of what the snippet would take


def test_a_killed_worker_costs_one_call_and_is_replaced(executor):
    results: list[dict] = []
    threads = [
        threading.Thread(target=lambda: results.append(executor.execute("import time; time.sleep(60)", 60.0)))
        for _ in range(2)
    ]
    before = executor.get("/health")
    for thread in threads:
        thread.start()
    assert until(lambda: not executor.idle_workers())
    for pid in before["worker_pids"]:
        os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert [result["status"] for result in results] == ["sandbox_error"] * 2
    assert [result["message"] for result in results] == ["the worker died"] * 2
    assert executor.execute("print(1)")["stdout"] == "1\n"
    assert until(lambda: executor.get("/health")["worker_restarts"] == before["worker_restarts"] + 2)
    assert until(executor.settled)


def test_a_killed_zygote_is_replaced_when_a_worker_is_needed(executor):
    health = executor.get("/health")
    victim = health["worker_pids"][0]
    os.kill(health["zygote_pid"], signal.SIGKILL)
    assert executor.execute("print(1)")["stdout"] == "1\n"
    os.kill(victim, signal.SIGKILL)
    assert until(lambda: victim not in executor.get("/health")["worker_pids"])
    assert executor.execute("print(2)")["stdout"] == "2\n"
    assert until(lambda: len(executor.get("/health")["worker_pids"]) == 2)
    assert executor.get("/health")["zygote_pid"] != health["zygote_pid"]
    assert not running(victim)


def test_the_sandboxfusion_protocol_is_answered_in_its_shape(executor):
    status, answer, _ = executor.post(
        "/run_code",
        code="print(input())",
        stdin="hi",
        language="python",
        compile_timeout=10,
        run_timeout=10,
        request_id="r",
    )
    run_result = answer.pop("run_result")
    assert status == 200
    assert answer == {
        "status": "Success",
        "message": "",
        "compile_result": None,
        "executor_pod_name": None,
        "files": {},
    }
    assert run_result.pop("execution_time") < 10
    assert run_result == {"status": "Finished", "return_code": 0, "stdout": "hi\n", "stderr": ""}

    _, answer, _ = executor.post("/run_code", code="1 / 0", language="python")
    assert (answer["status"], answer["run_result"]["return_code"]) == ("Failed", 1)
    assert "ZeroDivisionError" in answer["run_result"]["stderr"]

    _, answer, _ = executor.post("/run_code", code="while True: pass", language="python", run_timeout=0.3)
    assert (answer["status"], answer["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")

    _, answer, _ = executor.post("/run_code", code="int main() {}", language="cpp")
    assert answer["status"] == "SandboxError" and "cpp" in answer["message"]


def test_requests_that_make_no_sense_are_refused(executor):
    assert executor.post("/v1/execute", code="1", run_timeout_seconds=-1)[0] == 422
    assert executor.post("/v1/execute", code="1", run_timeout_secs=1)[0] == 422
    status, answer, _ = executor.post("/v1/execute", code="#" * 2_000_000)
    assert (status, answer["status"]) == (413, "rejected")


def test_health_ready_and_metrics_tell_the_state(executor):
    health = executor.get("/health")
    assert health["isolation"] == executor.isolation and health["workers"] == 2
    assert executor.get("/ready") == {"ready": True, "workers": 2}
    with urllib.request.urlopen(executor.url + "/metrics") as response:
        text = response.read().decode()
    assert 'ztrl_sandbox_executions_total{status="ok"}' in text and "ztrl_sandbox_run_seconds_bucket" in text


def test_a_full_queue_answers_429_and_when_to_return():
    options = ("--workers", "1", "--queue-limit", "1", "--preload", "")
    with executor_with("auto", *options) as executor, ThreadPoolExecutor(1) as threads:
        with executor.open_call("/v1/execute", "import time; time.sleep(60)"):
            assert until(lambda: not executor.idle_workers())
            waiting = threads.submit(executor.execute, "print(2)")
            assert until(lambda: executor.get("/health")["queued"] == 1)
            began_to_wait_at = time.monotonic()
            status, answer, headers = executor.post("/v1/execute", code="1")
            assert (status, answer["status"]) == (429, "rejected")
            assert int(headers["retry-after"]) >= 1
            waited_seconds = time.monotonic() - began_to_wait_at
        result = waiting.result()
        assert (result["status"], result["stdout"]) == ("ok", "2\n")
        assert result["queue_seconds"] >= waited_seconds


@pytest.mark.parametrize("isolation", available_tiers())
def test_a_stop_answers_running_calls_and_leaves_nothing(isolation):
    mounts = Path("/proc/self/mounts").read_text()
    directory = Path(tempfile.mkdtemp())  # of this executor alone; others run on this machine
    directory.chmod(0o755)
    options = ("--preload", "", "--workers", "2")
    executor = Executor(isolation, *options, launcher=("env", f"TMPDIR={directory}"))
    assert isolation != "basic" or any(directory.iterdir())  # the others need none on the disk
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(executor.execute, "import time; time.sleep(30)", 30.0)
        assert until(lambda: executor.idle_workers() == 1)
        family = descendants(executor.process.pid)
        assert len(family) >= 5
        assert executor.stop() == 0
        assert call.result()["status"] == "sandbox_error"
    assert not any(map(running, family))
    assert Path("/proc/self/mounts").read_text() == mounts
    directory.rmdir()  # which would say if it were not empty


@pytest.mark.parametrize("isolation", available_tiers())
def test_everything_ends_with_a_server_that_is_killed(isolation):
    executor = Executor(isolation, "--preload", "")
    family = descendants(executor.process.pid)
    executor.process.kill()
    executor.process.wait()
    executor.process.stdout.close()
    assert until(lambda: not any(map(running, family)))


def test_the_process_helper_starts_and_stops_an_executor():
    async def scenario() -> tuple[str, int]:
        async with (
            ExecutorServer(workers=1, preload=["math"]) as server,
            ExecutorClient(server.url) as client,
        ):
            result = await client.execute("print(6 * 7)", run_timeout_seconds=20.0)
            return result.stdout, server.pid

    stdout, pid = asyncio.run(scenario())
    assert stdout == "42\n" and not running(pid)


def test_an_executor_ends_with_the_process_that_started_it():
    code = """
import asyncio, os
from ztrl_sandbox.process import ExecutorServer
async def main():
    server = ExecutorServer(workers=1, preload=[])
    await server.start()
    print(server.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    parent = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert until(lambda: not running(int(parent.stdout)))


def test_a_preload_that_cannot_be_imported_is_named():
    command = [sys.executable, "-m", "ztrl_sandbox", "serve", "--port", "0", "--preload", "no_such_module"]
    outcome = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30)
    assert outcome.returncode == 2
    assert "no_such_module" in outcome.stderr and outcome.stdout == ""


def test_the_command_line_runs_one_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("2 ** 10")
    command = ["-m", "ztrl_sandbox", "run", "--preload", "math", "--print-last-expression", str(script)]
    outcome = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=30
    )
    assert json.loads(outcome.stdout)["stdout"] == "1024\n"
    assert outcome.returncode == 0


def test_an_interpreter_that_lies_in_tmp_is_served_too(tmp_path):
    """A checkout in /tmp, with its environment: the snippet's own /tmp must not hide it."""
    venv.create(tmp_path / "venv", system_site_packages=True, symlinks=True)
    snippet = tmp_path / "snippet.py"
    snippet.write_text("import tempfile\nprint(tempfile.TemporaryFile().write(b'x'))")
    path = os.pathsep.join([PACKAGE_ROOT, *sys.path])
    finished = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-m", "ztrl_sandbox", "run", snippet, "--preload", "math"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["stdout"] == "1\n"
