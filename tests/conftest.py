"""Lets ``pytest -n`` run tests side by side without a loss: what they share is started once, and clocks are respected.

Sequential runs are as they would be without it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ALONE = ("unit/", "integration/sandbox_hostile/", "integration/test_sandbox_")
"""Where there are limits of time to keep."""
LONG = "e2e/"
SESSIONS = {"root": "checkpoints and gloo ranks", "server": "engine"}
"""Fixtures of a whole session that take long, by name; every other fixture is of one file at most."""


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks, and grouped
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Says which tests need one and the same process; the longest come first, and those that run alone last."""
    for item in items:
        path = _path(item)
        shared = [group for fixture, group in SESSIONS.items() if fixture in item.fixturenames]
        if path.startswith(ALONE):
            item.add_marker(pytest.mark.alone)
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif not path.startswith(LONG):
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else path))
    items.sort(key=lambda item: (_path(item).startswith(ALONE), not _path(item).startswith(LONG)))


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
