"""What the journal gives back after a crash: the rollouts as they were, and the course they would have taken.

The policy is a script: token, log-prob and version follow from the position alone, and the engine checks that it
is always asked to go on exactly where the script stands.
"""

import asyncio
import dataclasses
import functools
import itertools
import struct

import pytest

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
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout import journal_records as records
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.journal import Journal, identity
from megatron_ztrl.rollout.trajectory import Sampling, append_reply, append_sampled
from megatron_ztrl.types import (
    NOT_SAMPLED,
    Completion,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Prompt,
    Rollout,
    RolloutGroup,
    StopReason,
    Turn,
    VersionSpan,
)

EOS = 0
PROMPT = Prompt(
    prompt_id="p:1", problem="é?", text="Q:", ground_truth="4", data_source="p", metadata={"a": [1]}
)
ALL_VERSIONS = 10**6
TOKENS_PER_VERSION = 7


class ByteTokenizer:
    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")


def script(index):
    """What rollout ``index`` writes: two blocks that run, a third that is past the budget, and the end."""
    blocks = [f"é{index} ```python\nprint({index})\n```", "so\n```python\n1/0\n```", "```python\n3\n```"]
    replies = [f"\n```output\n{index}\n```\n", "\n```output\n1\nboom\n```\n"]
    tokens, mask = [], []
    for written, reply in itertools.zip_longest(blocks, replies, fillvalue=""):
        tokens += [*written.encode(), *reply.encode()]
        mask += [True] * len(written.encode()) + [False] * len(reply.encode())
    return [*tokens, *b" 4.", EOS], [*mask, *[True] * 4]


class ScriptedPolicy:
    """Continues the script that the tokens so far belong to; every third call is interrupted."""

    def __init__(self, version_of=lambda position: position // TOKENS_PER_VERSION):
        self.version_of = version_of
        self.calls = 0
        self.asked = []

    async def generate(self, input_ids, *, max_new_tokens, stop_patterns, temperature, top_p, request_id):
        await asyncio.sleep(0)
        index = int(request_id.split("-")[0].split(".")[1])
        tokens, mask = script(index)
        position = len(input_ids) - len(PROMPT.text)
        assert input_ids == [*PROMPT.text.encode(), *tokens[:position]], "gone on with exactly where it stood"
        assert mask[position], "a model token is due here"
        self.asked.append((position, max_new_tokens, bool(stop_patterns)))
        end = next((p for p in range(position, len(tokens)) if not mask[p]), len(tokens))
        self.calls += 1
        written = tokens[position:end]
        finish, matched = (FinishReason.STOP, EOS) if end == len(tokens) else (FinishReason.STOP, "```[^p]")
        if end < len(tokens):
            written = [*written, ord("\n")]  # past the fence: to be dropped
        limit = 5 if self.calls % 3 == 0 else max_new_tokens
        if limit < len(written):
            written = written[:limit]
            finish = FinishReason.ABORT if limit == 5 else FinishReason.LENGTH
            matched = None
        versions = [self.version_of(position + offset) for offset in range(len(written))]
        spans, start = [], 0
        for version, run in itertools.groupby(versions):
            length = len(list(run))
            spans.append(VersionSpan(version=version, start=start, end=start + length))
            start += length
        return Completion(
            token_ids=written,
            logprobs=[-(position + offset) / 3 for offset in range(len(written))],
            finish_reason=finish,
            matched_stop=matched,
            version_spans=spans,
            cached_tokens=0,
        )


class Sandbox:
    def __init__(self):
        self.executed = []

    async def __call__(self, code):
        await asyncio.sleep(0)
        self.executed.append(code)
        failed = "1/0" in code
        return ExecutionResult(
            status=ExecutionStatus.ERROR if failed else ExecutionStatus.OK,
            stdout="1\n" if failed else code.removeprefix("print(").removesuffix(")\n") + "\n",
            stderr="boom" if failed else "",
            run_seconds=0.25,
            queue_seconds=0.0,
        )


async def score(text, ground_truth):
    return float(ground_truth in text)


@dataclasses.dataclass
class Outcome:
    group: RolloutGroup
    policy: ScriptedPolicy
    sandbox: Sandbox


async def run(journal, *, group_id=7, size=2, policy=None, max_call_tokens=9, sandbox=None):
    policy, sandbox = policy or ScriptedPolicy(), sandbox or Sandbox()
    runner = GroupRunner(
        fleet=EngineFleet([policy], max_concurrent_per_engine=8),
        tokenizer=ByteTokenizer(),
        execute=sandbox,
        score=score,
        template=get_template("plain"),
        tool=ToolConfig(max_output_tokens=40),
        sampling=Sampling(
            temperature=1.0, top_p=1.0, max_response_tokens=400, max_call_tokens=max_call_tokens
        ),
        journal=journal,
    )
    group = await runner.run(group_id, PROMPT, group_size=size, env_iterations=2)
    return Outcome(group, policy, sandbox)


def journal_in(directory, identity="settings"):
    return Journal(directory, identity=identity)


def resumed(directory, version=ALL_VERSIONS, **kwargs):
    journal = journal_in(directory)
    return journal, journal.restore(version, **kwargs)


def boundaries(data):
    """Where records end."""
    offset, found = 0, [0]
    while offset < len(data):
        offset += 8 + struct.unpack_from("<I", data, offset)[0]
        found.append(offset)
    return found


def content(group):
    """All that training and logs read; not the seconds."""
    return [
        {
            field.name: getattr(rollout, field.name)
            for field in dataclasses.fields(rollout)
            if not field.name.endswith("seconds")
        }
        for rollout in group.rollouts
    ]


@pytest.fixture
async def written(tmp_path):
    """An uninterrupted group and its file."""
    journal = journal_in(tmp_path / "journal")
    outcome = await run(journal)
    journal.close()
    return outcome, tmp_path / "journal" / "00000007"


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


def files(directory):
    return sorted(int(path.name) for path in directory.iterdir())


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


async def test_a_run_that_begins_removes_what_another_left(written, tmp_path):
    _, file = written
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


async def test_the_tool_budget_goes_on_where_it_was(written, tmp_path):
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
    other_tool = dataclasses.replace(config, tool=ToolConfig(max_output_tokens=9))
    other_reward = dataclasses.replace(config, reward=RewardConfig(require_answer_tags=False))
    others = [
        identity(other_tool, sampling, "fingerprint"),
        identity(other_reward, sampling, "fingerprint"),
        identity(config, dataclasses.replace(sampling, temperature=0.9), "fingerprint"),
        identity(config, sampling, "other prompts"),
    ]
    assert len({first, *others}) == 5


def test_a_reply_without_an_execution_comes_back_as_a_turn_without_a_result():
    rollout = Rollout(rollout_id="0.0", prompt=PROMPT, prompt_ids=[81])
    append_sampled(rollout, [1, 2], [-0.5, -1.0], [VersionSpan(version=3, start=0, end=2)])
    append_reply(rollout, [7, 8, 9])
    rollout.turns.append(Turn(start=0, tool_start=2, end=5))
    restored = records.read_group(records.snapshot(0, "run", {0: rollout}), 0, "run").rollouts[0]
    assert restored.turns == rollout.turns
    assert (restored.token_ids, restored.loss_mask) == ([1, 2, 7, 8, 9], [True, True, False, False, False])
