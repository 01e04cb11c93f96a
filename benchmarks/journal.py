"""What the journal costs: bytes for each token, time of the event loop, and time to read it back.

Writes down a step of rollouts as `GroupRunner` would, in calls of up to 4,096 tokens and with tool replies, on the
event loop of one process, and measures how long the loop is held up, in CPU time of its thread: by all records
together, and by one. Then reads everything back, as a driver that is started again does.

    python benchmarks/journal.py [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ztrl.rollout.journal import Journal, RolloutRecorder
from megatron_ztrl.rollout.trajectory import append_reply, append_sampled
from megatron_ztrl.types import (
    ExecutionResult,
    ExecutionStatus,
    Prompt,
    Rollout,
    StopReason,
    Turn,
    VersionSpan,
)

PROMPT_TOKENS, CALL_TOKENS, REPLY_TOKENS = 200, 4096, 60
VOCAB_SIZE = 152_064


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--response-tokens", type=int, default=16_384)
    parser.add_argument("--calls", type=int, default=10, help="tool calls of one rollout")
    parser.add_argument("--directory", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as parent:
        directory = Path(parent, "journal")
        figures = asyncio.run(write(directory, options)) | read(directory)
    for name, value in figures.items():
        print(f"{name:38} {value:,.3f}" if isinstance(value, float) else f"{name:38} {value:,}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


async def write(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes all rollouts down; returns what that took."""
    journal = Journal(directory, identity="benchmark")
    prompt = Prompt(prompt_id="p", problem="x" * 400, text="x" * 800, ground_truth="4", data_source="d")
    keys = [(group, index) for group in range(options.groups) for index in range(options.group_size)]
    rollouts = {
        (group, index): Rollout(
            rollout_id=f"{group}.{index}", prompt=prompt, prompt_ids=list(range(PROMPT_TOKENS))
        )
        for group, index in keys
    }
    events = {key: iter(_events(options)) for key in keys}
    turns = [key for key in keys for _ in _events(options)]
    random.Random(0).shuffle(turns)  # rollouts run side by side
    held_seconds = []
    for key in turns:
        rollout, event, recorder = rollouts[key], next(events[key]), journal.recorder(*key)
        start = len(rollout.token_ids)
        _extend(rollout, event)
        begun = time.thread_time()
        _record(recorder, rollout, event, start)
        held_seconds.append(time.thread_time() - begun)
        if len(held_seconds) % 16 == 0:
            await asyncio.sleep(0)  # the loop turns: a batch goes to the thread
    written = time.perf_counter()
    journal.close()
    drain_seconds = time.perf_counter() - written
    tokens = sum(len(rollout.token_ids) for rollout in rollouts.values())
    return {
        "rollouts": len(rollouts),
        "tokens": tokens,
        "records": len(held_seconds),
        "loop_microseconds_per_1000_tokens": sum(held_seconds) / tokens * 1e9,
        "loop_milliseconds_in_all": sum(held_seconds) * 1e3,
        "longest_record_milliseconds": max(held_seconds) * 1e3,
        "thread_behind_milliseconds": drain_seconds * 1e3,
    }


def read(directory: Path) -> dict[str, Any]:
    """Reads what is there; returns what that took."""
    size = sum(path.stat().st_size for path in directory.iterdir())
    begun = time.perf_counter()
    journal = Journal(directory, identity="benchmark")
    found = journal.restore(10**6)
    journal.close()
    return {
        "tokens_read": found.tokens,
        "bytes_per_token": size / found.tokens,
        "read_seconds_per_million_tokens": (time.perf_counter() - begun) / found.tokens * 1e6,
    }


def _events(options: argparse.Namespace) -> list[int]:
    """What one rollout gains, in order: model tokens of a call, 0 for a tool reply, -1 for its end."""
    per_turn = (options.response_tokens - options.calls * REPLY_TOKENS) // (options.calls + 1)
    calls = [CALL_TOKENS] * (per_turn // CALL_TOKENS) + [per_turn % CALL_TOKENS or CALL_TOKENS]
    return [*(event for _ in range(options.calls) for event in (*calls, 0)), *calls, -1]


def _extend(rollout: Rollout, event: int) -> None:
    if event > 0:
        generator = np.random.default_rng(len(rollout.token_ids))
        append_sampled(
            rollout,
            generator.integers(0, VOCAB_SIZE, event).tolist(),
            (-generator.exponential(0.5, event)).astype(np.float32).tolist(),
            [
                VersionSpan(version=3, start=0, end=event // 2),
                VersionSpan(version=4, start=event // 2, end=event),
            ],
        )
    elif event == 0:
        turn_start = rollout.turns[-1].end if rollout.turns else 0
        tool_start = len(rollout.token_ids)
        append_reply(rollout, range(REPLY_TOKENS))
        result = ExecutionResult(
            status=ExecutionStatus.OK, stdout="1" * 180, stderr="", run_seconds=0.1, queue_seconds=0.0
        )
        turn = Turn(
            start=turn_start,
            tool_start=tool_start,
            end=len(rollout.token_ids),
            code="print(1)\n" * 40,
            result=result,
        )
        rollout.turns.append(turn)
    else:
        rollout.stop_reason, rollout.reward = StopReason.STOP, 1.0


def _record(recorder: RolloutRecorder, rollout: Rollout, event: int, start: int) -> None:
    if event > 0:
        recorder.sampled(rollout, start)
    elif event == 0:
        recorder.turn_done(rollout)
    else:
        recorder.finished(rollout)


if __name__ == "__main__":
    raise SystemExit(main())
