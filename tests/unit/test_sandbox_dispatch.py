"""Requests get workers in the order in which they came, whatever happens on the way."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from ztrl_sandbox.dispatch import IdleWorkers
from ztrl_sandbox.handles import WorkerHandle
from ztrl_sandbox.protocol import Limits


@pytest.fixture
async def workers() -> Iterator[list[WorkerHandle]]:
    made = [WorkerHandle(slot, Limits(), lambda worker: None) for slot in range(3)]
    yield made
    for worker in made:
        worker.close()
        with contextlib.suppress(RuntimeError):
            await worker.armed
        for end in worker.worker_ends:
            end.close()


async def waiting(idle: IdleWorkers) -> asyncio.Task[WorkerHandle]:
    task = asyncio.create_task(idle.get())
    await asyncio.sleep(0)
    return task


async def test_a_newcomer_cannot_take_the_worker_that_the_first_in_line_was_given(workers):
    idle = IdleWorkers()
    first, second = await waiting(idle), await waiting(idle)
    newcomer = asyncio.create_task(idle.get())  # runs before `first` notices
    idle.put(workers[0])
    idle.put(workers[1])
    assert await first is workers[0] and await second is workers[1]
    assert not newcomer.done() and idle.queued == 1
    idle.put(workers[2])
    assert await newcomer is workers[2]


async def test_who_gives_up_at_the_last_moment_passes_the_worker_on(workers):
    idle = IdleWorkers()
    first, second = await waiting(idle), await waiting(idle)
    idle.put(workers[0])
    first.cancel()  # after it was given the worker, before it could notice
    assert await second is workers[0]
    assert idle.queued == 0 and idle.idle == 0


async def test_who_gives_up_in_the_line_leaves_no_gap(workers):
    idle = IdleWorkers()
    first, second = await waiting(idle), await waiting(idle)
    first.cancel()
    await asyncio.sleep(0)
    assert idle.queued == 1
    idle.put(workers[0])
    assert await second is workers[0]


async def test_who_was_given_a_worker_that_died_is_the_first_in_line_again(workers):
    idle = IdleWorkers()
    first, second = await waiting(idle), await waiting(idle)
    idle.put(workers[0])
    workers[0].close()
    await asyncio.sleep(0)
    idle.put(workers[1])
    idle.put(workers[2])
    assert await first is workers[1] and await second is workers[2]


async def test_a_worker_that_died_while_idle_is_passed_over(workers):
    idle = IdleWorkers()
    idle.put(workers[0])
    idle.put(workers[1])
    workers[0].close()
    assert idle.idle == 1
    assert await idle.get() is workers[1]
