"""Rollouts become training samples."""

import pytest

from megatron_ztrl.data.samples import build_samples
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup, StopReason

PROMPT = Prompt(prompt_id="p", problem="1+1", text="1+1", ground_truth="2", data_source="d")


def _rollout(stop_reason: StopReason, reward: float | None) -> Rollout:
    return Rollout(
        rollout_id="g3-r0",
        prompt=PROMPT,
        prompt_ids=[1, 2],
        token_ids=[3, 4, 5],
        logprobs=[-0.5, 0.0, -1.5],
        loss_mask=[True, False, True],
        weight_versions=[4, -1, 5],
        stop_reason=stop_reason,
        reward=reward,
    )


def test_prompt_and_response_are_flattened_with_prompt_and_tool_tokens_masked():
    [sample] = build_samples(
        [RolloutGroup(group_id=3, prompt=PROMPT, rollouts=[_rollout(StopReason.STOP, 1.0)])]
    )
    assert sample.token_ids == [1, 2, 3, 4, 5]
    assert sample.loss_mask == [False, False, True, False, True]
    assert sample.rollout_logprobs == [0.0, 0.0, -0.5, 0.0, -1.5]
    assert sample.weight_versions == [-1, -1, 4, -1, 5]
    assert (sample.reward, sample.group_id) == (1.0, 3)


def test_rollouts_that_the_infrastructure_failed_are_left_out():
    rollouts = [_rollout(StopReason.INFRASTRUCTURE, None), _rollout(StopReason.LENGTH, 0.0)]
    samples = build_samples([RolloutGroup(group_id=0, prompt=PROMPT, rollouts=rollouts)])
    assert [s.reward for s in samples] == [0.0]


def test_an_unscored_rollout_is_refused():
    group = RolloutGroup(group_id=0, prompt=PROMPT, rollouts=[_rollout(StopReason.STOP, None)])
    with pytest.raises(ValueError, match="g3-r0 has no reward"):
        build_samples([group])
