"""One rollout: token in, token out. Text is decoded to decide, never re-tokenised.

A rollout is a sequence of token-exact segments. Model tokens carry their log-prob, loss mask True and the
weight version that sampled them; the tokens of a tool reply carry mask False. All four lists grow together,
in one place each (`append_sampled`, `append_reply`).

A `Rollout` is all there is to know of one: cut at any of its tokens, or between a block and the reply, it can be
gone on with (``partial``), and lacks nothing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ztrl.envs.base import Environment
from megatron_ztrl.types import (
    NOT_SAMPLED,
    Completion,
    FinishReason,
    Prompt,
    Rollout,
    StopReason,
    Turn,
    VersionSpan,
)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...
    ) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Engine(Protocol):
    """The part of an engine client that rollouts use."""

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_patterns: Sequence[str],
        temperature: float,
        top_p: float,
        request_id: str,
    ) -> Completion: ...


class Recorder(Protocol):
    """Is told what a rollout has gained; `journal.RolloutRecorder` writes it down."""

    def sampled(self, rollout: Rollout, start: int) -> None:
        """One engine call has returned: the tokens from ``start`` on are new, and ``ended`` may be."""
        ...

    def turn_done(self, rollout: Rollout) -> None:
        """The last turn is new, with its result, its reply, and perhaps the stop reason."""
        ...


class NoRecorder:
    """Writes nothing down."""

    def sampled(self, rollout: Rollout, start: int) -> None:
        pass

    def turn_done(self, rollout: Rollout) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a rollout is sampled."""

    temperature: float
    top_p: float
    max_response_tokens: int
    """Model and tool tokens together."""
    max_call_tokens: int | None = None
    """The most tokens of one engine call; None leaves it to ``max_response_tokens``."""


async def run_rollout(
    rollout_id: str,
    prompt: Prompt,
    *,
    engine: Engine,
    tokenizer: Tokenizer,
    environment: Environment,
    sampling: Sampling,
    partial: Rollout | None = None,
    recorder: Recorder | None = None,
    deadline_at: float | None = None,
) -> Rollout:
    """Generates until the environment, the policy, the budget or the deadline ends the rollout.

    Args:
        rollout_id: Stable.
        prompt: Of the rollout.
        engine: Where it runs.
        tokenizer: Of the policy.
        environment: New; with a ``partial``, one that has as many executions left as that has.
        sampling: How to sample.
        partial: What an earlier run has of this rollout; it is gone on with, in place.
        recorder: Is told of every change.
        deadline_at: Time of the event loop; a call that runs then is given up, with what it has sampled.
    """
    rollout = partial or Rollout(
        rollout_id=rollout_id,
        prompt=prompt,
        prompt_ids=tokenizer.encode(prompt.text, add_special_tokens=False),
    )
    run = _Run(rollout, engine, tokenizer, environment, sampling, recorder or NoRecorder())
    try:
        async with asyncio.timeout_at(deadline_at) as timeout:
            while rollout.stop_reason is None:
                await run.generate()
                if rollout.stop_reason is None:
                    await run.react()
    except TimeoutError:
        if not timeout.expired():  # another time-out
            raise
        rollout.stop_reason = StopReason.DEADLINE
    complete(rollout, tokenizer)
    return rollout


def encode_reply(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of what an environment says: data, so code that prints ``<|endoftext|>`` puts no such token there."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def complete(rollout: Rollout, tokenizer: Tokenizer) -> None:
    """Gives a rollout that has stopped its last turn and its text."""
    start, end = _turn_start(rollout), len(rollout.token_ids)
    if end > start:
        rollout.turns.append(Turn(start=start, tool_start=end, end=end))
    rollout.text = tokenizer.decode(rollout.token_ids)


def _turn_start(rollout: Rollout) -> int:
    return rollout.turns[-1].end if rollout.turns else 0


@dataclass
class _Run:
    """A rollout and what it runs on."""

    rollout: Rollout
    engine: Engine
    tokenizer: Tokenizer
    environment: Environment
    sampling: Sampling
    recorder: Recorder
    turn_text: str = ""
    """Of the tokens since the last reply, cut at the stop."""

    async def generate(self) -> None:
        """Generates up to the next stop; a call that was interrupted is resumed at its last token."""
        rollout = self.rollout
        stopped = self._cut_at_stop()  # a partial rollout may stand at one
        while not (stopped or rollout.ended):
            budget = self.sampling.max_response_tokens - len(rollout.token_ids)
            if budget <= 0:
                rollout.stop_reason = StopReason.LENGTH
                return
            asked = min(budget, self.sampling.max_call_tokens or budget)
            start = len(rollout.token_ids)
            started = time.monotonic()
            completion = await self.engine.generate(
                [*rollout.prompt_ids, *rollout.token_ids],
                max_new_tokens=asked,
                stop_patterns=self.environment.stop_patterns(),
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                request_id=f"{rollout.rollout_id}-{uuid.uuid4().hex}",
            )
            rollout.generate_seconds += time.monotonic() - started
            append_sampled(rollout, completion.token_ids, completion.logprobs, completion.version_spans)
            # The engine looks at one call only; a stop may have begun in the call before.
            stopped = self._cut_at_stop()
            if not stopped:
                # A pattern that matched is a string.
                rollout.ended = completion.finish_reason is FinishReason.STOP and isinstance(
                    completion.matched_stop, int
                )
                if completion.finish_reason is FinishReason.LENGTH and len(completion.token_ids) < asked:
                    rollout.stop_reason = StopReason.LENGTH  # the engine has no room for more
            self.recorder.sampled(rollout, start)
            if rollout.stop_reason is not None:
                return

    async def react(self) -> None:
        """Lets the environment answer the stop."""
        rollout = self.rollout
        turn_start, reply_start = _turn_start(rollout), len(rollout.token_ids)
        started = time.monotonic()
        reaction = await self.environment.react(self.turn_text, ended=rollout.ended)
        answered = reaction.result is not None or reaction.reply is not None
        assert answered or reaction.finished, (
            "an environment that is asked at a stop answers, or ends the rollout"
        )
        if answered:
            rollout.tool_seconds += time.monotonic() - started
            rollout.ended = False
            if reaction.reply is not None:
                self._append_reply(encode_reply(reaction.reply, self.tokenizer))
            rollout.turns.append(
                Turn(
                    start=turn_start,
                    tool_start=reply_start,
                    end=len(rollout.token_ids),
                    code=reaction.code,
                    result=reaction.result,
                )
            )
        if reaction.result is not None and reaction.result.status.is_infrastructure:
            rollout.stop_reason = StopReason.INFRASTRUCTURE
        if reaction.finished and rollout.stop_reason is None:
            rollout.stop_reason = StopReason.STOP
        if answered:
            self.recorder.turn_done(rollout)

    def _append_reply(self, reply_ids: list[int]) -> None:
        """Appends a tool reply; one that leaves no room to go on is left out and ends the rollout."""
        rollout = self.rollout
        if len(rollout.token_ids) + len(reply_ids) >= self.sampling.max_response_tokens:
            rollout.stop_reason = StopReason.LENGTH
        else:
            append_reply(rollout, reply_ids)

    def _cut_at_stop(self) -> bool:
        """Drops the tokens of the turn after the one that completes a stop, exactly. Returns whether there is one."""
        turn_start = _turn_start(self.rollout)
        turn_ids = self.rollout.token_ids[turn_start:]
        self.turn_text = self.tokenizer.decode(turn_ids)
        keep_characters = self.environment.find_stop(self.turn_text)
        if keep_characters is None:
            return False
        keep_text = self.turn_text[:keep_characters]
        # The fewest tokens that spell it: more than `low`, at most `high`. The engine stops at most a token after most
        # stops, so the search begins at the end, in steps that grow (1, 1, 2, 3, 5): each decodes the turn again.
        low, high, step, next_step = 0, len(turn_ids), 1, 1
        while high - low > 1:
            middle = max((low + high) // 2, high - step)
            text = self.tokenizer.decode(turn_ids[:middle])
            if text.startswith(keep_text):
                self.turn_text, high = text, middle
                step, next_step = next_step, step + next_step
            else:
                low = middle
        cut_tokens(self.rollout, turn_start + high)
        return True


def append_sampled(
    rollout: Rollout, token_ids: Sequence[int], logprobs: Sequence[float], spans: Sequence[VersionSpan]
) -> None:
    """Appends what a policy sampled; the spans cover all of it."""
    count = len(token_ids)
    versions = [NOT_SAMPLED] * count
    for span in spans:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    assert len(versions) == len(logprobs) == count and NOT_SAMPLED not in versions, (
        "a completion has a log-prob for each of its tokens, and its version spans cover them"
    )
    rollout.token_ids.extend(token_ids)
    rollout.logprobs.extend(logprobs)
    rollout.loss_mask.extend([True] * count)
    rollout.weight_versions.extend(versions)


def append_reply(rollout: Rollout, reply_ids: Sequence[int]) -> None:
    """Appends the tokens of a tool reply."""
    rollout.token_ids.extend(reply_ids)
    rollout.logprobs.extend([0.0] * len(reply_ids))
    rollout.loss_mask.extend([False] * len(reply_ids))
    rollout.weight_versions.extend([NOT_SAMPLED] * len(reply_ids))


def cut_tokens(rollout: Rollout, length: int) -> None:
    """Drops the tokens from position ``length`` on."""
    for per_token in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        del per_token[length:]
