"""Work that ends when the run is told to stop."""

import asyncio

import pytest
from turns import settle

from megatron_ztrl.runtime.interrupt import unless_stopped


async def answer(begun, gate):
    begun.append("begun")
    await gate.wait()
    return 42


async def test_work_that_ends_first_gives_its_result_and_its_error():
    gate = asyncio.Event()
    gate.set()
    assert await unless_stopped(asyncio.Event(), answer([], gate)) == 42

    async def fail():
        raise ConnectionError("engine died")

    with pytest.raises(ConnectionError, match="engine died"):
        await unless_stopped(asyncio.Event(), fail())


async def test_being_told_to_stop_cancels_the_work():
    stop, begun = asyncio.Event(), []
    waiting = asyncio.create_task(unless_stopped(stop, answer(begun, asyncio.Event())))
    await settle()
    assert begun and not waiting.done()
    stop.set()
    assert await waiting is None
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_after_that_no_work_begins_even_if_it_would_end_at_once():
    stop, gate, begun = asyncio.Event(), asyncio.Event(), []
    stop.set()
    gate.set()
    assert await unless_stopped(stop, answer(begun, gate)) is None
    assert begun == []
