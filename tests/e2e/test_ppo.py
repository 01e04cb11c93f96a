"""PPO on real components: actor (TP 2), critic (PP 2) and reference policy are worlds of their own."""

import json

import pytest
from running import LIMIT_SECONDS, MANY, QUICKSTART, SMALL, assert_nothing_left, rows, ztrl

pytestmark = pytest.mark.timeout(1200)  # some runs of at most ``LIMIT_SECONDS`` each
PPO = QUICKSTART.parents[1] / "quickstart_ppo" / "config.yaml"
SETTING = ("algorithm.critic_warmup_steps=1", "algorithm.minibatches=1", "algorithm.kl_coefficient=0.01")


def ppo(run, *arguments):
    process = ztrl("train", str(PPO), f"run.directory={run}", *SMALL, *SETTING, *arguments)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output
    return rows(run, "train")


def test_ppo_trains_its_critic_first_and_measures_the_distance_to_the_first_policy(tmp_path, marker):
    run = tmp_path / "run"
    first, second, third = ppo(run, "reference.placement=world", "train.num_steps=3", *MANY)
    assert "loss/policy" not in first  # the actor waits
    assert first["critic/value"] == 0.0  # the head of a critic made from a policy
    assert first["critic/grad_norm"] > 0 and second["critic/value"] != 0.0
    assert second["loss/grad_norm"] > 0
    assert abs(second["loss/reference_kl"]) < 1e-6  # measured before the actor's first step
    assert third["loss/reference_kl"] > 1e-6
    config = json.loads((run / "critic" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForTokenClassification"]
    assert_nothing_left(marker)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference_which_the_actor_s_ranks_can_hold(tmp_path, marker):
    run = tmp_path / "run"
    ppo(run, "reference.placement=actor", "train.num_steps=2")
    train = ppo(run, "reference.placement=actor", "train.num_steps=4", "--resume")
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    assert abs(train[1]["loss/reference_kl"]) < 1e-6
    # The first policy, not the one that the run resumed from.
    assert all(row["loss/reference_kl"] > 1e-6 for row in train[2:])
    assert all(row["mismatch/gap_max"] < 1e-4 for row in train[1:])  # swapped weights never reach an engine
    assert_nothing_left(marker)
