"""The filter tells the user when it leaves nothing to train on."""

from megatron_ztrl.config.schema import AlgorithmConfig
from megatron_ztrl.rollout.group_filter import GroupFilter
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup, StopReason

PROMPT = Prompt(prompt_id="p", problem="", text="", ground_truth="", data_source="d")


def group(*rewards):
    """None is a rollout that the infrastructure failed."""
    rollouts = [
        Rollout(
            rollout_id="0.0",
            prompt=PROMPT,
            prompt_ids=[],
            reward=reward,
            stop_reason=StopReason.INFRASTRUCTURE if reward is None else StopReason.STOP,
        )
        for reward in rewards
    ]
    return RolloutGroup(group_id=0, prompt=PROMPT, rollouts=rollouts)


def filter_of(said, **bounds):
    return GroupFilter(AlgorithmConfig(**bounds), patience_groups=3, note=said.append)


def test_it_says_so_each_time_that_so_many_groups_in_a_row_are_refused():
    said = []
    keeps = filter_of(said, min_accuracy=0.2, max_accuracy=0.8)
    unsolved, solved, useful = group(0.0, 0.0), group(1.0, 1.0), group(0.0, 1.0)
    assert [keeps(each) for each in (unsolved, solved, useful, unsolved, unsolved)] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert said == []
    keeps(solved)
    assert said == [
        "warning: no group to train on among the last 3: 3 have accuracies from 0.000 to 1.000, where "
        "algorithm.min_accuracy and max_accuracy want 0.2 to 0.8"
    ]
    for _ in range(3):
        keeps(unsolved)
    assert len(said) == 2


def test_a_failing_infrastructure_is_not_taken_for_a_policy_that_solves_nothing():
    said = []
    keeps = filter_of(said)
    for _ in range(3):
        keeps(group(None, None))
    assert said == [
        "warning: no group to train on among the last 3: the infrastructure failed all rollouts of 3"
    ]
