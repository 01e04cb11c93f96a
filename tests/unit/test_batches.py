"""From groups to packed batches with advantages, against numbers worked out by hand."""

import numpy as np
import pytest

from megatron_ztrl.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.batches import Scores, pack_minibatches, with_targets
from megatron_ztrl.observability.clock import PhaseClock
from megatron_ztrl.rollout.scheduler import TakenGroups
from megatron_ztrl.rollout.statistics import model_tokens, rollout_statistics
from megatron_ztrl.rollout.step_metrics import step_metrics
from megatron_ztrl.types import (
    NOT_SAMPLED,
    ExecutionResult,
    ExecutionStatus,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Turn,
)

PROMPT = Prompt(prompt_id="p", problem="", text="", ground_truth="1", data_source="test")
OK = ExecutionResult(status=ExecutionStatus.OK, stdout="1", stderr="", run_seconds=0.0, queue_seconds=0.0)
FAILED = ExecutionResult(
    status=ExecutionStatus.TIMEOUT, stdout="", stderr="", run_seconds=0.0, queue_seconds=0.0
)


def rollout(reward, mask, *, text="", turns=(), stop_reason=StopReason.STOP):
    return Rollout(
        rollout_id="r",
        prompt=PROMPT,
        prompt_ids=[1, 2],
        token_ids=[5] * len(mask),
        logprobs=[-0.5 if sampled else 0.0 for sampled in mask],
        loss_mask=[bool(sampled) for sampled in mask],
        weight_versions=[0 if sampled else NOT_SAMPLED for sampled in mask],
        turns=list(turns),
        text=text,
        stop_reason=stop_reason,
        reward=reward,
    )


def call(result):
    return Turn(start=0, tool_start=1, end=2, code="", result=result)


def config(*, actor=None, **algorithm):
    return Config(
        run=RunConfig(directory="none"),
        model=ModelConfig(path="none", dtype="float32"),
        data=DataConfig(train=DatasetConfig(name="none", path="none")),
        train=TrainConfig(num_steps=1),
        algorithm=AlgorithmConfig(**algorithm),
        actor=actor or ActorConfig(max_tokens_per_microbatch=64),
    )


GROUP = RolloutGroup(group_id=0, prompt=PROMPT, rollouts=[rollout(1.0, [1, 0, 1, 1]), rollout(0.0, [1])])


def trained(batch, name):
    return [
        value
        for rank in batch.microbatches
        for microbatch in rank
        for value in microbatch.per_token[name][microbatch.loss_mask_T]
    ]


def batches(**algorithm):
    chosen = config(old_logprobs="engine", **algorithm)
    packed = pack_minibatches([GROUP], chosen, np.random.default_rng(0))
    ready, statistics = with_targets(packed, [Scores()] * len(packed), chosen, version=0)
    assert statistics == {}
    return [minibatch.actor for minibatch in ready]


def test_grpo_advantages_reach_every_sampled_token_and_no_other():
    (batch,) = batches(advantage="grpo")
    # Rewards 1 and 0: mean 1/2, population deviation 1/2.
    assert sorted(trained(batch, "advantages")) == pytest.approx([-1.0, 1.0, 1.0, 1.0], abs=1e-4)
    assert batch.trained_tokens == 4


def test_reinforce_pp_advantages_are_whitened_over_tokens():
    (batch,) = batches(advantage="reinforce_pp_baseline")
    # Centred rewards +1/2 on three tokens and -1/2 on one: mean 1/4, deviation sqrt(3)/4.
    deviation = 3**0.5 / 4
    expected = [-0.75 / deviation] + [0.25 / deviation] * 3
    assert sorted(trained(batch, "advantages")) == pytest.approx(expected, abs=1e-4)


def test_mini_batches_share_the_statistics_of_the_whole_step():
    parts = batches(advantage="grpo", minibatches=2)
    values = sorted(value for batch in parts for value in trained(batch, "advantages"))
    assert values == pytest.approx([-1.0, 1.0, 1.0, 1.0], abs=1e-4)
    assert sorted(batch.trained_tokens for batch in parts) == [1, 3]


def test_old_logprobs_come_from_the_engine_or_from_the_trainer():
    (batch,) = batches()
    assert trained(batch, "old_logprobs") == [-0.5] * 4
    chosen = config()
    (packed,) = pack_minibatches([GROUP], chosen, np.random.default_rng(0))
    trainer = [
        [np.where(mb.loss_mask_T, np.float32(-0.75), np.float32(9.0)) for mb in rank]
        for rank in packed.actor.microbatches
    ]
    ([attached], statistics) = with_targets([packed], [Scores(old_logprobs=trainer)], chosen, version=0)
    assert trained(attached.actor, "old_logprobs") == [-0.75] * 4
    assert statistics["mismatch/gap_max"] == statistics["mismatch/gap_mean"] == 0.25
    assert "importance_weights" not in attached.actor.microbatches[0][0].per_token  # float32, on policy


def test_ppo_targets_follow_model_tokens_across_a_tool_reply():
    chosen = config(advantage="gae", gamma=0.5, gae_lambda=0.5, old_logprobs="engine")
    (packed,) = pack_minibatches([GROUP], chosen, np.random.default_rng(0))
    # The critic said 0.25 before every trained token, and nonsense elsewhere.
    values = [
        [np.where(mb.loss_mask_T, np.float32(0.25), np.float32(9.0)) for mb in rank]
        for rank in packed.critic.microbatches
    ]
    ([ready], statistics) = with_targets([packed], [Scores(values=values)], chosen, version=0)
    # Rollout 1 (reward 1, three model tokens around one of the tool), from the last token backwards:
    # 1 - 0.25 = 0.75; (0.5 * 0.25 - 0.25) + 0.25 * 0.75 = 0.0625; -0.125 + 0.25 * 0.0625 = -0.109375.
    # Rollout 2 (reward 0, one token): -0.25.
    advantages = [-0.109375, 0.0625, 0.75, -0.25]
    returns = [a + 0.25 for a in advantages]
    assert trained(ready.critic, "old_values") == [0.25] * 4
    assert sorted(trained(ready.critic, "returns")) == pytest.approx(sorted(returns))
    whitened = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
    assert sorted(trained(ready.actor, "advantages")) == pytest.approx(sorted(whitened), rel=1e-5)
    assert statistics["critic/value"] == 0.25
    assert statistics["critic/return"] == pytest.approx(np.mean(returns))
    assert statistics["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a constant explains none


def random_groups(random):
    """Three groups of four rollouts with tool replies, each token with log-prob and version of its own."""
    groups = []
    for group_id in range(3):
        rollouts = []
        for _ in range(4):
            length = int(random.integers(1, 25))
            made = rollout(float(random.integers(2)), [1, *(random.random(length) < 0.7)])
            made.logprobs = [-float(random.exponential()) if m else 0.0 for m in made.loss_mask]
            made.token_ids = random.integers(3, 10**6, length + 1).tolist()
            rollouts.append(made)
        groups.append(RolloutGroup(group_id=group_id, prompt=PROMPT, rollouts=rollouts))
    return groups


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(
    ("data_parallel_size", "tokens", "minibatches"), [(1, 10_000, 1), (2, 40, 1), (3, 27, 1), (2, 64, 3)]
)
def test_weights_reach_their_own_tokens_however_the_step_is_cut(
    level, data_parallel_size, tokens, minibatches
):
    groups = random_groups(np.random.default_rng(5))
    actor = ActorConfig(max_tokens_per_microbatch=tokens, data_parallel_size=data_parallel_size)
    chosen = config(
        actor=actor, minibatches=minibatches, importance_correction="truncate", importance_level=level
    )
    # What the trainer says depends on the token alone, so that it can be told without the packing.
    shift = np.random.default_rng(6).normal(0, 0.3, 10**6)
    expected = {}
    for group in groups:
        for r in group.rollouts:
            mine = [i for i, sampled in enumerate(r.loss_mask) if sampled]
            ratios = [np.exp(shift[r.token_ids[i]]) for i in mine]
            if level != "token":
                whole = np.prod(ratios)
                ratios = [whole if level == "sequence" else whole ** (1 / len(ratios))] * len(ratios)
            expected |= {r.token_ids[i]: min(ratio, 2.0) for i, ratio in zip(mine, ratios, strict=True)}
    packed = pack_minibatches(groups, chosen, np.random.default_rng(0))
    scores = [
        Scores(
            old_logprobs=[
                [mb.per_token["rollout_logprobs"] + shift[mb.target_ids_T] for mb in rank]
                for rank in minibatch.actor.microbatches
            ]
        )
        for minibatch in packed
    ]
    ready, statistics = with_targets(packed, scores, chosen, version=0)
    found = {}
    for minibatch in ready:
        for rank in minibatch.actor.microbatches:
            for mb in rank:
                weight_T = mb.per_token["importance_weights"]
                assert (weight_T[~mb.loss_mask_T] == 0).all()
                found |= dict(
                    zip(mb.target_ids_T[mb.loss_mask_T], weight_T[mb.loss_mask_T].tolist(), strict=True)
                )
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(minibatch.actor.trained_tokens for minibatch in ready) == len(expected)
    assert statistics["importance/weight_mean"] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


def test_masked_tokens_stay_in_the_denominator():
    chosen = config(importance_correction="mask", importance_cap=1.1, importance_floor=0.9)
    (packed,) = pack_minibatches([GROUP], chosen, np.random.default_rng(0))
    trainer = [[np.full(mb.loss_mask_T.shape, -3.0) for mb in rank] for rank in packed.actor.microbatches]
    ([ready], statistics) = with_targets([packed], [Scores(old_logprobs=trainer)], chosen, version=0)
    assert trained(ready.actor, "importance_weights") == [0.0] * 4
    assert ready.actor.trained_tokens == 4
    assert statistics["importance/cut"] == 1.0
    assert statistics["importance/effective_share"] == 0.0


def test_tokens_of_older_weights_do_not_count_as_mismatch():
    chosen = config()
    (packed,) = pack_minibatches([GROUP], chosen, np.random.default_rng(0))
    trainer = [[mb.per_token["rollout_logprobs"] - 1.0 for mb in rank] for rank in packed.actor.microbatches]
    _, statistics = with_targets([packed], [Scores(old_logprobs=trainer)], chosen, version=1)
    assert statistics["staleness/gap_max"] == 1.0  # GROUP was sampled under version 0
    assert statistics["staleness/share"] == 1.0
    assert not any(key.startswith("mismatch/") for key in statistics)


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp_baseline", "gae"])
def test_a_rollout_without_a_token_has_a_reward_and_no_say(advantage):
    """An engine that has no room for a single token returns none."""
    empty = rollout(0.0, [], stop_reason=StopReason.LENGTH)
    group = RolloutGroup(group_id=0, prompt=PROMPT, rollouts=[rollout(1.0, [1, 1]), empty])
    chosen = config(advantage=advantage)
    (packed,) = pack_minibatches([group], chosen, np.random.default_rng(0))
    logprobs = [[np.full(mb.loss_mask_T.shape, -0.5) for mb in rank] for rank in packed.actor.microbatches]
    scores = Scores(old_logprobs=logprobs, values=logprobs)
    ([ready], statistics) = with_targets([packed], [scores], chosen, version=0)
    assert ready.actor.trained_tokens == 2
    # Two tokens of one rollout: whitened over tokens they tell each other nothing; GRPO compares the two rewards.
    assert trained(ready.actor, "advantages") == pytest.approx(
        [1.0 if advantage == "grpo" else 0.0] * 2, abs=1e-4
    )
    metrics = step_metrics(1, TakenGroups(groups=[group]), [statistics], PhaseClock())
    assert metrics["train/staleness_max"] == 0
    assert metrics["train/response_tokens"] == 1.0


def test_statistics_count_executed_beside_written_code_and_leave_out_infrastructure_failures():
    rollouts = [
        rollout(1.0, [1, 0, 1], text="```python\n1\n```", turns=[call(OK)]),
        rollout(0.0, [1], text="```python\n1\n``` ```python\n1\n```", turns=[call(FAILED)]),
        rollout(0.0, [1, 1], text="7", stop_reason=StopReason.LENGTH),
        rollout(0.0, [1], text="```python", stop_reason=StopReason.INFRASTRUCTURE),
    ]
    statistics = rollout_statistics(rollouts)
    assert statistics["accuracy"] == pytest.approx(1 / 3)
    assert statistics["code_proportion"] == pytest.approx(2 / 3)
    assert statistics["code_ratio"] == pytest.approx(2 / 3)
    assert statistics["written_calls"] == pytest.approx(1.0)
    assert statistics["failed_calls"] == pytest.approx(1 / 3)
    assert statistics["response_tokens"] == pytest.approx(2.0)
    assert statistics["truncated"] == pytest.approx(1 / 3)
    assert statistics["infrastructure_failures"] == pytest.approx(1 / 4)
    assert model_tokens(rollouts[:2]) == 3
