"""What the journal gives back after a crash: the rollouts as they were, and the course they would have taken."""

import struct

import pytest
from scripted_rollouts import (
    ALL_VERSIONS,
    PROMPT,
    TOKENS_PER_VERSION,
    Sandbox,
    ScriptedPolicy,
    boundaries,
    content,
    journal_in,
    resumed,
    run,
    script,
    write_group,
)

from megatron_ztrl.rollout import journal_records as records
from megatron_ztrl.rollout.trajectory import append_reply, append_sampled
from megatron_ztrl.types import (
    NOT_SAMPLED,
    ExecutionResult,
    ExecutionStatus,
    Rollout,
    StopReason,
    Turn,
    VersionSpan,
)


@pytest.fixture
async def written(tmp_path):
    return await write_group(tmp_path / "journal")


async def test_the_scripted_group_is_what_the_script_says(written):
    outcome, _ = written
    for index, rollout in enumerate(outcome.group.rollouts):
        tokens, mask = script(index)
        assert rollout.token_ids == tokens
        assert rollout.loss_mask == mask
        assert rollout.executed_calls == 2
        assert rollout.stop_reason is StopReason.STOP and rollout.ended
        assert rollout.reward == 1.0


async def test_a_driver_that_dies_after_any_record_takes_the_course_it_would_have_taken(written, tmp_path):
    outcome, file = written
    data = file.read_bytes()
    ends = boundaries(data)
    assert len(ends) > 25  # moments to die at
    expected, executed = content(outcome.group), outcome.sandbox.executed
    for number, end in enumerate(ends):
        directory = tmp_path / f"killed{number}"
        directory.mkdir()
        (directory / file.name).write_bytes(data[:end])
        journal, found = resumed(directory)
        assert found.damage == []
        again = await run(journal)
        journal.close()
        assert content(again.group) == expected
        recorded = data[:end].count(b'"kind":"turn"')
        assert (
            len(again.sandbox.executed) == len(executed) - recorded
        )  # a block without its result runs again
        # The file that the resumed run has gone on with says the same.
        journal, found = resumed(directory)
        assert found.tokens == sum(len(rollout.token_ids) for rollout in outcome.group.rollouts)
        replayed = await run(journal)
        journal.close()
        assert replayed.policy.calls == 0 and replayed.sandbox.executed == []
        assert content(replayed.group) == expected


async def test_a_finished_rollout_keeps_its_reward_and_is_not_scored_again(written):
    _, file = written
    journal, _ = resumed(file.parent)
    assert [journal.recorder(7, index).restored.reward for index in range(2)] == [1.0, 1.0]
    journal.close()


@pytest.mark.parametrize("version", range(18))
async def test_tokens_of_policies_after_the_checkpoint_are_sampled_again(written, version):
    """Of the prefix that stays nothing changes; the turn budget is what it was at the cut."""
    outcome, file = written
    cut = (version + 1) * TOKENS_PER_VERSION
    journal, found = resumed(file.parent, version)
    policy = ScriptedPolicy(lambda position: 100)
    again = await run(journal, policy=policy)
    journal.close()
    for before, after in zip(outcome.group.rollouts, again.group.rollouts, strict=True):
        assert after.token_ids == before.token_ids
        assert after.loss_mask == before.loss_mask
        assert after.turns == before.turns
        # The cut falls on the first later token that a policy sampled: a reply that begins after the last
        # kept token stays, since the block it answers does.
        kept = next(
            (p for p, v in enumerate(before.weight_versions) if v > version), len(before.weight_versions)
        )
        assert kept >= min(cut, len(before.token_ids))
        assert after.weight_versions[:kept] == before.weight_versions[:kept]
        assert set(after.weight_versions[kept:]) <= {100, NOT_SAMPLED}
        assert after.logprobs == before.logprobs
    assert found.tokens_cut == sum(
        len(r.token_ids) - next((p for p, v in enumerate(r.weight_versions) if v > version), len(r.token_ids))
        for r in outcome.group.rollouts
    )


async def test_what_was_cut_is_gone_when_the_same_version_numbers_come_again(written):
    """Two crashes: tokens of the first life's version 5 are not taken for the second life's."""
    _, file = written
    journal, first = resumed(file.parent, 4)
    journal.close()
    assert first.tokens_cut > 0
    _, second = resumed(file.parent, 5)
    assert second.tokens_cut == 0
    assert second.tokens == first.tokens


@pytest.mark.parametrize("lost", [1, 7, 60])
async def test_a_record_that_was_half_written_is_dropped_without_a_word(written, lost):
    outcome, file = written
    data = file.read_bytes()
    file.write_bytes(data[:-lost])
    journal, found = resumed(file.parent)
    assert found.damage == []
    assert content((await run(journal)).group) == content(outcome.group)
    journal.close()


async def test_a_damaged_record_is_named_and_costs_only_what_follows_it(written):
    outcome, file = written
    data = bytearray(file.read_bytes())
    start = boundaries(data)[9]
    data[start + 20] ^= 1
    file.write_bytes(data)
    journal, found = resumed(file.parent)
    assert found.damage == [f"{file}: damaged at byte {start}; what is missing is rolled out again"]
    assert found.tokens > 0
    again = await run(journal)
    journal.close()
    assert content(again.group) == content(outcome.group)
    assert 0 < again.policy.calls < outcome.policy.calls


@pytest.mark.parametrize("junk", [b"\0" * 64, b"no journal at all, but long enough for a frame"])
async def test_a_file_of_something_else_is_rolled_out_anew(tmp_path, junk):
    (tmp_path / "00000007").write_bytes(junk)
    journal, found = resumed(tmp_path)
    assert found.rollouts == 0
    assert not (tmp_path / "00000007").exists()
    await run(journal)
    journal.close()


async def test_rollouts_of_other_settings_are_not_gone_on_with(written):
    _, file = written
    journal = journal_in(file.parent, identity="other settings")
    found = journal.restore(ALL_VERSIONS)
    journal.close()
    assert found.rollouts == 0
    assert found.damage == [
        f"{file}: written under other settings of rollouts, prompts or rewards; what is missing is rolled out again"
    ]


async def test_logprobs_that_are_no_single_precision_numbers_come_back_exactly(written):
    outcome, file = written
    journal, _ = resumed(file.parent)
    assert journal.recorder(7, 1).restored.logprobs == outcome.group.rollouts[1].logprobs
    assert any(struct.unpack("<f", struct.pack("<f", p))[0] != p for p in outcome.group.rollouts[1].logprobs)
    journal.close()


async def test_a_rollout_that_the_infrastructure_failed_stays_untrainable(tmp_path):
    class DeadSandbox(Sandbox):
        async def __call__(self, code):
            return ExecutionResult(
                status=ExecutionStatus.SANDBOX_ERROR, stdout="", stderr="", run_seconds=0, queue_seconds=0
            )

    journal = journal_in(tmp_path)
    first = await run(journal, sandbox=DeadSandbox())
    journal.close()
    journal, _ = resumed(tmp_path)
    again = await run(journal)
    journal.close()
    assert content(again.group) == content(first.group)
    assert [rollout.trainable for rollout in again.group.rollouts] == [False, False]


async def test_the_tool_budget_goes_on_where_it_was(written):
    """After both executions the third block is text, and the engine is not told to stop at fences."""
    _, file = written
    data = file.read_bytes()
    ends = boundaries(data)
    both_ran = next(end for end in ends if data[:end].count(b'"kind":"turn"') == 4)
    file.write_bytes(data[:both_ran])
    journal, _ = resumed(file.parent)
    again = await run(journal)
    journal.close()
    assert again.sandbox.executed == []
    assert again.policy.asked and not any(stops for _, _, stops in again.policy.asked)


def test_a_reply_without_an_execution_comes_back_as_a_turn_without_a_result():
    rollout = Rollout(rollout_id="0.0", prompt=PROMPT, prompt_ids=[81])
    append_sampled(rollout, [1, 2], [-0.5, -1.0], [VersionSpan(version=3, start=0, end=2)])
    append_reply(rollout, [7, 8, 9])
    rollout.turns.append(Turn(start=0, tool_start=2, end=5))
    restored = records.read_group(records.snapshot(0, "run", {0: rollout}), 0, "run").rollouts[0]
    assert restored.turns == rollout.turns
    assert (restored.token_ids, restored.loss_mask) == ([1, 2, 7, 8, 9], [True, True, False, False, False])
