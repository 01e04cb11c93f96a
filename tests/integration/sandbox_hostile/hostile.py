"""What a hostile snippet is, which tier claims to withstand it, and what withstanding means."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sandbox_server import ENVIRONMENT, Executor, executor_with, stopped_in_time, until
from ztrl_sandbox import tiers

ALL = ("full", "user", "basic")
ISOLATED = ("full", "user")

CLAIMS = {
    "time": ALL,
    "memory": ALL,
    "memory that no process has mapped": ISOLATED,
    "memory of the kernel": ("full",),
    "processes": ALL,
    "processes that are not its own": ISOLATED,
    "descriptors": ALL,
    "file size": ALL,
    "scratch space": ISOLATED,
    "files of the host": ISOLATED,
    "residue in the working directory": ALL,
    "residue elsewhere": ISOLATED,
    "environment": ALL,
    "network": ISOLATED,
    "kernel": ISOLATED,
    "streams": ALL,
    "results": ALL,
}
"""What may go wrong, and the tiers that claim to prevent it (sandbox/README.md)."""

WORKERS = 2
OPTIONS = ("--workers", str(WORKERS), "--memory-limit-bytes", str(300 << 20), "--preload", "math,sympy,numpy")

QUICKLY = (*OPTIONS, "--preload", "math")
"""For an executor that is started for one test."""

HONEST = """
import os, tempfile
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("6")
    file.seek(0)
    factor = int(file.read())
pid = os.fork()
if pid == 0:
    os._exit(7)
print(factor * os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
HONEST_OUTPUT = "42\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile snippet and the answer that it must get; None: anything will do."""

    name: str
    claim: str
    """Of :data:`CLAIMS`."""
    code: str
    status: str | dict[str, str] = "ok"
    """For all tiers, or for each."""
    exit_code: int | None = None
    stdout: str | None = None
    stderr_end: str | None = None
    run_timeout_seconds: float = 20.0
    max_run_seconds: float = 18.0
    endless: bool = False
    """It prints and is stopped by the time-out."""
    options: dict = field(default_factory=dict)
    """Further fields of the request."""


def on_every_claiming_tier(cases: Iterable[Case]):
    """Parametrise ``executor`` and ``case``."""
    cases = list(cases)
    return pytest.mark.parametrize(
        ("executor", "case"),
        [
            pytest.param(tier, case, id=f"{case.name}-{tier}")
            for tier in ALL
            for case in cases
            if tier in CLAIMS[case.claim]
        ],
        indirect=["executor"],
    )


def on_tiers(claim: str):
    """Parametrise ``executor`` with the tiers that make this claim."""
    return pytest.mark.parametrize("executor", CLAIMS[claim], indirect=True)


def withstand(executor: Executor, case: Case) -> dict:
    """Run it beside a neighbour; the answer is as expected, the neighbour's are right, and nothing is left."""
    run = functools.partial(stopped_in_time, executor.execute) if case.endless else executor.execute
    with undisturbed(executor):
        result = run(case.code, case.run_timeout_seconds, **case.options)
    status = case.status if isinstance(case.status, str) else case.status[executor.isolation]
    assert result["status"] == status, result
    for name in ("exit_code", "stdout"):
        expected = getattr(case, name)
        assert expected is None or result[name] == expected, result
    assert case.stderr_end is None or result["stderr"].rstrip().endswith(case.stderr_end), result
    assert result["run_seconds"] < case.max_run_seconds, result
    return result


def attempt(setup: str, *actions: str) -> str:
    """Code that tries each action and prints ``done`` or ``denied``."""
    tries = "".join(f"attempt(lambda: {action})\n" for action in actions)
    return f"""
def attempt(action):
    try:
        action()
    except OSError:
        print("denied")
    else:
        print("done")
{setup}
{tries}"""


MEMORY_SEARCH = """
needle = b"".join([{halves}])
found = 0
with open("/proc/self/mem", "rb", 0) as memory:
    for line in open("/proc/self/maps"):
        fields = line.split()
        if fields[1].startswith("r") and fields[-1] not in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            start, end = (int(x, 16) for x in fields[0].split("-"))
            memory.seek(start)
            found += memory.read(end - start).count(needle)
print(found - {own})
"""


def memory_search(needle: str) -> str:
    """Prints how often ``needle`` is in the snippet's memory, its own copies apart."""
    half = len(needle) // 2
    halves = f"b{needle[:half]!r}, b{needle[half:]!r}"
    return MEMORY_SEARCH.format(halves=halves, own=1)


def calm(executor: Executor) -> bool:
    """Whether every worker is up and no process is there that need not be."""
    return len(executor.get("/health")["worker_pids"]) == WORKERS and executor.settled()


class undisturbed:  # reads as what it asserts
    """Asserts that what happens inside disturbs no honest snippet, kills no worker and leaves no process."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._over = threading.Event()
        self._wrong: list[dict] = []
        self._neighbour = threading.Thread(target=self._call_until_over)

    def _call_until_over(self) -> None:
        while not self._over.wait(0.02):
            result = self._executor.execute(HONEST)
            if (result["status"], result["stdout"]) != ("ok", HONEST_OUTPUT):
                self._wrong.append(result)

    def __enter__(self) -> None:
        assert until(lambda: calm(self._executor))  # an earlier test may have cost it a worker
        self._workers = self._executor.get("/health")["worker_pids"]
        self._neighbour.start()

    def __exit__(self, kind, error, traceback) -> None:
        self._over.set()
        self._neighbour.join()
        if kind is not None:
            return
        assert not self._wrong, self._wrong[0]
        for _ in range(WORKERS):  # the queue of idle workers is first in, first out: each is asked once
            result = self._executor.execute(HONEST)
            assert (result["status"], result["stdout"]) == ("ok", HONEST_OUTPUT), result
        assert until(lambda: calm(self._executor))
        assert self._executor.get("/health")["worker_pids"] == self._workers


class Executors:
    """One executor for each tier, started when first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: dict[str, Executor] = {}

    def __getitem__(self, tier: str) -> Executor:
        if tier not in self._running:
            launcher = launcher_for(tier)
            self._running[tier] = self._stack.enter_context(executor_with(tier, *OPTIONS, launcher=launcher))
        return self._running[tier]

    def stop(self) -> None:
        self._stack.close()


def launcher_for(tier: str) -> tuple[str, ...]:
    """What starts an executor of this tier as who it is meant for. Skips the test where that cannot be done."""
    launcher, obstacle = _launcher_and_obstacle(tier)
    if obstacle is not None:
        pytest.skip(obstacle)
    return launcher


@functools.cache
def _launcher_and_obstacle(tier: str) -> tuple[tuple[str, ...], str | None]:
    if tier == "user" and os.geteuid() == 0:
        launcher = (sys.executable, str(Path(__file__).with_name("as_nobody.py")))
        probe = (
            *launcher,
            sys.executable,
            "-m",
            "ztrl_sandbox",
            "doctor",
            "--isolation",
            tier,
            "--preload",
            "",
        )
        attempt = subprocess.run(
            probe, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
        )
        if attempt.returncode != 0:
            return launcher, f"the user tier cannot run as a user that is not root: {attempt.stderr[-500:]}"
        return launcher, None
    try:
        tiers.choose(tier)
    except ValueError as error:
        return (), str(error)
    return (), None
