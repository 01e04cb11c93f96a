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
        stop: Sequence[str],
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
        stop = environment.stop_strings()
        matched = await _generate(rollout, engine, tokenizer, stop, sampling)
        if rollout.stop_reason is not None:
            break
        reply_start = len(rollout.token_ids)
        started = time.monotonic()
        reaction = await environment.react(tokenizer.decode(rollout.token_ids), matched)
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
    rollout: Rollout, engine: Engine, tokenizer: Tokenizer, stop: Sequence[str], sampling: Sampling
) -> str | None:
    """Generates up to the next stop; an interrupted call is resumed at its last token.

    Returns:
        The stop string that matched, or None (end-of-sequence, or ``rollout.stop_reason`` was set).
    """
    segment_start = len(rollout.token_ids)
    while True:
        budget = sampling.max_response_tokens - len(rollout.token_ids)
        if budget <= 0:
            rollout.stop_reason = StopReason.LENGTH
            return None
        started = time.monotonic()
        completion = await engine.generate(
            [*rollout.prompt_ids, *rollout.token_ids],
            max_new_tokens=budget,
            stop=stop,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            request_id=f"{rollout.rollout_id}-{uuid.uuid4().hex}",
        )
        rollout.generate_seconds += time.monotonic() - started
        _append_model_tokens(rollout, completion)
        # The engine matches stop strings within one call only; a resumed call may complete one begun before.
        matched = _first_stop(rollout, segment_start, tokenizer, stop)
        if matched is not None:
            return matched
        if completion.finish_reason is FinishReason.STOP:
            return None
        if completion.finish_reason is FinishReason.LENGTH:
            rollout.stop_reason = StopReason.LENGTH
            return None


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


def _first_stop(
    rollout: Rollout, segment_start: int, tokenizer: Tokenizer, stop: Sequence[str]
) -> str | None:
    """The first stop string in the segment. Tokens after the one that completes it are dropped, exactly."""
    segment_ids = rollout.token_ids[segment_start:]
    text = tokenizer.decode(segment_ids)
    found = [(text.find(string) + len(string), string) for string in stop if string in text]
    if not found:
        return None
    _, matched = min(found)
    low, high = 1, len(segment_ids)  # the fewest tokens whose text holds the stop string
    while low < high:
        middle = (low + high) // 2
        if matched in tokenizer.decode(segment_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    keep = segment_start + low
    for per_token in (rollout.token_ids, rollout.logprobs, rollout.loss_mask, rollout.weight_versions):
        del per_token[keep:]
    return matched
