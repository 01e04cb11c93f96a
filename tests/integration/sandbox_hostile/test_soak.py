"""After very many calls an executor is what it was after few."""

import asyncio

import pytest
from hostile import ALL, OPTIONS, launcher_for
from sandbox_server import executor_with, running, until
from ztrl_sandbox.bench.soak import server_cgroups, soak
from ztrl_sandbox.proctree import descendants

MIB = 1 << 20


VERY_MANY = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("tier", "calls"),
    [("full", 400), *(pytest.param(tier, 20_000, marks=VERY_MANY) for tier in ALL)],
)
def test_calls_leave_nothing_behind(tier, calls):
    with executor_with(tier, *OPTIONS, launcher=launcher_for(tier)) as executor:
        result = asyncio.run(soak(executor.url, executor.process.pid, calls, concurrency=8))
        family = descendants(executor.process.pid)
        print(result.before, result.after, sep="\n")
    assert (result.row.calls, result.row.wrong, result.row.lost) == (calls, 0, 0), result.row.failures
    assert result.after.countable == result.before.countable
    assert result.after.server_bytes - result.before.server_bytes < 8 * MIB
    assert result.after.zygote_bytes - result.before.zygote_bytes < MIB
    assert result.after.workers_bytes - result.before.workers_bytes < 4 * MIB
    assert until(lambda: not any(map(running, family)))
    assert server_cgroups(executor.process.pid) == []
