"""Snippets that multiply, kill, or end in unusual ways."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pyseccomp as seccomp
import pytest
from hostile import (
    HONEST,
    HONEST_OUTPUT,
    QUICKLY,
    WORKERS,
    Case,
    attempt,
    launcher_for,
    on_every_claiming_tier,
    on_tiers,
    undisturbed,
    withstand,
)
from sandbox_server import executor_with, until
from ztrl_sandbox.proctree import descendants

FORK_BOMB = "import os, time\nfor _ in range(300):\n  if os.fork() == 0: time.sleep(60)\ntime.sleep(60)"
"""Not exponential: should the limit fail, this machine must survive the test."""

THREAD_BOMB = (
    "import threading, time\n"
    "for _ in range(300): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\ntime.sleep(60)"
)

DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)  # holds stdout open
    os._exit(0)
print("parent done")
"""

CLONE_PARENT = """
import ctypes, signal, time
CLONE_PARENT = 0x8000
libc = ctypes.CDLL(None)
if libc.syscall({clone}, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
    time.sleep(60)
print("done")
"""

ADOPTER = """
import ctypes, os, time
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
print("done")
"""

ORPHANS = """
import os, time
def fork():
    while True:  # the worker buries the dead at intervals
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.01)
for _ in range(150):  # more than there may be at once
    if fork() == 0:
        fork()
        os._exit(0)
    os.wait()
print("done")
"""

POOLS = """
import concurrent.futures, multiprocessing
from multiprocessing import shared_memory
def square(x):
    return x * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print(sum(pool.map(square, range(10))))
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        print(sum(pool.map(square, range(10))))
    block = shared_memory.SharedMemory(create=True, size=64)
    block.buf[0] = 7
    again = shared_memory.SharedMemory(block.name)
    print(again.buf[0])
"""


THREADS = """
import threading
from concurrent.futures import ThreadPoolExecutor
all_started = threading.Barrier(16)
with ThreadPoolExecutor(16) as threads:
    print(sorted(threads.map(lambda _: all_started.wait(15), range(16))))
"""


def multiplying() -> list[Case]:
    # Where the user id is its own the kernel refuses the 129th process; else the worker sees it.
    refused = {"full": "error", "user": "error", "basic": "killed"}
    return [
        Case(name="fork bomb", claim="processes", code=FORK_BOMB, status=refused),
        Case(name="thread bomb", claim="processes", code=THREAD_BOMB, status="error"),
        Case(
            name="children that nobody waits for",
            claim="processes",
            code="import os\nfor _ in range(100):\n  if os.fork() == 0: os._exit(0)",
        ),
        Case(
            name="orphans, few at a time",
            claim="processes",
            code=ORPHANS,
            stdout="done\n",
            run_timeout_seconds=60.0,
            max_run_seconds=60.0,
        ),
        Case(name="daemon holding stdout", claim="processes", code=DAEMON, stdout="parent done\n"),
        Case(name="child of the worker", claim="processes", code=clone_parent(), stdout="done\n"),
        Case(name="adopter of daemons", claim="processes", code=ADOPTER, stdout="done\n"),
        Case(name="process pools", claim="processes", code=POOLS, stdout="285\n285\n7\n"),
        Case(name="sixteen threads", claim="processes", code=THREADS, stdout=f"{list(range(16))}\n"),
    ]


def clone_parent() -> str:
    return CLONE_PARENT.format(clone=seccomp.resolve_syscall(seccomp.Arch.NATIVE, "clone"))


@on_every_claiming_tier(multiplying())
def test_every_process_is_counted_and_ends_with_the_snippet(executor, case):
    withstand(executor, case)


def by_signal(number: int, **more) -> dict:
    code = f"print('before')\nimport os\nos.kill(os.getpid(), {number})"
    return {
        "code": code,
        "claim": "results",
        "status": "killed",
        "exit_code": -number,
        "stdout": "before\n",
        **more,
    }


ENDS = [
    *(
        Case(name=f"its own {number.name}", **by_signal(number))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGSYS, signal.SIGRTMAX)
    ),
    Case(name="its own SIGINT", **by_signal(signal.SIGINT, status="error", exit_code=1)),
    Case(name="os.abort", claim="results", code="import os; os.abort()", status="killed", exit_code=-6),
    Case(
        name="null pointer",
        claim="results",
        code="import ctypes; ctypes.string_at(0)",
        status="killed",
        exit_code=-11,
    ),
    Case(name="os._exit", claim="results", code="import os; os._exit(3)", status="error", exit_code=3),
    Case(
        name="os._exit of a thread",
        claim="results",
        code="import os, threading, time\nthreading.Thread(target=os._exit, args=(4,)).start()\ntime.sleep(60)",
        status="error",
        exit_code=4,
    ),
    Case(
        name="killed by its child",
        claim="results",
        code="import os, time\nif os.fork() == 0: os.kill(os.getppid(), 9)\ntime.sleep(60)",
        status="killed",
        exit_code=-9,
    ),
    Case(
        name="another program's exit code",
        claim="results",
        code="import os; os.execv('/bin/sh', ['sh', '-c', 'exit 5'])",
        status="error",
        exit_code=5,
    ),
]


@on_every_claiming_tier(ENDS)
def test_an_end_of_its_own_making_is_told_apart(executor, case):
    withstand(executor, case)


KILLERS = [
    Case(
        name="kill everybody",
        claim="processes that are not its own",
        code="import os, signal\ntry:\n  os.kill(-1, 9)\nexcept OSError: pass\nprint('alive')",
        stdout="alive\n",
    ),
    Case(
        name="stop everybody",
        claim="processes that are not its own",
        code="import os, signal\ntry:\n  os.kill(-1, signal.SIGSTOP)\nexcept OSError: pass\nprint('alive')",
        stdout="alive\n",
    ),
    Case(
        name="every signal to the parent",
        claim="processes that are not its own",
        code=(
            "import os, signal\nfor s in range(1, 65):\n  try:\n    os.kill(os.getppid(), s)\n"
            "  except OSError: pass\nprint('alive')"
        ),
        stdout="alive\n",
    ),
    Case(
        name="every process that there may be",
        claim="processes that are not its own",
        code=(
            "import os\nkilled = 0\nfor pid in range(1, 40000):\n  if pid == os.getpid(): continue\n"
            "  try:\n    os.kill(pid, 9)\n    killed += pid != 1\n  except OSError: pass\nprint(killed)"
        ),
        stdout="0\n",
    ),
    Case(
        name="the worker's limits and priority",
        claim="processes that are not its own",
        code=attempt(
            "import os, resource",
            "resource.prlimit(1, resource.RLIMIT_NOFILE, (8, 8))",
            "os.setpriority(os.PRIO_PROCESS, 1, 19)",
            "os.sched_setaffinity(1, {0})",
            "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
        ),
        stdout="denied\n" * 4,
    ),
    Case(
        name="the worker's memory and descriptors",
        claim="processes that are not its own",
        code=attempt(
            "import os",
            "open('/proc/1/mem', 'rb+')",
            "open('/proc/1/maps').read()",
            "os.listdir('/proc/1/fd')",
            "open('/proc/1/oom_score_adj', 'w').write('1000')",
        ),
        stdout="denied\n" * 4,
    ),
]


@on_every_claiming_tier(KILLERS)
def test_other_processes_are_out_of_reach(executor, case):
    withstand(executor, case)


@on_tiers("processes that are not its own")
def test_the_priority_of_a_slot_is_no_snippets_to_lower(executor):
    lower = (
        "import os\nfor kind in (os.PRIO_USER, os.PRIO_PGRP, os.PRIO_PROCESS):\n  os.setpriority(kind, 0, 19)"
    )
    for _ in range(WORKERS):
        executor.execute(lower)
    priorities = [executor.execute("import os; print(os.nice(0))")["stdout"] for _ in range(WORKERS)]
    assert priorities == ["0\n"] * WORKERS


HUNDRED_PROCESSES = """
import os, time
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        break
print("full", flush=True)
time.sleep(1)
"""


@on_tiers("processes")
def test_the_limits_of_one_executor_are_not_those_of_another(executor):
    tier = executor.isolation
    with (
        executor_with(tier, *QUICKLY, launcher=launcher_for(tier)) as other,
        ThreadPoolExecutor(WORKERS) as threads,
    ):
        before = len(descendants(executor.process.pid))
        hoards = [threads.submit(executor.execute, HUNDRED_PROCESSES) for _ in range(WORKERS)]
        assert until(lambda: len(descendants(executor.process.pid)) > before + 200 or hoards[0].done())
        answers = [other.execute(HONEST) for _ in range(WORKERS)]
        assert [(answer["status"], answer["stdout"]) for answer in answers] == [
            ("ok", HONEST_OUTPUT)
        ] * WORKERS


BUSY_CHILDREN = "import os\nfor _ in range(60):\n  if os.fork() == 0: break\nwhile True: pass"


@pytest.mark.alone
@on_tiers("processes")
def test_sixty_busy_processes_slow_a_neighbour_down_by_a_second_at_most(executor):
    with undisturbed(executor), ThreadPoolExecutor(1) as threads:
        hostile = threads.submit(executor.execute, BUSY_CHILDREN, 1.0)
        slowest_seconds = 0.0
        while not hostile.done():
            started_at = time.monotonic()
            executor.execute(HONEST)
            slowest_seconds = max(slowest_seconds, time.monotonic() - started_at)
    assert slowest_seconds < 1
    assert hostile.result()["status"] == "timeout"
