"""What becomes of rollouts and groups that miss their deadline, on simulated engines and a virtual clock."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from piece_tokenizer import PieceTokenizer

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout.deadlines import Deadlines
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.statistics import rollout_statistics
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.types import ExecutionResult, Prompt, RolloutGroup, StopReason

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _simulated_engine import Continuation, EngineTiming, SimulatedClient, SimulatedEngine
from _simulated_time import CpuMeter, run_virtually

TIMING = EngineTiming(
    step_seconds=0.010,
    sequence_seconds=0.0,
    context_token_seconds=0.0,
    prefill_token_seconds=0.0,
    max_running_requests=8,
)
PROMPT = Prompt(prompt_id="p", problem="", text="What is 2 + 2?", ground_truth="4", data_source="test")


class Script:
    """A policy that writes the same text in every rollout, repeated so many times."""

    prompt_tokens = 1

    def __init__(self, tokenizer: PieceTokenizer, text: str, tokens: dict[str, int]) -> None:
        self.piece = tokenizer.encode(text)
        self.remaining = dict(tokens)

    def continue_rollout(self, rollout_id: str, max_new_tokens: int) -> Continuation:
        left = self.remaining[rollout_id]
        if left > max_new_tokens:
            return Continuation(token_ids=self.piece * max_new_tokens, finish_reason={"type": "length"})
        return Continuation(token_ids=self.piece * left, finish_reason={"type": "stop", "matched": 0})

    def said(self, rollout_id: str, tokens: int) -> None:
        self.remaining[rollout_id] -= tokens


async def no_tool(code: str) -> ExecutionResult:
    raise AssertionError("nothing is run here")


def rolled_out(
    deadlines: Deadlines,
    tokens: dict[str, int],
    *,
    concurrent: int = 8,
    text: str = "abcd",
    execute: Callable[[str], Awaitable[ExecutionResult]] = no_tool,
) -> RolloutGroup:
    """One group; a token takes 10 ms, whatever else runs, and a call samples at most 20."""

    async def score(text: str, truth: str) -> float:
        return 1.0

    async def main() -> RolloutGroup:
        tokenizer = PieceTokenizer()
        async with SimulatedClient(
            SimulatedEngine(TIMING, Script(tokenizer, text, tokens), CpuMeter())
        ) as client:
            fleet = EngineFleet([client], max_concurrent_per_engine=concurrent)
            runner = GroupRunner(
                fleet=fleet,
                tokenizer=tokenizer,
                execute=execute,
                score=score,
                template=get_template("plain"),
                tool=ToolConfig(),
                sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=500, max_call_tokens=20),
                deadlines=deadlines,
            )
            group = await runner.run(0, PROMPT, group_size=len(tokens), env_iterations=1)
            assert fleet.load(client) == 0
            return group

    return run_virtually(main())


def test_a_rollout_that_misses_its_deadline_is_masked_and_its_siblings_are_not() -> None:
    group = rolled_out(Deadlines(rollout_seconds=0.555), {"0.0": 30, "0.1": 300})
    short, long = group.rollouts
    assert (short.stop_reason, short.reward, short.trainable) == (StopReason.STOP, 1.0, True)
    assert (long.stop_reason, long.reward, long.trainable) == (StopReason.DEADLINE, None, False)
    # 55 tokens were sampled; the two calls of 20 that had returned are kept, for whoever reads the rollout.
    assert len(long.token_ids) == len(long.loss_mask) == len(long.logprobs) == len(long.weight_versions) == 40
    assert [(turn.start, turn.end) for turn in long.turns] == [(0, 40)]
    assert long.text == "abcd" * 40
    assert group.accuracy == 1.0
    statistics = rollout_statistics(group.rollouts)
    assert (statistics["missed_deadlines"], statistics["infrastructure_failures"]) == (0.5, 0.0)
    assert statistics["response_tokens"] == 30


def test_waiting_for_an_engine_is_not_a_rollouts_own_time() -> None:
    """Three rollouts of half a second, one after the other on an engine with one place."""
    group = rolled_out(Deadlines(rollout_seconds=0.6), {"0.0": 50, "0.1": 50, "0.2": 50}, concurrent=1)
    assert [rollout.stop_reason for rollout in group.rollouts] == [StopReason.STOP] * 3


def test_the_time_of_a_group_runs_for_all_siblings_from_the_first_that_has_an_engine() -> None:
    """The first ends at 0.5, the second is given up at 0.8, the third has no time left when it gets its place."""
    group = rolled_out(
        Deadlines(rollout_seconds=0.6, group_seconds=0.8), {"0.0": 50, "0.1": 50, "0.2": 50}, concurrent=1
    )
    assert [rollout.stop_reason for rollout in group.rollouts] == [
        StopReason.STOP,
        StopReason.DEADLINE,
        StopReason.DEADLINE,
    ]
    assert [len(rollout.token_ids) for rollout in group.rollouts] == [50, 20, 0]


def test_a_time_out_of_something_else_is_an_error_and_no_missed_deadline() -> None:
    async def hangs(code: str) -> ExecutionResult:
        raise TimeoutError("the executor's own")

    with pytest.raises(ExceptionGroup) as caught:
        rolled_out(Deadlines(rollout_seconds=60.0), {"0.0": 1}, text="```python\n1\n```\n", execute=hangs)
    assert caught.group_contains(TimeoutError, match="the executor's own")
