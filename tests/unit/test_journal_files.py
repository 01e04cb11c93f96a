"""Which groups have a file in the journal, and for how long; and what makes one of no use."""

import asyncio
import dataclasses
import functools

import pytest
from scripted_rollouts import ScriptedPolicy, files, journal_in, resumed, run, script, write_group

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ToolConfig,
    TrainConfig,
)
from megatron_ztrl.rollout.journal import identity
from megatron_ztrl.rollout.trajectory import Sampling


async def test_the_journal_holds_only_what_no_checkpoint_covers(tmp_path):
    journal = journal_in(tmp_path)
    for group_id in range(6):
        await run(journal, group_id=group_id, policy=ScriptedPolicy(lambda position: 1))
    # A checkpoint is begun when 0 to 2 have been released, and complete only after group 5 was admitted.
    journal.checkpoint_begun(1)
    await asyncio.sleep(0)
    journal.checkpoint_complete(pending={3, 4}, next_group_id=5)
    journal.close()
    assert files(tmp_path) == [3, 4, 5]


async def test_a_crash_between_a_checkpoint_and_the_clean_up_leaves_nothing_to_train_twice(tmp_path):
    journal = journal_in(tmp_path)
    for group_id in range(4):
        await run(journal, group_id=group_id)
    journal.close()
    journal, found = resumed(tmp_path, pending={2}, next_group_id=3)
    assert files(tmp_path) == [2, 3]
    assert found.rollouts == 4
    assert journal.recorder(1, 0).restored is None
    journal.close()


async def test_without_checkpoints_the_journal_stays_as_small_as_what_is_in_flight(tmp_path):
    """Nothing that a policy after the checkpoint sampled can be of use once its group is trained."""
    journal = journal_in(tmp_path)
    for step in range(12):
        policy = ScriptedPolicy(functools.partial(lambda version, position: version, step))
        journal.released([(await run(journal, group_id=step, policy=policy)).group])
    journal.close()
    assert files(tmp_path) == [0]  # sampled by the policy that a resume would begin with


async def test_a_group_that_began_before_the_checkpoint_stays_after_its_release(tmp_path):
    journal = journal_in(tmp_path)
    journal.checkpoint_begun(3)
    old = await run(journal, group_id=0, policy=ScriptedPolicy(lambda position: 3 + position // 50))
    new = await run(journal, group_id=1, policy=ScriptedPolicy(lambda position: 4))
    journal.released([old.group, new.group])
    journal.close()
    assert files(tmp_path) == [0]


async def test_a_run_that_begins_removes_what_another_left(tmp_path):
    _, file = await write_group(tmp_path / "journal")
    journal = journal_in(file.parent)
    journal.clear()
    assert not file.parent.exists()
    await run(journal, size=1)
    journal.close()
    assert files(file.parent) == [7]


async def test_a_disk_that_is_full_stops_the_run_instead_of_a_later_resume(tmp_path):
    directory = tmp_path / "file"
    directory.write_text("no directory can be made here")
    journal = journal_in(directory)
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.gather(*(run(journal, group_id=group_id, size=20) for group_id in range(50)))
    assert caught.group_contains(FileExistsError)


async def test_a_rollout_is_asked_for_in_calls_of_bounded_length(tmp_path):
    journal = journal_in(tmp_path)
    outcome = await run(journal, size=1, max_call_tokens=4)
    journal.close()
    assert {asked for _, asked, _ in outcome.policy.asked} == {4}
    assert outcome.group.rollouts[0].token_ids == script(0)[0]


def test_rollouts_depend_on_what_they_were_sampled_answered_and_scored_with():
    config = Config(
        run=RunConfig(directory="run"),
        model=ModelConfig(path="model"),
        data=DataConfig(train=DatasetConfig(name="d", path="d.jsonl")),
        train=TrainConfig(num_steps=1),
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=8, max_call_tokens=4)
    first = identity(config, sampling, "fingerprint")
    elsewhere = dataclasses.replace(
        config, rollout=RolloutConfig(groups_per_step=2), tool=ToolConfig(retries=9)
    )
    assert identity(elsewhere, dataclasses.replace(sampling, max_call_tokens=2), "fingerprint") == first
    changes = (
        {"tool": ToolConfig(max_output_tokens=9)},
        {"tool": ToolConfig(environment="search.py:Search")},
        {"reward": RewardConfig(require_answer_tags=False)},
        {"reward": RewardConfig(function="reward.py:score")},
        {"data": dataclasses.replace(config.data, prompt_template="plain")},
    )
    others = [
        *(identity(dataclasses.replace(config, **change), sampling, "fingerprint") for change in changes),
        identity(config, dataclasses.replace(sampling, temperature=0.9), "fingerprint"),
        identity(config, sampling, "other prompts"),
    ]
    assert len({first, *others}) == 1 + len(others)
