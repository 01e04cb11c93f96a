"""The staleness bound down to single tokens, through the real rollout code, on simulated engines.

The engines sample while the trainer trains, and a publish arrives in the middle of rollouts, so a rollout has
tokens of several versions; a fifth of the groups is refused and refilled.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from piece_tokenizer import PieceTokenizer

from megatron_ztrl.rollout.scheduler import TakenGroups
from megatron_ztrl.types import NOT_SAMPLED

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _simulated_engine import EngineTiming
from _simulated_policy import Workload
from rollout_simulator import Design, Scenario, simulate

STEPS, GROUPS_PER_STEP = 60, 4


@pytest.mark.parametrize("interruption", ["retract", "abort"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_the_oldest_token_trained_is_exactly_as_stale_as_allowed(max_staleness, interruption) -> None:
    scenario = Scenario(
        workload=Workload(
            median_response_tokens=40, max_response_tokens=500, prompt_tokens=20, mean_calls=1.0
        ),
        timing=EngineTiming(
            step_seconds=0.010,
            sequence_seconds=0.0,
            context_token_seconds=0.0,
            prefill_token_seconds=1e-5,
            max_running_requests=32,
        ),
        engines=2,
        executor_workers=8,
        groups_per_step=GROUPS_PER_STEP,
        group_size=2,
        trainer_token_seconds=0.0005,
        publish_seconds=0.1,
        refused_share=0.2,
        steps=STEPS - max_staleness - 1,
    )
    trained: list[int] = []
    refused: list[int] = []
    staleness: list[int] = []
    mixed = 0

    def on_step(version: int, taken: TakenGroups) -> None:
        nonlocal mixed
        trained.extend(group.group_id for group in taken.groups)
        refused.extend(group.group_id for group in taken.dropped)
        for rollout in (rollout for group in taken.groups for rollout in group.rollouts):
            versions = [v for v in rollout.weight_versions if v != NOT_SAMPLED]
            assert versions == sorted(versions)
            assert versions[-1] <= version
            mixed += versions[0] < versions[-1]
            staleness.append(version - versions[0])

    design = Design(name="", max_staleness=max_staleness, interruption=interruption)
    simulate(scenario, design, PieceTokenizer(), on_step)
    assert max(staleness) == max_staleness
    assert len(trained) == STEPS * GROUPS_PER_STEP
    assert trained == sorted(set(trained))
    # Every group was trained or refused, in order, and none is missing.
    seen = sorted(trained + refused)
    assert seen == list(range(len(seen)))
    assert 0.1 < len(refused) / len(seen) < 0.3
    assert (mixed > 0) == (max_staleness > 0)
