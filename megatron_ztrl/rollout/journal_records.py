"""What a journal file consists of: framed records, each of which extends one rollout of a group.

A frame is ``<payload bytes: u32><CRC-32 of the payload: u32><payload>``, little-endian. A payload is one line of
JSON, which says what the record is, and the arrays that it announces: token ids as int32, log-probs as float32
where that loses nothing, else as float64.

    group      first in a file: whose rollouts these are, and the prompt's tokens
    sampled    what one engine call returned, with its weight versions
    turn       a tool's result, and the reply's tokens
    finished   why the rollout stopped, and its reward
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ztrl.rollout.trajectory import append_reply, append_sampled, cut_tokens
from megatron_ztrl.types import (
    ExecutionResult,
    ExecutionStatus,
    Prompt,
    Rollout,
    StopReason,
    Turn,
    VersionSpan,
)

FORMAT = 1
"""A file of another format is not read."""

_FRAME = struct.Struct("<II")
_TOKEN = np.dtype("<i4")


@dataclass(kw_only=True)
class GroupFile:
    """What one file says, as far as it is whole."""

    rollouts: dict[int, Rollout]
    """By their index in the group."""
    damage: str | None = None
    """What is wrong with the file, and where; not set for a last record that was only half written."""


def group_record(group_id: int, identity: str, rollout: Rollout) -> bytes:
    """The first record of a file.

    Args:
        group_id: Of the group.
        identity: Tells runs apart whose rollouts cannot be mixed.
        rollout: Any of the group.
    """
    header = {"kind": "group", "format": FORMAT, "identity": identity, "group": group_id}
    prompt = dataclasses.asdict(rollout.prompt)
    return _frame({**header, "prompt": prompt}, _tokens(rollout.prompt_ids))


def sampled_record(
    index: int, rollout: Rollout, start: int, end: int | None = None
) -> tuple[bytes, int | None]:
    """Model tokens ``[start, end)``; to the last one when ``end`` is None.

    Returns:
        The record, and the oldest version in it.
    """
    runs = itertools.groupby(rollout.weight_versions[start:end])
    versions = [(version, len(list(run))) for version, run in runs]
    token_ids = rollout.token_ids[start:end]
    exact = np.asarray(rollout.logprobs[start:end], dtype="<f8")
    single = exact.astype("<f4")
    is_last = end is None
    header = {
        "kind": "sampled",
        "rollout": index,
        "start": start,
        "count": len(token_ids),
        "versions": versions,
        "ended": is_last and rollout.ended,
        "stop": rollout.stop_reason if is_last else None,
        "seconds": round(rollout.generate_seconds, 3),
    }
    frame = _frame(header, _tokens(token_ids), single if np.array_equal(single, exact) else exact)
    return frame, min((version for version, _ in versions), default=None)


def turn_record(index: int, rollout: Rollout, turn: Turn) -> bytes:
    """A turn that a tool answered, and its reply."""
    header = {
        "kind": "turn",
        "rollout": index,
        "start": turn.start,
        "tool_start": turn.tool_start,
        "code": turn.code,
        "result": None if turn.result is None else dataclasses.asdict(turn.result),
        "stop": rollout.stop_reason if turn is rollout.turns[-1] else None,
        "seconds": round(rollout.tool_seconds, 3),
    }
    return _frame(header, _tokens(rollout.token_ids[turn.tool_start : turn.end]))


def finished_record(index: int, rollout: Rollout) -> bytes:
    """How a rollout ended."""
    return _frame(
        {"kind": "finished", "rollout": index, "stop": rollout.stop_reason, "reward": rollout.reward}
    )


def snapshot(group_id: int, identity: str, rollouts: Mapping[int, Rollout]) -> bytes:
    """A whole file, in as few records as there can be; of rollouts that have no last turn yet."""
    frames = [group_record(group_id, identity, next(iter(rollouts.values())))]
    for index, rollout in rollouts.items():
        for turn in rollout.turns:
            frames.append(sampled_record(index, rollout, turn.start, turn.tool_start)[0])
            frames.append(turn_record(index, rollout, turn))
        start = rollout.turns[-1].end if rollout.turns else 0
        if start < len(rollout.token_ids):
            frames.append(sampled_record(index, rollout, start)[0])
        if rollout.stop_reason is not None:
            frames.append(finished_record(index, rollout))
    return b"".join(frames)


def read_group(data: bytes, group_id: int, identity: str) -> GroupFile:
    """Reads a file up to its first record that is not whole.

    Every prefix of a file is a state that the group was in, so what is left out was only done in vain.
    """
    file = GroupFile(rollouts={})
    prompt: Prompt | None = None
    prompt_ids: list[int] = []
    for offset, payload in _payloads(data):
        if payload is None:
            file.damage = f"damaged at byte {offset}"
            break
        line, _, arrays = payload.partition(b"\n")
        header = json.loads(line)
        if prompt is None:
            if header["kind"] != "group" or (header["format"], header["group"]) != (FORMAT, group_id):
                file.damage = f"not a journal of group {group_id} in format {FORMAT}"
                break
            if header["identity"] != identity:
                file.damage = "written under other settings of rollouts, prompts or rewards"
                break
            prompt = Prompt(**header["prompt"])
            prompt_ids = np.frombuffer(arrays, _TOKEN).tolist()
            continue
        index = header["rollout"]
        if index not in file.rollouts:
            file.rollouts[index] = Rollout(
                rollout_id=f"{group_id}.{index}", prompt=prompt, prompt_ids=list(prompt_ids)
            )
        _apply(header, arrays, file.rollouts[index])
    return file


def _apply(header: Mapping[str, Any], arrays: bytes, rollout: Rollout) -> None:
    """Does again what a record tells."""
    match header["kind"]:
        case "sampled":
            _apply_sampled(header, arrays, rollout)
        case "turn":
            append_reply(rollout, np.frombuffer(arrays, _TOKEN).tolist())
            rollout.turns.append(
                Turn(
                    start=header["start"],
                    tool_start=header["tool_start"],
                    end=len(rollout.token_ids),
                    code=header["code"],
                    result=_result(header["result"]),
                )
            )
            rollout.ended = False
            rollout.tool_seconds = header["seconds"]
        case "finished":
            rollout.reward = header["reward"]
    rollout.stop_reason = None if header["stop"] is None else StopReason(header["stop"])


def _result(fields: Mapping[str, Any] | None) -> ExecutionResult | None:
    if fields is None:
        return None
    return ExecutionResult(**{**fields, "status": ExecutionStatus(fields["status"])})


def _apply_sampled(header: Mapping[str, Any], arrays: bytes, rollout: Rollout) -> None:
    count, spans, end = header["count"], [], 0
    for version, length in header["versions"]:
        spans.append(VersionSpan(version=version, start=end, end=end + length))
        end += length
    split = count * _TOKEN.itemsize
    size = (len(arrays) - split) // max(count, 1)
    cut_tokens(rollout, header["start"])  # a stop may have taken back tokens of the call before
    rollout.turns = [turn for turn in rollout.turns if turn.end <= header["start"]]
    append_sampled(
        rollout,
        np.frombuffer(arrays[:split], _TOKEN).tolist(),
        np.frombuffer(arrays[split:], f"<f{size}" if count else "<f4").tolist(),
        spans,
    )
    rollout.ended = header["ended"]
    rollout.generate_seconds = header["seconds"]


def _frame(header: Mapping[str, Any], *arrays: np.ndarray) -> bytes:
    line = json.dumps(header, separators=(",", ":")).encode()
    payload = b"".join((line, b"\n", *(array.tobytes() for array in arrays)))
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _payloads(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """The offset and the payload of every record; None for one that has been altered, which is the last.

    A record that runs past the end of the file was being written when the process died, and is left out.
    """
    offset = 0
    while offset + _FRAME.size <= len(data):
        size, checksum = _FRAME.unpack_from(data, offset)
        payload = data[offset + _FRAME.size : offset + _FRAME.size + size]
        if len(payload) < size:
            return
        if zlib.crc32(payload) != checksum or not payload:
            yield offset, None
            return
        yield offset, payload
        offset += _FRAME.size + size


def _tokens(token_ids: Sequence[int]) -> np.ndarray:
    return np.asarray(token_ids, dtype=_TOKEN)
