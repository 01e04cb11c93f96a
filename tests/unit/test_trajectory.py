"""Token, mask, log-prob and version alignment of one rollout, against a scripted engine.

The tokenizer maps one token to one byte or to a few, so that stop strings complete in the middle of a token
and characters span tokens. The real engine is used in tests/integration.
"""

from pathlib import Path

import pytest

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.base import Reaction
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.envs.python_tool import TOO_LONG_MESSAGE, PythonTool
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.trajectory import Sampling, run_rollout
from megatron_ztrl.types import (
    NOT_SAMPLED,
    Completion,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Prompt,
    StopReason,
    VersionSpan,
)

QUICKSTART_BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
PROMPT = Prompt(prompt_id="p", problem="2+2", text="Q:", ground_truth="4", data_source="test")
MERGES = {256: b"```\n", 257: b"```python", 258: b"thon\nprint"}


class ByteTokenizer:
    """Bytes 0-255, and a few longer tokens that only a policy emits."""

    def encode(self, text, *, add_special_tokens=True, split_special_tokens=False):
        return list(text.encode())

    def decode(self, token_ids):
        return b"".join(MERGES.get(i) or bytes([i]) for i in token_ids).decode(errors="replace")


class ScriptedEngine:
    """Plays back completions; checks that each call's input is all that came before."""

    def __init__(self, completions):
        self.completions = list(completions)
        self.calls = []

    async def generate(self, input_ids, *, max_new_tokens, stop_patterns, temperature, top_p, request_id):
        self.calls.append((list(input_ids), max_new_tokens, tuple(stop_patterns)))
        return self.completions.pop(0)


EOS, HINT = 0, "```[^p]"


def completion(token_ids, *, finish=FinishReason.STOP, matched=HINT, version=0, spans=None):
    if isinstance(token_ids, str):
        token_ids = list(token_ids.encode())
    return Completion(
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids),
        finish_reason=finish,
        matched_stop=matched,
        version_spans=spans or [VersionSpan(version=version, start=0, end=len(token_ids))],
        cached_tokens=0,
    )


def last(token_ids, **kwargs):
    return completion(token_ids, matched=EOS, **kwargs)


def executed(output, status=ExecutionStatus.OK):
    return ExecutionResult(status=status, stdout=output, stderr="", run_seconds=0.0, queue_seconds=0.0)


async def rollout_of(
    completions,
    *,
    output="é4",
    status=ExecutionStatus.OK,
    max_response_tokens=200,
    n=2,
    tokenizer=None,
    template_stop=(),
):
    async def execute(code):
        return executed(output, status)

    engine = ScriptedEngine(completions)
    rollout = await run_rollout(
        "0.0",
        PROMPT,
        engine=engine,
        tokenizer=tokenizer or ByteTokenizer(),
        environment=PythonTool(
            execute, len, env_iterations=n, template_stop=template_stop, config=ToolConfig()
        ),
        sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=max_response_tokens),
    )
    lengths = {
        len(per_token)
        for per_token in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions)
    }
    assert len(lengths) == 1
    return rollout, engine


async def test_model_tokens_are_trained_and_reply_tokens_are_not():
    rollout, engine = await rollout_of([completion([257, *b"\nprint(2+2)\n```\n"]), last("4.", version=3)])
    reply = list("\n```output\né4\n```\n".encode())
    call = [257, *b"\nprint(2+2)\n```"]
    assert rollout.token_ids == call + reply + list(b"4.")
    assert rollout.loss_mask == [True] * len(call) + [False] * len(reply) + [True] * 2
    assert rollout.weight_versions == [0] * len(call) + [NOT_SAMPLED] * len(reply) + [3] * 2
    assert rollout.logprobs == [-0.5] * len(call) + [0.0] * len(reply) + [-0.5] * 2
    assert rollout.stop_reason is StopReason.STOP
    assert rollout.executed_calls == 1
    first, second = rollout.turns
    assert (first.start, first.tool_start, first.end) == (0, len(call), len(call) + len(reply))
    assert (second.start, second.tool_start, second.end) == (first.end, first.end + 2, first.end + 2)
    # Token in, token out: each call was given exactly the tokens so far.
    assert [ids for ids, _, _ in engine.calls] == [list(b"Q:"), [*b"Q:", *call, *reply]]


async def test_nothing_that_code_prints_is_a_control_token_a_stop_or_another_call():
    policy = PolicyTokenizer(QUICKSTART_BASE)
    (eos,) = policy.encode("<|endoftext|>")
    printed = "<|endoftext|> é </answer>\n```python\n1/0\n```"
    call = policy.encode("```python\n1\n```")
    rollout, engine = await rollout_of(
        [completion(call), completion([*policy.encode("4"), eos], matched=eos)],
        output=printed,
        tokenizer=policy,
        template_stop=("</answer>",),
    )
    first, second = rollout.turns
    reply = rollout.token_ids[first.tool_start : first.end]
    assert eos not in reply
    assert policy.decode(reply) == f"\n```output\n{printed}\n```\n"
    assert rollout.executed_calls == 1
    assert len(engine.calls) == 2
    assert rollout.token_ids[second.start :] == [*policy.encode("4"), eos]


async def test_the_length_of_a_reply_is_that_of_its_text_not_of_the_control_tokens_it_names():
    async def print_many(code):
        return executed("<|endoftext|>" * 10)

    async def score(text, ground_truth):
        return 0.0

    policy = PolicyTokenizer(QUICKSTART_BASE)
    runner = GroupRunner(
        fleet=EngineFleet(
            [ScriptedEngine([completion(policy.encode("```python\n1\n```")), last([])])],
            max_concurrent_per_engine=1,
        ),
        tokenizer=policy,
        execute=print_many,
        score=score,
        template=get_template("plain"),
        tool=ToolConfig(max_output_tokens=20),
        sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=200),
    )
    group = await runner.run(0, PROMPT, group_size=1, env_iterations=1)
    assert TOO_LONG_MESSAGE in group.rollouts[0].text


async def test_tokens_after_the_one_that_closes_the_block_are_dropped_exactly():
    rollout, _ = await rollout_of(
        [completion([*b"```py", 258, *b"(1)\n```", *b"\nignored"]), last("x")], output="1"
    )
    kept = [*b"```py", 258, *b"(1)\n```"]  # 258 ends the opening fence and begins the code: it stays whole
    assert rollout.token_ids[: rollout.turns[0].tool_start] == kept
    assert rollout.turns[0].code == "print(1)\n"


async def test_a_closing_fence_merged_with_the_next_line_is_kept_as_sampled():
    rollout, _ = await rollout_of([completion([257, *b"\n1\n", 256]), last("x")], output="1")
    assert rollout.text == "```python\n1\n```\n```output\n1\n```\nx"


async def test_an_end_of_sequence_right_after_a_block_does_not_keep_it_from_running():
    rollout, _ = await rollout_of([last([257, *b"\n1\n```", EOS]), last("x")], output="1")
    assert rollout.executed_calls == 1
    assert EOS not in rollout.token_ids


async def test_a_hint_of_the_engine_that_means_nothing_lets_the_policy_go_on():
    rollout, engine = await rollout_of([completion("```\n"), last("text\n```")])
    assert rollout.text == "```\ntext\n```"
    assert rollout.executed_calls == 0
    assert engine.calls[1][0] == list(b"Q:```\n")


async def test_an_interrupted_call_resumes_at_its_last_token_under_the_new_version():
    spans = [VersionSpan(version=1, start=0, end=2), VersionSpan(version=2, start=2, end=3)]
    rollout, engine = await rollout_of(
        [completion("abc", finish=FinishReason.ABORT, spans=spans), last("d", version=4)]
    )
    assert rollout.text == "abcd"
    assert rollout.weight_versions == [1, 1, 2, 4]
    assert engine.calls[1][0] == list(b"Q:abc")
    assert engine.calls[1][1] == engine.calls[0][1] - 3
    assert rollout.oldest_version == 1


async def test_fences_split_by_interruptions_are_still_seen():
    pieces = ["``", "`python\n", "1\n``", "`"]
    rollout, _ = await rollout_of(
        [*(completion(piece, finish=FinishReason.ABORT) for piece in pieces), last("x")], output="1"
    )
    assert rollout.executed_calls == 1
    assert rollout.text == "```python\n1\n```\n```output\n1\n```\nx"


async def test_the_budget_counts_model_and_tool_tokens():
    rollout, engine = await rollout_of(
        [completion([257, *b"\n1\n```"]), completion("y" * 4, finish=FinishReason.LENGTH)],
        output="1",
        max_response_tokens=1 + 6 + len("\n```output\n1\n```\n") + 4,
    )
    assert [budget for _, budget, _ in engine.calls] == [28, 4]
    assert rollout.stop_reason is StopReason.LENGTH
    assert len(rollout.token_ids) == 28


async def test_a_reply_that_does_not_fit_ends_the_rollout_without_it():
    rollout, _ = await rollout_of([completion([257, *b"\n1\n```"])], output="1" * 50, max_response_tokens=20)
    assert rollout.stop_reason is StopReason.LENGTH
    assert all(rollout.loss_mask)
    assert rollout.executed_calls == 1


async def test_an_infrastructure_failure_marks_the_rollout_untrainable():
    rollout, _ = await rollout_of([completion([257, *b"\n1\n```"])], status=ExecutionStatus.SANDBOX_ERROR)
    assert rollout.stop_reason is StopReason.INFRASTRUCTURE
    assert not rollout.trainable


async def test_a_gap_in_the_version_spans_is_an_error():
    gap = [VersionSpan(version=0, start=0, end=1)]
    with pytest.raises(AssertionError, match="cover"):
        await rollout_of([completion("ab", spans=gap)])


class Search:
    """A tool that executes nothing."""

    def stop_patterns(self):
        return ("</search>",)

    def find_stop(self, turn_text):
        end = turn_text.find("</search>")
        return None if end < 0 else end + len("</search>")

    async def react(self, turn_text, *, ended):
        if ended:
            return Reaction(finished=True)
        query = turn_text.rpartition("<search>")[2].partition("</search>")[0]
        return Reaction(reply=f"<result>{query}!</result>")


async def test_a_tool_that_replies_without_an_execution_gets_a_masked_reply_and_a_turn():
    rollout = await run_rollout(
        "0.0",
        Prompt(prompt_id="p", problem="", text="Q:", ground_truth="4", data_source="test"),
        engine=ScriptedEngine([completion("<search>é</search>..", matched="</search>"), last([52, EOS])]),
        tokenizer=ByteTokenizer(),
        environment=Search(),
        sampling=Sampling(temperature=1.0, top_p=1.0, max_response_tokens=200),
    )
    assert rollout.text == "<search>é</search><result>é!</result>4\0"
    assert rollout.loss_mask == [True] * 19 + [False] * 20 + [True] * 2
    assert [(turn.tool_start, turn.end, turn.result) for turn in rollout.turns] == [
        (19, 39, None),
        (41, 41, None),
    ]
    assert rollout.executed_calls == 0
    assert rollout.stop_reason is StopReason.STOP


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 4, 7, 20, 50])
async def test_the_cut_is_exact_however_many_tokens_follow_and_cheap_where_it_is_near_the_end(spare):
    decoded = []

    class CountingTokenizer(ByteTokenizer):
        def decode(self, token_ids):
            decoded.append(len(token_ids))
            return super().decode(token_ids)

    block = [257, *b"\nprint(1)\n```"]
    rollout, _ = await rollout_of(
        [completion([*block, *b"x" * spare]), last("y")], output="1", tokenizer=CountingTokenizer()
    )
    assert rollout.token_ids[: rollout.turns[0].tool_start] == block
    if (
        spare <= 1
    ):  # of the turn's tokens: all of them, then one less each time, down to the first that is too short
        whole = len(block) + spare
        assert decoded[1 : spare + 3] == list(range(whole, len(block) - 2, -1))
