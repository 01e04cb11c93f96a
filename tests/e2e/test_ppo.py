"""PPO on real components: actor (TP 2), critic (PP 2) and reference policy are worlds of their own."""

import json

from running import QUICKSTART, SMALL, assert_nothing_left, rows, ztrl

PPO = QUICKSTART.parents[1] / "quickstart_ppo" / "config.yaml"


def test_ppo_trains_its_critic_first_and_resumes_with_the_same_reference(tmp_path, marker):
    run = tmp_path / "run"
    arguments = (
        "train",
        str(PPO),
        f"run.directory={run}",
        *SMALL,
        "algorithm.critic_warmup_steps=1",
        "algorithm.minibatches=1",
        "algorithm.kl_coefficient=0.01",
    )
    process = ztrl(*arguments, "reference.placement=world", "train.num_steps=2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = rows(run, "train")
    assert "loss/policy" not in first  # the actor waits
    assert first["critic/value"] == 0.0  # the head of a critic made from a policy
    assert first["critic/grad_norm"] > 0 and second["critic/value"] != 0.0
    assert second["loss/grad_norm"] > 0
    assert abs(second["loss/reference_kl"]) < 1e-6  # measured before the actor's first step
    config = json.loads((run / "critic" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForTokenClassification"]
    assert_nothing_left(marker)

    # The reference is the policy that the run began with, not the one it resumes from; here in the actor's ranks.
    process = ztrl(*arguments, "reference.placement=actor", "train.num_steps=4", "--resume")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    train = rows(run, "train")
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    assert all(row["loss/reference_kl"] > 1e-6 for row in train[2:])
    assert all(row["loss/logprob_gap"] < 1e-4 for row in train[1:])  # swapped weights never reach an engine
    assert_nothing_left(marker)
