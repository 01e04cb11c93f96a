"""Which groups are trained on."""

import pytest

from megatron_ztrl.algorithms.filters import keep_group
from megatron_ztrl.config.schema import AlgorithmConfig
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup, StopReason

PROMPT = Prompt(prompt_id="p", problem="q", text="q", ground_truth="1", data_source="d")


def _group(*rewards: float | None) -> RolloutGroup:
    """None is a rollout that the infrastructure failed."""
    rollouts = [
        Rollout(
            rollout_id=str(i),
            prompt=PROMPT,
            prompt_ids=[1],
            stop_reason=StopReason.INFRASTRUCTURE if reward is None else StopReason.STOP,
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]
    return RolloutGroup(group_id=0, prompt=PROMPT, rollouts=rollouts)


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((0, 0, 0, 0), False),
        ((1, 0, 0, 0), True),  # exactly the lower bound
        ((1, 1, 1, 0), True),  # exactly the upper bound
        ((1, 1, 1, 1), False),
        ((1, 0, None, None), True),  # the infrastructure's failures are no wrong answers: 1/2, not 1/4
        ((1, 1, 1, None), False),
    ],
)
def test_accuracy_bounds_are_inclusive_and_count_trainable_rollouts_only(rewards, kept: bool):
    assert keep_group(_group(*rewards), AlgorithmConfig(min_accuracy=0.25, max_accuracy=0.75)) is kept


def test_default_bounds_keep_every_group_but_one_that_the_infrastructure_failed():
    assert keep_group(_group(0, 0), AlgorithmConfig())
    assert keep_group(_group(1, 1), AlgorithmConfig())
    assert not keep_group(_group(None, None), AlgorithmConfig())
