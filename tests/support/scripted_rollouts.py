"""A scripted group of rollouts with its journal: what is sampled follows from the position alone.

Token, log-prob and version are a script's, and the engine checks that it is always asked to go on exactly where the
script stands. So a rollout that is cut and gone on with has one right result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import struct

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.journal import Journal
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.types import (
    Completion,
    ExecutionResult,
    ExecutionStatus,
    FinishReason,
    Prompt,
    RolloutGroup,
    VersionSpan,
)

EOS = 0
PROMPT = Prompt(
    prompt_id="p:1", problem="é?", text="Q:", ground_truth="4", data_source="p", metadata={"a": [1]}
)
ALL_VERSIONS = 10**6
TOKENS_PER_VERSION = 7


class ByteTokenizer:
    def encode(self, text, *, add_special_tokens=True, split_special_tokens=False):
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


def files(directory):
    """The groups that have a file."""
    return sorted(int(path.name) for path in directory.iterdir())


async def write_group(directory):
    """An uninterrupted group and its file."""
    journal = journal_in(directory)
    outcome = await run(journal)
    journal.close()
    return outcome, directory / "00000007"
