"""``benchmarks/_exactness.py`` accepts a rollout that was interrupted rightly, and notices every way of doing it
wrongly.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ztrl.types import NOT_SAMPLED, ExecutionResult, ExecutionStatus, Prompt, Rollout, Turn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _exactness import Findings, check_record
from _interrupted_rollouts import Call, Publish, Record

FIRST, REST, PAST_BLOCK, REPLY, END = "so:```pyth", "on\n1\n```", "\n", "\n```output\n1\n```\n", "done"


class Characters:
    """One token per character."""

    def encode(self, text, *, add_special_tokens=False, split_special_tokens=False):
        return [ord(character) for character in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def call(before, text, version, seconds):
    return Call(
        rollout_id="r",
        input_ids=[ord(c) for c in "Q" + before],
        token_ids=[ord(c) for c in text],
        logprobs=[-0.001 * (i + 1) for i in range(len(text))],
        spans=[(version, 0, len(text))],
        finish="abort",
        retractions=0,
        sent_seconds=seconds,
        returned_seconds=seconds + 1,
    )


def interrupted_once():
    """A block that an interrupt cuts in two, one token past it, the reply, and the end."""
    calls = [
        call("", FIRST, 1, 10.0),
        call(FIRST, REST + PAST_BLOCK, 2, 12.0),
        call(FIRST + REST + REPLY, END, 2, 15.0),
    ]
    rollout = Rollout(
        rollout_id="r",
        prompt=Prompt(prompt_id="p", problem="", text="Q", ground_truth="", data_source="test"),
        prompt_ids=[ord("Q")],
    )
    for piece, returned in ((FIRST, calls[0]), (REST, calls[1]), (REPLY, None), (END, calls[2])):
        size = len(piece)
        rollout.token_ids += [ord(c) for c in piece]
        rollout.logprobs += returned.logprobs[:size] if returned else [0.0] * size
        rollout.loss_mask += [returned is not None] * size
        rollout.weight_versions += [returned.spans[0][0] if returned else NOT_SAMPLED] * size
    block, reply = len(FIRST + REST), len(FIRST + REST + REPLY)
    result = ExecutionResult(
        status=ExecutionStatus.OK, stdout="1\n", stderr="", run_seconds=0.0, queue_seconds=0.0
    )
    rollout.turns = [
        Turn(start=0, tool_start=block, end=reply, code="1\n", result=result),
        Turn(start=reply, tool_start=reply + len(END), end=reply + len(END)),
    ]
    return rollout, calls


def publishes():
    """Version 1 from second 0 on, version 2 from 11 on."""
    at = {1: 0.0, 2: 11.0}
    return [
        Publish(version=v, began_seconds=s, ended_seconds=s + 0.5, pause_seconds=0.5, hit={}, meanwhile={})
        for v, s in at.items()
    ]


def findings_of(rollout, calls):
    return check_record(Record(calls=calls, rollouts=[rollout], publishes=publishes()), Characters())


def test_a_rollout_that_was_interrupted_rightly_is_exact():
    findings = findings_of(*interrupted_once())
    size = len(FIRST + REST + END)
    assert findings == Findings(returned=size + 1, cut=1, kept=size, spans=[2])
    assert findings.exact


def drop_the_last_token_before_the_interrupt(rollout, calls):
    position = len(FIRST) - 1
    for tokens in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        del tokens[position]
    for later in calls[1:]:
        del later.input_ids[1 + position]
    rollout.turns = [
        replace(t, start=max(0, t.start - 1), tool_start=t.tool_start - 1, end=t.end - 1)
        for t in rollout.turns
    ]


def keep_a_token_twice(rollout, calls):
    position = len(FIRST) - 1
    for tokens in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        tokens.insert(position, tokens[position])
    for later in calls[1:]:
        later.input_ids.insert(1 + position, later.input_ids[1 + position])
    rollout.turns = [
        replace(t, start=t.start and t.start + 1, tool_start=t.tool_start + 1, end=t.end + 1)
        for t in rollout.turns
    ]


def forget_a_call(rollout, calls):
    calls.append(replace(call("", "thrown away", 2, 16.0), rollout_id="other"))


def cut_before_the_block_ends(rollout, calls):
    position = len(FIRST + REST) - 1
    for tokens in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        del tokens[position]
    del calls[2].input_ids[1 + position]
    first, second = rollout.turns
    rollout.turns = [
        replace(first, tool_start=first.tool_start - 1, end=first.end - 1),
        replace(second, start=second.start - 1, tool_start=second.tool_start - 1, end=second.end - 1),
    ]


def change_a_logprob(rollout, calls):
    rollout.logprobs[3] += 1e-6


def change_a_token(rollout, calls):
    rollout.token_ids[-1] += 1


def train_on_the_reply(rollout, calls):
    rollout.loss_mask[len(FIRST + REST)] = True


def leave_a_token_out_of_the_loss(rollout, calls):
    rollout.loss_mask[0] = False


def stamp_the_version_of_the_other_side(rollout, calls):
    rollout.weight_versions[len(FIRST) - 1] = 2


def let_the_server_claim_a_version_before_its_publish(rollout, calls):
    size = len(FIRST)
    calls[0] = replace(calls[0], spans=[(2, 0, size)], returned_seconds=10.5)
    rollout.weight_versions[:size] = [2] * size


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (drop_the_last_token_before_the_interrupt, "duplicated"),
        (keep_a_token_twice, "duplicated"),
        (forget_a_call, "lost"),
        (cut_before_the_block_ends, "lost"),
        (change_a_logprob, "wrong_tokens"),
        (change_a_token, "wrong_tokens"),
        (train_on_the_reply, "wrong_masks"),
        (leave_a_token_out_of_the_loss, "wrong_masks"),
        (stamp_the_version_of_the_other_side, "wrong_versions"),
        (let_the_server_claim_a_version_before_its_publish, "wrong_versions"),
    ],
)
def test_damage_is_noticed(damage, finding):
    rollout, calls = interrupted_once()
    damage(rollout, calls)
    findings = findings_of(rollout, calls)
    assert getattr(findings, finding) > 0
    assert not findings.exact
