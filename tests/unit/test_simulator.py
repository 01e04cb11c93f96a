"""The virtual clock, the simulated engine against hand calculation, and what `rollout_simulator` makes of designs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from piece_tokenizer import PieceTokenizer

from megatron_ztrl.engines import interruption
from megatron_ztrl.types import Completion, FinishReason

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _simulated_engine import Continuation, EngineTiming, SimulatedClient, SimulatedEngine
from _simulated_policy import Workload
from _simulated_time import CpuMeter, run_virtually
from rollout_simulator import Design, Figures, Scenario, simulate

SCENARIO = Scenario(
    workload=Workload(median_response_tokens=60, max_response_tokens=2000, prompt_tokens=50, mean_calls=1.0),
    timing=EngineTiming(
        step_seconds=0.010,
        sequence_seconds=0.0001,
        context_token_seconds=1e-7,
        prefill_token_seconds=1e-5,
        max_running_requests=16,
    ),
    engines=2,
    executor_workers=8,
    groups_per_step=8,
    group_size=4,
    trainer_token_seconds=0.0007,
    publish_seconds=0.2,
    steps=5,
)


def run(design: Design) -> Figures:
    return simulate(SCENARIO, design, PieceTokenizer())


class Lengths:
    """A policy of which only the number of tokens is known, by rollout id."""

    prompt_tokens = 50

    def __init__(self, **tokens: int) -> None:
        self.remaining = tokens

    def continue_rollout(self, rollout_id: str, max_new_tokens: int) -> Continuation:
        return Continuation(
            token_ids=[1] * self.remaining[rollout_id], finish_reason={"type": "stop", "matched": 0}
        )

    def said(self, rollout_id: str, tokens: int) -> None:
        self.remaining[rollout_id] -= tokens


def engine(policy: Lengths, **changes: float) -> SimulatedEngine:
    timing = {
        "step_seconds": 0.010,
        "sequence_seconds": 0.001,
        "context_token_seconds": 0.0,
        "prefill_token_seconds": 0.001,
        "max_running_requests": 8,
    }
    return SimulatedEngine(EngineTiming(**timing | changes), policy, CpuMeter())


async def call(
    client: SimulatedClient, name: str, *, at: float, input_tokens: int
) -> tuple[Completion, float]:
    """Returns the completion, and when it came."""
    await asyncio.sleep(at - asyncio.get_running_loop().time())
    completion = await client.generate(
        [1] * input_tokens, max_new_tokens=1000, temperature=1.0, request_id=f"{name}-0"
    )
    return completion, asyncio.get_running_loop().time()


def virtually(main: Coroutine[Any, Any, None]) -> None:
    run_virtually(main)


def test_the_clock_jumps_from_timer_to_timer_and_nobody_waits() -> None:
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(sleeper("week", 604800.0), sleeper("second", 1.0), sleeper("day", 86400.0))

    began = time.monotonic()
    virtually(main())
    assert time.monotonic() - began < 60.0
    assert [name for name, _ in seen] == ["second", "day", "week"]
    assert [at for _, at in seen] == pytest.approx([1.0, 86400.0, 604800.0])


def test_a_program_in_which_nothing_can_happen_any_more_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlock"):
        virtually(main())


def test_two_requests_share_the_engine_as_worked_out_by_hand() -> None:
    """Decoding takes 10 ms and 1 ms per sequence, prefill 1 ms a token.

    a is alone until 0.3: 0.1 s of prefill, then 0.2 / 0.011 = 18.18 tokens. b stops it for 0.2 s of prefill; from
    0.5 on both decode at 12 ms. b's 30 tokens end at 0.86, when a has 48.18; its last 1.82 at 11 ms end at 0.88.
    """

    async def main() -> None:
        async with SimulatedClient(engine(Lengths(a=50, b=30))) as client:
            (a, a_done), (b, b_done) = await asyncio.gather(
                call(client, "a", at=0.0, input_tokens=100), call(client, "b", at=0.3, input_tokens=200)
            )
        assert (a_done, b_done) == pytest.approx((0.88, 0.86))
        assert (len(a.token_ids), len(b.token_ids)) == (50, 30)
        assert (a.matched_stop, b.matched_stop) == (0, 0)

    virtually(main())


def test_every_token_makes_the_next_one_slower() -> None:
    """The first step takes 11 ms and 0.1 ms for each of 100 tokens; 10 steps 10 x 21 ms + 0.1 ms x 10^2 / 2."""

    async def main() -> None:
        async with SimulatedClient(engine(Lengths(a=10), context_token_seconds=1e-4)) as client:
            _, done = await call(client, "a", at=0.0, input_tokens=100)
        assert done == pytest.approx(0.1 + 0.210 + 0.005)

    virtually(main())


def test_a_request_beyond_the_running_ones_waits_for_one_of_them() -> None:
    async def main() -> None:
        async with SimulatedClient(engine(Lengths(a=10, b=10), max_running_requests=1)) as client:
            results = await asyncio.gather(
                call(client, "a", at=0.0, input_tokens=100), call(client, "b", at=0.0, input_tokens=100)
            )
        assert [done for _, done in results] == pytest.approx([0.21, 0.42])

    virtually(main())


def test_a_sibling_and_a_later_turn_find_their_prefix_cached() -> None:
    """Siblings share the 50 tokens of the prompt; a second turn finds all 60 of the first, and reads 40 more."""
    policy = Lengths(**{"g.0": 10, "g.1": 10})

    async def main() -> None:
        async with SimulatedClient(engine(policy)) as client:
            _, first = await call(client, "g.0", at=0.0, input_tokens=50)
            sibling, second = await call(client, "g.1", at=first, input_tokens=50)
            policy.remaining["g.0"] = 10
            turn, third = await call(client, "g.0", at=second, input_tokens=100)
        assert (first, second - first, third - second) == pytest.approx((0.16, 0.11, 0.15))
        assert (sibling.cached_tokens, turn.cached_tokens) == (50, 60)

    virtually(main())


@pytest.mark.parametrize("strategy", ["retract", "abort"])
def test_a_publish_interrupts_between_two_tokens_and_computes_the_prefix_anew(
    strategy: interruption.Strategy,
) -> None:
    """18 whole tokens until 0.3, a pause of 0.2 s, 118 ms for the prefix, and 32 tokens of 11 ms."""
    server_policy = Lengths(a=50)

    async def publish(server: SimulatedEngine, client: SimulatedClient) -> None:
        await asyncio.sleep(0.3)
        await interruption.pause(client, strategy)
        await asyncio.sleep(0.2)
        server.version = 1
        await client.resume()

    async def main() -> None:
        server = engine(server_policy)
        async with SimulatedClient(server) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(publish(server, client))
            completion, done = await call(client, "a", at=0.0, input_tokens=100)
            spans = [(s.version, s.start, s.end) for s in completion.version_spans]
            if strategy == "abort":
                assert (completion.finish_reason, spans) == (FinishReason.ABORT, [(0, 0, 18)])
                completion, done = await call(client, "a", at=done, input_tokens=118)
                assert [(s.version, s.start, s.end) for s in completion.version_spans] == [(1, 0, 32)]
            else:
                assert spans == [(0, 0, 18), (1, 18, 50)]
        assert done == pytest.approx(0.5 + 0.118 + 32 * 0.011)

    virtually(main())


def test_the_same_seed_gives_the_same_figures() -> None:
    design = Design(name="a", max_staleness=2, interruption="abort")
    measured = [asdict(run(design)) for _ in range(2)]
    for figures in measured:
        assert figures.pop("driver_cpu") > 0
        figures.pop("peak_memory_bytes")
    assert measured[0] == measured[1]


def test_interruption_and_staleness_beat_the_barrier_and_nothing_beats_the_bound() -> None:
    interrupted = run(Design(name="interrupted", max_staleness=3, interruption="retract"))
    drained = run(Design(name="drained", max_staleness=3, interruption="drain"))
    barrier = run(Design(name="barrier", max_staleness=0, interruption="retract"))
    assert interrupted.rollouts_per_second > drained.rollouts_per_second > barrier.rollouts_per_second
    assert max(each.of_the_bound for each in (interrupted, drained, barrier)) < 1.0
    assert interrupted.rollouts_per_second > 1.5 * barrier.rollouts_per_second
    # All designs trained on the same prompts, in the order of their admission.
    assert interrupted.groups == list(range(32, 72))
    assert barrier.groups == list(range(8, 48))
    assert interrupted.peak_in_flight == 32  # two engines of 16, and never more
