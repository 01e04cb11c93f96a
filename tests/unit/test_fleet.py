"""Which engine a rollout uses, and what it notices when engines come, go and die: nothing but lost time."""

import asyncio

import pytest
from turns import settle, until

from megatron_ztrl.engines.client import EngineError, EngineUnreachable
from megatron_ztrl.envs.base import Reaction
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.trajectory import Sampling, run_rollout
from megatron_ztrl.types import Completion, FinishReason, Prompt, StopReason, VersionSpan

LENGTH = 12


class CountingEngine:
    """Continues 1, 2, 3 with 4, 5, 6, a few tokens per call; sampled under ``version``."""

    def __init__(self, version=0, tokens_per_call=4):
        self.version = version
        self.tokens_per_call = tokens_per_call
        self.calls = []
        self.error = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def generate(self, input_ids, *, max_new_tokens, request_id, **_):
        self.calls.append((request_id.split("-")[0], len(input_ids)))
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        count = min(self.tokens_per_call, max_new_tokens)
        return Completion(
            token_ids=[input_ids[-1] + 1 + i for i in range(count)],
            logprobs=[-float(self.version + 1)] * count,
            finish_reason=FinishReason.ABORT,
            matched_stop=None,
            version_spans=[VersionSpan(version=self.version, start=0, end=count)],
            cached_tokens=0,
        )

    def die(self):
        """Calls in flight break, and so does every call from now on."""
        self.error = EngineUnreachable("connection reset")
        self.gate.set()


class Numbers:
    """A tokenizer of numbers in a row."""

    def encode(self, text, *, add_special_tokens=False, split_special_tokens=False):
        return [int(word) for word in text.split()]

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


class NoTool:
    def stop_patterns(self):
        return ()

    def find_stop(self, text):
        return None

    async def react(self, text, *, ended):
        return Reaction()


async def roll_out(fleet, name="0", *, urgent=False):
    async with fleet.engine(urgent=urgent) as engine:
        return await run_rollout(
            name,
            Prompt(prompt_id="p", problem="", text="1 2 3", ground_truth="", data_source="test"),
            engine=engine,
            tokenizer=Numbers(),
            environment=NoTool(),
            sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=LENGTH),
        )


def assert_whole(rollout):
    """Every token once, in order, with the log-prob of the engine that sampled it."""
    assert rollout.token_ids == list(range(4, 4 + LENGTH))
    assert rollout.loss_mask == [True] * LENGTH
    assert rollout.logprobs == [-float(version + 1) for version in rollout.weight_versions]
    assert rollout.stop_reason is StopReason.LENGTH


async def test_a_rollout_stays_on_one_engine_and_the_next_one_goes_to_the_other():
    engines = [CountingEngine(), CountingEngine()]
    fleet = EngineFleet(engines, max_concurrent_per_engine=8)
    await asyncio.gather(*(roll_out(fleet, str(i)) for i in range(6)))
    served = [{name for name, _ in engine.calls} for engine in engines]
    assert served[0].isdisjoint(served[1])
    assert [len(names) for names in served] == [3, 3]


async def test_each_engine_has_its_own_limit_and_more_engines_take_more_rollouts():
    slow = CountingEngine()
    slow.gate.clear()
    fleet = EngineFleet([slow], max_concurrent_per_engine=2)
    rollouts = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(5)]
    await until(lambda: len(slow.calls) == 2)
    assert (fleet.capacity, fleet.load(slow)) == (2, 2)
    other = CountingEngine()
    other.gate.clear()
    fleet.add(other)
    await until(lambda: len(other.calls) == 2)
    assert (fleet.capacity, fleet.load(slow), fleet.load(other)) == (4, 2, 2)
    assert [name for name, _ in other.calls] == ["2", "3"]  # in the order in which they came
    slow.gate.set()
    other.gate.set()
    for rollout in await asyncio.gather(*rollouts):
        assert_whole(rollout)
    assert fleet.load(slow) == fleet.load(other) == 0


async def test_a_rollout_whose_engine_dies_goes_on_at_its_last_token_elsewhere():
    first, second = CountingEngine(version=3), CountingEngine(version=4)
    lost = []
    fleet = EngineFleet([first], max_concurrent_per_engine=8, on_unreachable=lost.append)
    rollout = asyncio.create_task(roll_out(fleet))
    await until(lambda: len(first.calls) == 2)
    first.die()  # while it samples the second four tokens, which nobody ever sees
    await until(lambda: lost)
    assert fleet.engines == []
    await settle()
    assert not rollout.done()  # it waits for an engine
    fleet.add(second)
    rollout = await rollout
    assert_whole(rollout)
    assert rollout.weight_versions == [3] * 4 + [4] * 8
    assert [length for _, length in second.calls] == [7, 11]
    assert lost == [first]


async def test_those_who_lost_their_engine_are_seated_before_those_who_came_later():
    first, second = CountingEngine(), CountingEngine()
    first.gate.clear()
    fleet = EngineFleet([first], max_concurrent_per_engine=1, on_unreachable=lambda engine: None)
    rollouts = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(3)]
    await until(lambda: first.calls)
    first.die()
    await until(lambda: not fleet.engines)
    fleet.add(second)
    for rollout in await asyncio.gather(*rollouts):
        assert_whole(rollout)
    assert [name for name, _ in second.calls] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


async def test_an_urgent_rollout_is_seated_before_all_that_wait_and_moves_nobody():
    engine = CountingEngine()
    engine.gate.clear()
    fleet = EngineFleet([engine], max_concurrent_per_engine=1)
    rollouts = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(3)]
    rollouts += [asyncio.create_task(roll_out(fleet, name, urgent=True)) for name in ("u", "v")]
    await until(lambda: engine.calls)
    engine.gate.set()
    for rollout in await asyncio.gather(*rollouts):
        assert_whole(rollout)
    assert [name for name, _ in engine.calls] == [name for name in "0uv12" for _ in range(3)]


async def test_calls_to_an_engine_that_is_abandoned_wait_no_longer():
    hanging, other = CountingEngine(), CountingEngine(version=1)
    hanging.gate.clear()
    fleet = EngineFleet([hanging], max_concurrent_per_engine=8)
    rollouts = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(3)]
    await until(lambda: len(hanging.calls) == 3)
    fleet.add(other)
    fleet.abandon(hanging)
    for rollout in await asyncio.gather(*rollouts):
        assert_whole(rollout)
        assert rollout.weight_versions == [1] * LENGTH


async def test_calls_to_an_engine_that_is_drained_end_and_their_tokens_count():
    leaving, other = CountingEngine(version=1), CountingEngine(version=2)
    leaving.gate.clear()
    fleet = EngineFleet([leaving], max_concurrent_per_engine=8)
    rollout = asyncio.create_task(roll_out(fleet))
    await until(lambda: leaving.calls)
    fleet.add(other)
    drained = asyncio.create_task(fleet.drain(leaving))
    await settle()
    assert not drained.done()
    leaving.gate.set()
    await drained
    rollout = await rollout
    assert_whole(rollout)
    assert rollout.weight_versions == [1] * 4 + [2] * 8
    assert len(leaving.calls) == 1


async def test_a_refused_request_is_an_error_of_the_rollout_and_no_death():
    engine = CountingEngine()
    engine.error = EngineError("400 too long")
    fleet = EngineFleet([engine], max_concurrent_per_engine=8, on_unreachable=pytest.fail)
    with pytest.raises(EngineError, match="too long"):
        await roll_out(fleet)
    assert fleet.engines == [engine]
    assert fleet.load(engine) == 0


async def test_a_time_out_of_the_engine_itself_is_not_taken_for_a_death():
    engine = CountingEngine()
    engine.error = TimeoutError("of a request")
    fleet = EngineFleet([engine], max_concurrent_per_engine=8, on_unreachable=pytest.fail)
    with pytest.raises(TimeoutError, match="of a request"):
        await roll_out(fleet)


async def test_where_nobody_replaces_engines_the_death_of_the_last_is_an_error():
    engines = [CountingEngine(), CountingEngine()]
    fleet = EngineFleet(engines, max_concurrent_per_engine=8)
    engines[0].die()
    assert_whole(await roll_out(fleet))
    engines[1].die()
    with pytest.raises(EngineUnreachable):
        await roll_out(fleet)


async def test_cancelled_rollouts_give_back_their_places_wherever_they_are():
    engine = CountingEngine()
    engine.gate.clear()
    fleet = EngineFleet([engine], max_concurrent_per_engine=1)
    running, waiting, last = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(3)]
    await until(lambda: engine.calls)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    engine.gate.set()
    assert_whole(await last)
    assert fleet.load(engine) == 0
    # Cancelled in the very moment in which the place is given, and while it moves.
    engine.gate.clear()
    holder, heir = [asyncio.create_task(roll_out(fleet, str(i))) for i in range(2)]
    await until(lambda: fleet.load(engine) == 1)
    holder.cancel()
    await asyncio.wait({holder})
    heir.cancel()
    await asyncio.wait({heir})
    mover = asyncio.create_task(roll_out(fleet))
    await until(lambda: fleet.load(engine) == 1)
    fleet.abandon(engine)
    await settle()
    mover.cancel()
    await asyncio.wait({mover})
    fleet.add(engine)
    assert fleet.load(engine) == 0
