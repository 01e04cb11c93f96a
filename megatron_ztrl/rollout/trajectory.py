"""One rollout: token in, token out. Text is decoded to decide, never re-tokenised.

A rollout is a sequence of token-exact segments. Model tokens carry their log-prob, loss mask True and the
weight version that sampled them; the tokens of a tool reply carry mask False. All four lists grow together,
in one place each (`_append_model_tokens`, `_append_reply`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ztrl.envs.base import Environment
from megatron_ztrl.types import NOT_SAMPLED, Completion, FinishReason, Prompt, Rollout, StopReason, Turn


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rollouts use."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a rollout is sampled."""

    temperature: float
    top_p: float
    max_response_tokens: int
    """Model and tool tokens together."""


async def run_rollout(
    rollout_id: str,
    prompt: Prompt,
    *,
    engine: Engine,
    tokenizer: Tokenizer,
    environment: Environment,
    sampling: Sampling,
) -> Rollout:
    """Generates until the environment, the policy or the budget ends the rollout."""
    rollout = Rollout(
        rollout_id=rollout_id,
        prompt=prompt,
        prompt_ids=tokenizer.encode(prompt.text, add_special_tokens=False),
    )
    turn_start = 0
    while rollout.stop_reason is None:
        ended = await _generate(rollout, turn_start, engine, tokenizer, environment, sampling)
        if rollout.stop_reason is not None:
            break
        reply_start = len(rollout.token_ids)
        started = time.monotonic()
        reaction = await environment.react(tokenizer.decode(rollout.token_ids[turn_start:]), ended=ended)
        if reaction.result is not None:
            rollout.tool_seconds += time.monotonic() - started
            if reaction.reply is not None:
                _append_reply(rollout, tokenizer.encode(reaction.reply, add_special_tokens=False), sampling)
            rollout.turns.append(
                Turn(
                    start=turn_start,
                    tool_start=reply_start,
                    end=len(rollout.token_ids),
                    code=reaction.code,
                    result=reaction.result,
                )
            )
            turn_start = len(rollout.token_ids)
            if reaction.result.status.is_infrastructure:
                rollout.stop_reason = StopReason.INFRASTRUCTURE
        if reaction.finished and rollout.stop_reason is None:
            rollout.stop_reason = StopReason.STOP
    end = len(rollout.token_ids)
    if end > turn_start:
        rollout.turns.append(Turn(start=turn_start, tool_start=end, end=end))
    rollout.text = tokenizer.decode(rollout.token_ids)
    return rollout


async def _generate(
    rollout: Rollout,
    turn_start: int,
    engine: Engine,
    tokenizer: Tokenizer,
    environment: Environment,
    sampling: Sampling,
) -> bool:
    """Generates up to the next stop; a call that was interrupted is resumed at its last token.

    Returns:
        Whether the policy ended its response by itself. Meaningless when ``rollout.stop_reason`` was set.
    """
    while True:
        budget = sampling.max_response_tokens - len(rollout.token_ids)
        if budget <= 0:
            rollout.stop_reason = StopReason.LENGTH
            return False
        started = time.monotonic()
        completion = await engine.generate(
            [*rollout.prompt_ids, *rollout.token_ids],
            max_new_tokens=budget,
            stop_patterns=environment.stop_patterns(),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            request_id=f"{rollout.rollout_id}-{uuid.uuid4().hex}",
        )
        rollout.generate_seconds += time.monotonic() - started
        _append_model_tokens(rollout, completion)
        # The engine looks at one call only; a stop may have begun in the call before an interruption.
        turn_text = tokenizer.decode(rollout.token_ids[turn_start:])
        keep_characters = environment.find_stop(turn_text)
        if keep_characters is not None:
            _cut(rollout, turn_start, turn_text[:keep_characters], tokenizer)
            return False
        if completion.finish_reason is FinishReason.LENGTH:
            rollout.stop_reason = StopReason.LENGTH
            return False
        if completion.finish_reason is FinishReason.STOP and isinstance(completion.matched_stop, int):
            return True  # end of sequence; a pattern that matched is a string


def _append_model_tokens(rollout: Rollout, completion: Completion) -> None:
    count = len(completion.token_ids)
    versions = [NOT_SAMPLED] * count
    for span in completion.version_spans:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    assert NOT_SAMPLED not in versions, "the version spans of a completion cover all its tokens"
    rollout.token_ids.extend(completion.token_ids)
    rollout.logprobs.extend(completion.logprobs)
    rollout.loss_mask.extend([True] * count)
    rollout.weight_versions.extend(versions)


def _append_reply(rollout: Rollout, reply_ids: list[int], sampling: Sampling) -> None:
    """Appends a tool reply; one that leaves no room to go on is left out and ends the rollout."""
    if len(rollout.token_ids) + len(reply_ids) >= sampling.max_response_tokens:
        rollout.stop_reason = StopReason.LENGTH
        return
    rollout.token_ids.extend(reply_ids)
    rollout.logprobs.extend([0.0] * len(reply_ids))
    rollout.loss_mask.extend([False] * len(reply_ids))
    rollout.weight_versions.extend([NOT_SAMPLED] * len(reply_ids))


def _cut(rollout: Rollout, turn_start: int, keep_text: str, tokenizer: Tokenizer) -> None:
    """Drops the tokens of the turn after the one that completes ``keep_text``, exactly."""
    turn_ids = rollout.token_ids[turn_start:]
    low, high = 1, len(turn_ids)  # the fewest tokens that spell it
    while low < high:
        middle = (low + high) // 2
        if tokenizer.decode(turn_ids[:middle]).startswith(keep_text):
            high = middle
        else:
            low = middle + 1
    for per_token in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        del per_token[turn_start + low :]
