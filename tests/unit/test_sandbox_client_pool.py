"""How the pool spreads calls over executors, gives up on them and takes them back: scripted HTTP servers."""

import asyncio
import random
import time

import pytest
from ztrl_sandbox import client_pool
from ztrl_sandbox.client_pool import ExecutorPool
from ztrl_sandbox.endpoint import Deadline
from ztrl_sandbox.protocol import Status

OK = {"status": "ok", "stdout": "out"}
SANDBOX_ERROR = {"status": "sandbox_error", "message": "the worker died"}
CREATED = {"session_id": "s1"}
ENDED = (204, {}, {})
PATIENT = {"patience_seconds": 60.0, "deadline": Deadline(None)}


@pytest.fixture
async def pool_of():
    """A pool of executors: ``pool_of([executor, ...], option=...)``."""
    pools = []

    def make(executors, **options):
        pools.append(ExecutorPool([executor.url for executor in executors], **options))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()
        assert not any(executor.load for executor in pool.executors)


async def run(caller, code="1", **options):
    return await caller.execute(code, run_timeout_seconds=1.0, **options)


def after(event):
    async def step():
        await event.wait()
        return OK

    return step


async def until(condition, seconds=60.0):
    """Ejection and readmission have no event for a test to wait for."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:1", "http://127.0.0.1:1/"]])
def test_urls_that_are_no_set_of_executors_are_refused(urls):
    with pytest.raises(ValueError, match="at least one executor, and each once"):
        ExecutorPool(urls)


# Balance


async def test_calls_one_after_the_other_are_spread_evenly(scripted, pool_of):
    executors = [await scripted(OK) for _ in range(3)]
    pool = pool_of(executors)
    for _ in range(12):
        assert (await run(pool)).stdout == "out"
    assert [len(executor.requests) for executor in executors] == [4, 4, 4]
    assert [executor.served for executor in pool.executors] == [4, 4, 4]


async def test_a_call_goes_to_the_executor_with_the_fewest_outstanding(scripted, pool_of):
    all_else_is_done = asyncio.Event()
    slow, fast = await scripted(after(all_else_is_done)), await scripted(OK)
    pool = pool_of([slow, fast])
    first = asyncio.create_task(run(pool))
    await slow.received(1)
    assert [executor.outstanding for executor in pool.executors] == [1, 0]
    for _ in range(10):
        await run(pool)
    assert (len(slow.requests), len(fast.requests)) == (1, 10)
    all_else_is_done.set()
    assert (await first).status is Status.OK


async def test_an_executor_never_has_more_calls_than_its_limit_and_the_rest_wait_in_order(scripted, pool_of):
    wave = asyncio.Barrier(6)

    async def step():
        await wave.wait()
        return OK

    executors = [await scripted(step) for _ in range(2)]
    pool = pool_of(executors, max_concurrent_per_executor=3)
    async with asyncio.timeout(60):  # with fewer at once there is no wave
        results = await asyncio.gather(*(run(pool, str(n)) for n in range(30)))
    assert {result.status for result in results} == {Status.OK}
    assert [executor.most_in_flight for executor in executors] == [3, 3]
    codes = [[int(body["code"]) for body in executor.bodies] for executor in executors]
    # Within a wave of six, connections race; a later wave never overtakes an earlier one.
    assert all(code // 6 == place // 3 for order in codes for place, code in enumerate(order))


async def test_a_waiting_call_goes_to_whichever_executor_is_free_first(scripted, pool_of):
    all_else_is_done = asyncio.Event()
    slow, fast = await scripted(after(all_else_is_done)), await scripted(OK)
    pool = pool_of([slow, fast], max_concurrent_per_executor=1)
    calls = [asyncio.create_task(run(pool)) for _ in range(11)]
    async with asyncio.timeout(60):
        await fast.received(10)
    all_else_is_done.set()
    await asyncio.gather(*calls)
    assert (len(slow.requests), len(fast.requests)) == (1, 10)


async def test_callers_who_give_up_while_they_wait_take_no_place_with_them(scripted, pool_of):
    cancelled = asyncio.Event()
    executor = await scripted(after(cancelled))
    pool = pool_of([executor], max_concurrent_per_executor=1)
    calls = [asyncio.create_task(run(pool)) for _ in range(20)]
    await executor.received(1)
    for call in calls[1::2]:
        call.cancel()
    cancelled.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [False, True] * 10
    assert len(executor.requests) == 10
    assert (await run(pool)).status is Status.OK


async def test_a_deadline_that_passes_while_a_call_waits_its_turn_rejects_it(scripted, pool_of):
    rejected = asyncio.Event()
    executor = await scripted(after(rejected))
    pool = pool_of([executor], max_concurrent_per_executor=1)
    first = asyncio.create_task(run(pool))
    await executor.received(1)
    assert (await run(pool, deadline_seconds=0.2)).status is Status.REJECTED
    rejected.set()
    assert (await first).status is Status.OK
    assert len(executor.requests) == 1


# Faults


async def test_what_failed_on_one_executor_is_tried_on_another(scripted, pool_of):
    bad, good = await scripted(SANDBOX_ERROR), await scripted(OK)
    pool = pool_of([bad, good])
    assert (await run(pool)).status is Status.OK
    assert (len(bad.requests), len(good.requests)) == (1, 1)
    assert not pool.executors[0].ejected  # once may be the snippet's doing


async def test_a_retry_prefers_an_executor_that_the_call_has_not_tried_even_if_it_has_more_to_do(
    scripted, pool_of
):
    bad, busy = await scripted(SANDBOX_ERROR), await scripted("hang", "hang", OK)
    pool = pool_of([bad, busy])
    others = [asyncio.create_task(pool.executors[1].request(pool.http, "POST", "/", **PATIENT)) for _ in "ab"]
    await busy.received(2)
    assert (await run(pool)).status is Status.OK
    assert (len(bad.requests), len(busy.requests)) == (1, 3)
    for other in others:
        other.cancel()


async def test_a_full_executor_is_passed_over(scripted, pool_of):
    full = await scripted((429, {"status": "rejected"}, {"Retry-After": "600"}), OK)
    free = await scripted(OK)
    pool = pool_of([full, free])
    async with asyncio.timeout(60):  # nobody waits for the full one
        for _ in range(10):
            assert (await run(pool)).status is Status.OK
    assert (len(full.requests), len(free.requests)) == (1, 10)


async def test_a_full_executor_is_asked_again_after_the_time_it_names(scripted, pool_of):
    full = await scripted((429, {"status": "rejected"}, {"Retry-After": "1"}), OK)
    pool = pool_of([full, await scripted(OK)])
    started_at = time.monotonic()
    assert (await run(pool)).status is Status.OK
    await until(lambda: not pool.executors[0].full)
    assert time.monotonic() - started_at >= 0.75  # 1 s less the jitter
    assert len(full.requests) == 1
    for _ in range(4):
        await run(pool)
    assert len(full.requests) == 3
    assert pool.executors[0].ejections == 0


@pytest.mark.parametrize("fault", [SANDBOX_ERROR, (503, {}, {}), "hang up"])
async def test_an_executor_that_fails_three_times_in_a_row_is_ejected(scripted, pool_of, fault):
    bad, good = await scripted(OK, fault, fault, OK, fault), await scripted(OK)
    bad.ready = False
    pool = pool_of([bad, good])
    for _ in range(14):
        assert (await run(pool)).status is Status.OK
    # Two faults, a success that forgives them, three faults; then it is left alone.
    assert len(bad.requests) == 7
    assert (pool.executors[0].ejected, pool.executors[0].ejections) == (True, 1)
    assert (pool.executors[1].ejected, pool.executors[1].ejections) == (False, 0)


async def test_an_executor_that_refuses_connections_is_ejected_at_once_and_readmitted_when_ready(
    scripted, pool_of
):
    first, second = await scripted(OK), await scripted(OK)
    pool = pool_of([first, second])
    await first.stop()
    for _ in range(6):
        assert (await run(pool)).status is Status.OK
    assert pool.executors[0].ejected and len(second.requests) == 6

    first.ready = False  # it listens, and still loads
    await first.start()
    await until(lambda: first.probes > 0)
    await run(pool)
    assert pool.executors[0].ejected and first.requests == []

    first.ready = True
    await until(lambda: not pool.executors[0].ejected)
    for _ in range(4):
        await run(pool)
    assert len(first.requests) == 2


async def test_probes_become_rare_while_an_executor_stays_unready(scripted, pool_of, monkeypatch):
    vain_probes = []

    def no_pause(attempt):
        vain_probes.append(attempt)
        return 0.0

    monkeypatch.setattr(client_pool, "pause_after", no_pause)
    executor, other = await scripted((500, {}, {})), await scripted(OK)
    executor.ready = False
    pool = pool_of([executor, other])
    for _ in range(6):
        await run(pool)
    await until(lambda: executor.probes >= 5)
    # A pause before each, as after so many failed attempts: of 0.1, 0.2, 0.4, 0.8 and 1.6 s.
    assert vain_probes[:5] == [1, 2, 3, 4, 5] and executor.probes <= len(vain_probes)


async def test_calls_wait_out_an_outage_of_all_executors(scripted, pool_of):
    executors = [await scripted(OK) for _ in range(2)]
    pool = pool_of(executors)
    for executor in executors:
        await executor.stop()
    calls = [asyncio.create_task(run(pool)) for _ in range(20)]
    await until(lambda: all(executor.ejected for executor in pool.executors))
    await executors[1].start()
    results = await asyncio.gather(*calls)
    assert {result.status for result in results} == {Status.OK}


async def test_an_outage_that_lasts_ends_every_call_as_an_infrastructure_failure(scripted, pool_of):
    executor = await scripted("hang")
    pool = pool_of([executor], max_concurrent_per_executor=2, outage_timeout_seconds=0.3)
    calls = [asyncio.create_task(run(pool)) for _ in range(6)]  # two at the executor, four in the queue
    await executor.received(2)
    started_at = time.monotonic()
    await executor.stop()
    results = await asyncio.gather(*calls)
    assert all(result.status.is_infrastructure for result in results)
    assert time.monotonic() - started_at < 30.0
    after = await run(pool)
    assert (after.status, after.message) == (Status.REJECTED, "no executor was free in time")


async def test_calls_survive_executors_that_fail_at_random(scripted, pool_of):
    source = random.Random(7)

    async def step():
        await asyncio.sleep(source.uniform(0, 0.005))
        return SANDBOX_ERROR if source.random() < 0.2 else OK

    executors = [await scripted(step) for _ in range(4)]
    pool = pool_of(executors, max_concurrent_per_executor=8, max_attempts=12)
    results = await asyncio.gather(*(run(pool) for _ in range(400)))
    assert {result.status for result in results} == {Status.OK}
    assert sum(executor.served for executor in pool.executors) == 400
    assert max(executor.most_in_flight for executor in executors) <= 8


# Sessions


async def test_sessions_are_spread_and_each_stays_with_its_executor(scripted, pool_of):
    executors = [await scripted(CREATED, OK, OK, OK, OK, OK, ENDED) for _ in range(2)]
    pool = pool_of(executors)
    async with pool.session() as first, pool.session() as second:
        for _ in range(5):
            await run(first)
            await run(second)
        assert {first.url, second.url} == {executor.url for executor in executors}
        assert [executor.sessions for executor in pool.executors] == [1, 1]
    assert [executor.sessions for executor in pool.executors] == [0, 0]
    for executor in executors:
        create, *calls, end = executor.calls
        assert (create, end) == ("POST /v1/sessions", "DELETE /v1/sessions/s1")
        assert calls == ["POST /v1/sessions/s1/execute"] * 5


async def test_a_new_session_goes_where_there_are_fewest(scripted, pool_of):
    executors = [await scripted(CREATED, OK, ENDED), await scripted(OK, CREATED, OK, ENDED)]
    pool = pool_of(executors)
    async with pool.session() as first:
        await run(first)
        await run(pool)  # the second executor's turn; the next call's would be the first's
        async with pool.session() as second:
            await run(second)
            assert [first.url, second.url] == [executor.url for executor in executors]


async def test_a_session_needs_no_place_among_the_calls(scripted, pool_of):
    executor = await scripted("hang", CREATED, OK, ENDED)
    pool = pool_of([executor], max_concurrent_per_executor=1)
    call = asyncio.create_task(run(pool))
    await executor.received(1)
    async with pool.session() as session:
        assert (await run(session)).status is Status.OK
    call.cancel()


async def test_a_session_is_lost_with_its_executor_and_a_new_one_finds_another(scripted, pool_of):
    executors = [await scripted(CREATED, OK, "hang") for _ in range(2)]
    pool = pool_of(executors, max_attempts=2)
    async with pool.session() as session:
        await run(session)
        home = next(executor for executor in executors if executor.url == session.url)
        call = asyncio.create_task(run(session))
        await home.received(3)
        await home.stop()
        assert (await call).status is Status.SANDBOX_ERROR
        assert not session.alive
        assert (await run(session)).status is Status.REJECTED
    async with pool.session() as session:
        assert (await run(session)).status is Status.OK
        assert session.url != home.url
        executors[1 - executors.index(home)].script = [ENDED]


async def test_an_executor_without_room_for_sessions_still_gets_calls(scripted, pool_of):
    full, free = (
        await scripted((429, {"detail": "sessions"}, {"Retry-After": "60"}), OK),
        await scripted(CREATED, OK),
    )
    pool = pool_of([full, free])
    async with pool.session() as session:
        assert (await run(session)).status is Status.OK
        assert session.url == free.url
        await asyncio.gather(run(pool), run(pool))
        assert len(full.requests) == 2


# Memory


async def test_nothing_is_remembered_unless_asked_for(scripted, pool_of):
    executor = await scripted(OK)
    pool = pool_of([executor])
    await run(pool)
    await run(pool)
    assert len(executor.requests) == 2 and pool.memo is None


async def test_the_same_call_is_answered_from_memory(scripted, pool_of):
    executor = await scripted(OK)
    pool = pool_of([executor], memo_entries=10)
    assert await run(pool, "a") == await run(pool, "a")
    await run(pool, "b")
    await run(pool, "a", stdin="x")
    await run(pool, "a", print_last_expression=True)
    assert len(executor.requests) == 4
    assert (pool.memo.hits, pool.memo.misses, len(pool.memo)) == (1, 4, 4)


@pytest.mark.parametrize("status", ["timeout", "memory", "killed", "output_truncated", "sandbox_error"])
async def test_what_another_run_might_end_differently_is_not_remembered(scripted, pool_of, status):
    executor = await scripted({"status": status}, OK)
    pool = pool_of([executor], memo_entries=10, max_attempts=1)
    assert (await run(pool)).status is Status(status)
    assert (await run(pool)).status is Status.OK


async def test_the_least_recently_used_result_is_forgotten_first(scripted, pool_of):
    executor = await scripted(OK)
    pool = pool_of([executor], memo_entries=2)
    for code in "abacab":
        await run(pool, code)
    # a, b are run; a is remembered; c drives b out; a is remembered; b is run again.
    assert [body["code"] for body in executor.bodies] == ["a", "b", "c", "b"]


async def test_a_session_is_remembered_by_all_the_code_before(scripted, pool_of):
    executor = await scripted(
        CREATED,
        {"status": "ok", "stdout": "1"},
        {"status": "error", "stdout": "2"},
        ENDED,
        CREATED,
        OK,
        ENDED,
    )
    pool = pool_of([executor], memo_entries=10)
    async with pool.session() as session:
        recorded = [await run(session, code) for code in ("x = 1", "x / 0")]
    async with pool.session() as session:
        assert [await run(session, code) for code in ("x = 1", "x / 0")] == recorded
    assert len(executor.requests) == 4  # the second session needed no executor
    async with pool.session() as session:
        assert (await run(session, "x / 0")).stdout == "out"  # without the code before, another call


async def test_a_remembered_session_catches_up_before_it_runs_what_is_new(scripted, pool_of):
    first, second = {"status": "ok", "stdout": "1"}, {"status": "ok", "stdout": "2"}
    executor = await scripted(CREATED, first, second, ENDED, CREATED, first, second, OK, ENDED)
    pool = pool_of([executor], memo_entries=10)
    async with pool.session() as session:
        await run(session, "a")
        await run(session, "b")
    async with pool.session() as session:
        await run(session, "a")
        await run(session, "b")
        assert len(executor.requests) == 4
        assert (await run(session, "c")).stdout == "out"
    assert [body["code"] for body in executor.bodies[5:8]] == ["a", "b", "c"]


async def test_a_session_whose_code_prints_something_else_the_second_time_is_lost(scripted, pool_of):
    one, other = {"status": "ok", "stdout": "1"}, {"status": "ok", "stdout": "other"}
    executor = await scripted(CREATED, one, ENDED, CREATED, other, ENDED)
    pool = pool_of([executor], memo_entries=10)
    async with pool.session() as session:
        await run(session, "a")
    async with pool.session() as session:
        await run(session, "a")
        result = await run(session, "b")
        assert result.status is Status.REJECTED and "another output than before" in result.message
    assert len(executor.requests) == 6


async def test_a_call_that_ended_its_session_is_not_remembered(scripted, pool_of):
    executor = await scripted(CREATED, {**OK, "session_alive": False}, ENDED)
    executor.script *= 2
    pool = pool_of([executor], memo_entries=10)
    for _ in range(2):
        async with pool.session() as session:
            assert (await run(session, "exit()")).status is Status.OK
            assert not session.alive
    assert len(executor.requests) == 6


async def test_after_a_timeout_a_session_is_no_longer_remembered(scripted, pool_of):
    script = (CREATED, OK, {"status": "timeout", "session_alive": True}, OK, ENDED)
    executor = await scripted(*script, *script)
    pool = pool_of([executor], memo_entries=10)
    for _ in range(2):
        async with pool.session() as session:
            for code in "abc":
                await run(session, code)
    # The second session is remembered up to "a", catches up, and runs the rest.
    assert [body["code"] for body in executor.bodies if body and "code" in body] == list("abcabc")
