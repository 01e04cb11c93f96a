"""Lets ``pytest -n`` run tests side by side without a loss: what they share is started once, and clocks are respected.

Sequential runs are as they would be without it, but for the second and third chance of tests that keep limits of time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ORDER = (
    "distributed/",
    "e2e/",
    "gpu/",
    "integration/",
    "integration/sandbox_hostile/",
    "integration/test_sandbox_",
    "unit/",
)
"""Longest first, so that no process waits for another in the end. The last of these with which a path begins counts."""
SESSIONS = {"root": "checkpoints and gloo ranks", "server": "engine"}
"""Fixtures of a whole session that take long, by name; every other fixture is of one file at most."""
CHANCES = 3
"""Of a test with limits of time: a machine that others share may break one, but not so often in turn."""


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> Generator[None]:
    """Says which tests need one and the same process, and puts them in order.

    Raises:
        UsageError: the groups have no effect, as with a pytest that this pytest-xdist does not know: then every process
            would start ranks and engines of its own.
    """
    for item in items:
        shared = [group for fixture, group in SESSIONS.items() if fixture in item.fixturenames]
        path = _path(item)
        if shared or not path.startswith("e2e/"):
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else path))
        if item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.flaky(reruns=CHANCES - 1))
    items.sort(
        key=lambda item: max(place for place, part in enumerate(ORDER) if _path(item).startswith(part))
    )
    result = yield
    grouped = (item for item in items if item.get_closest_marker("xdist_group"))
    if config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist has not put its groups into the names of the tests")
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the wait is not part of the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that is marked ``alone`` begins when no other test runs, and no other begins before its end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()
