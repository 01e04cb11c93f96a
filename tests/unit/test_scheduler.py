"""Admission order, staleness bound and refilling of the rollout scheduler."""

import asyncio
import itertools
import random

import pytest
from turns import settle

from megatron_ztrl.rollout.scheduler import RolloutScheduler
from megatron_ztrl.types import Prompt, RolloutGroup


def prompts():
    counter = itertools.count()
    return lambda: Prompt(
        prompt_id=str(next(counter)), problem="", text="", ground_truth="", data_source="test"
    )


def make(run_group, *, groups_per_step=4, max_staleness=0, keep=lambda group: True):
    return RolloutScheduler(
        prompts(), run_group, keep, groups_per_step=groups_per_step, max_staleness=max_staleness
    )


async def finish_at_once(group_id, prompt):
    return RolloutGroup(group_id=group_id, prompt=prompt, rollouts=[])


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
async def test_the_worst_staleness_is_exactly_the_bound_with_a_fifth_of_groups_filtered(max_staleness):
    version, born, worst = 0, {}, 0
    rng = random.Random(max_staleness)

    async def run_group(group_id, prompt):
        born[group_id] = version
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)
        return RolloutGroup(group_id=group_id, prompt=prompt, rollouts=[])

    verdicts: dict[int, bool] = {}

    def keep(group):
        return verdicts.setdefault(group.group_id, rng.random() > 0.2)

    scheduler = make(run_group, max_staleness=max_staleness, keep=keep)
    scheduler.start()
    trained = []
    while version < 60:
        taken = await scheduler.take(4)
        trained += [group.group_id for group in taken.groups]
        worst = max(worst, *(version - born[group.group_id] for group in taken.groups))
        version += 1
        scheduler.release(4)
    await scheduler.stop()
    assert worst == max_staleness
    assert trained == sorted(set(trained))
    assert len(trained) == 240


async def test_groups_are_taken_in_admission_order_even_when_later_ones_finish_first():
    gates = [asyncio.Event() for _ in range(4)]

    async def run_group(group_id, prompt):
        await gates[group_id].wait()
        return RolloutGroup(group_id=group_id, prompt=prompt, rollouts=[])

    scheduler = make(run_group)
    scheduler.start()
    take = asyncio.create_task(scheduler.take(2))
    gates[1].set()
    gates[3].set()
    await settle()
    assert not take.done()
    gates[0].set()
    assert [group.group_id for group in (await take).groups] == [0, 1]
    await scheduler.stop()


async def test_no_more_groups_run_than_the_staleness_bound_admits():
    running = []

    async def run_group(group_id, prompt):
        running.append(group_id)
        return await finish_at_once(group_id, prompt)

    scheduler = make(run_group, max_staleness=1)
    scheduler.start()
    await scheduler.take(4)
    await settle()
    assert running == list(range(8))  # taken but not released: nothing new
    scheduler.release(4)
    await settle()
    assert running == list(range(12))
    await scheduler.stop()


async def test_what_a_step_does_not_take_is_the_next_steps_and_is_not_rolled_out_again():
    started = []

    async def run_group(group_id, prompt):
        started.append(group_id)
        return await finish_at_once(group_id, prompt)

    scheduler = make(run_group, max_staleness=2)
    scheduler.start()
    await scheduler.take(4)
    for expected in ([4, 5, 6, 7], [8, 9, 10, 11]):  # finished long ago: no release is needed for them
        taken = await scheduler.take(4)
        assert [group.group_id for group in taken.groups] == expected
    assert started == list(range(12))
    await scheduler.stop()


async def test_long_groups_are_trained_in_their_turn_and_none_is_lost():
    started, finished = [], []

    async def run_group(group_id, prompt):
        started.append(group_id)
        for _ in range(200 if group_id % 10 == 3 else 1):
            await asyncio.sleep(0)
        finished.append(group_id)
        return await finish_at_once(group_id, prompt)

    scheduler = make(run_group, max_staleness=1)
    scheduler.start()
    trained = []
    for _ in range(30):
        trained += [group.group_id for group in (await scheduler.take(4)).groups]
        scheduler.release(4)
    await scheduler.stop()
    assert trained == list(range(120))
    assert finished != sorted(finished)  # short ones did finish first
    assert started == sorted(set(started))  # and nobody started twice
    # Nothing behind a long one started beyond the capacity before it was trained.
    assert finished.index(3) == 7


async def test_a_refused_group_is_reported_and_replaced():
    scheduler = make(finish_at_once, keep=lambda group: group.group_id != 2)
    scheduler.start()
    taken = await scheduler.take(4)
    assert [group.group_id for group in taken.groups] == [0, 1, 3, 4]
    assert [group.group_id for group in taken.dropped] == [2]
    await scheduler.stop()


async def test_an_interrupted_take_loses_no_group_and_a_restart_goes_on_with_the_same_groups():
    gate = asyncio.Event()

    async def run_group(group_id, prompt):
        if group_id == 4:
            await gate.wait()
        return await finish_at_once(group_id, prompt)

    scheduler = make(run_group, keep=lambda group: group.group_id != 1)
    scheduler.start()
    take = asyncio.create_task(scheduler.take(4))
    await settle()
    take.cancel()
    with pytest.raises(asyncio.CancelledError):
        await take
    pending = scheduler.pending()
    assert [group.group_id for group in pending] == [0, 1, 2, 3, 4]  # 4 replaces 1, which was refused
    assert [group.prompt.prompt_id for group in pending] == ["0", "1", "2", "3", "4"]
    assert scheduler.next_group_id == 5
    gate.set()
    taken = await scheduler.take(4)
    assert [group.group_id for group in taken.groups] == [0, 2, 3, 4]
    assert [group.group_id for group in taken.dropped] == [1]
    await scheduler.stop()

    restarted = make(finish_at_once, keep=lambda group: group.group_id != 1)
    restarted.start(pending, 5)
    assert [group.group_id for group in restarted.pending()] == [0, 1, 2, 3, 4]
    taken = await restarted.take(4)
    assert [(g.group_id, g.prompt.prompt_id) for g in taken.groups] == [
        (0, "0"),
        (2, "2"),
        (3, "3"),
        (4, "4"),
    ]
    assert [group.group_id for group in taken.dropped] == [1]
    restarted.release(4)
    assert [group.group_id for group in restarted.pending()] == [5, 6, 7, 8]
    await restarted.stop()


async def test_an_error_in_a_rollout_reaches_the_loop():
    async def run_group(group_id, prompt):
        raise ConnectionError("engine died")

    scheduler = make(run_group)
    scheduler.start()
    with pytest.raises(ConnectionError, match="engine died"):
        await scheduler.take(4)
    await scheduler.stop()
