r"""The record formats in which maths problems are published, reduced to (problem, answer, metadata).

Recognised without configuration:

* ``{problem, answer}``: MATH-500, MathArena and most others; ``question`` and ``final_answer`` are accepted,
  too (GSM8K, DeepMath). GSM8K's worked ``answer`` is cut to what follows ``####``.
* ``[{from: human, value}, {from: assistant, ground_truth: {value}}]``: Open-Reasoner-Zero, training.
* ``{prompt: [{from: user, value}], final_answer}``: Open-Reasoner-Zero, evaluation.
* ``{prompt: [{role, content}], reward_model: {ground_truth}}``: verl, DAPO, ToRL. A system message is
  dropped, for the prompt template takes its place, and so is DAPO's request for an ``Answer:`` line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ztrl.config.errors import did_you_mean
from megatron_ztrl.config.schema import DatasetConfig

_PROBLEM_ALIASES = ("question", "prompt")
_ANSWER_ALIASES = ("final_answer", "reward_model")
_MAX_METADATA_CHARACTERS = 200
"""Longer strings are worked solutions, which nobody reads from here."""

_DAPO_WRAPPER = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer:[^\n]*\n\n(?P<problem>.*?)\s*"
    r"(Remember to put your answer on its own line after \"Answer:\"\.)?",
    re.DOTALL,
)
_BOXED = re.compile(r"\$?\\boxed\{(?P<content>.*)\}\$?", re.DOTALL)


def parse_record(record: Any, *, problem_key: str, answer_key: str) -> tuple[str, str, dict[str, Any]]:
    """Problem, ground truth and short scalar metadata of one record.

    Raises:
        ValueError: A part is missing, empty or of the wrong kind; the caller adds file and row.
    """
    if isinstance(record, list):
        record = _from_conversation(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object with {problem_key!r} and {answer_key!r}, found {record!r:.60}")
    keys = {
        "problem_key": _find(record, "problem_key", problem_key, _PROBLEM_ALIASES),
        "answer_key": _find(record, "answer_key", answer_key, _ANSWER_ALIASES),
    }
    metadata = {
        key: value
        for key, value in record.items()
        if key not in keys.values()
        and isinstance(value, str | int | float)
        and len(str(value)) <= _MAX_METADATA_CHARACTERS
    }
    return _problem(record, keys["problem_key"]), _answer(record, keys["answer_key"]), metadata


def _from_conversation(messages: Sequence[Any]) -> dict[str, Any]:
    """Open-Reasoner-Zero's pair of messages, as a flat record."""
    record: dict[str, Any] = {}
    for message in messages:
        match message:
            case {"from": "human", "value": problem}:
                record["problem"] = problem
            case {"from": "assistant", "ground_truth": dict(truth)}:
                record |= truth
                record["answer"] = record.pop("value", None)
    return record


def _find(record: Mapping[str, Any], option: str, key: str, aliases: Sequence[str]) -> str:
    """The key to read; the aliases count only as long as the option was left at its default."""
    candidates = [key, *aliases] if key == getattr(DatasetConfig, option) else [key]
    for candidate in candidates:
        if candidate in record:
            return candidate
    raise ValueError(
        f"no key {key!r}{did_you_mean(key, record)} (the row has: {', '.join(record) or 'nothing'}); "
        f"set {option} of this data set"
    )


def _problem(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, list):
        value = _last_user_message(value, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} holds no problem: {value!r:.60}")
    wrapped = _DAPO_WRAPPER.fullmatch(value.strip())
    return (wrapped["problem"] if wrapped else value).strip()


def _last_user_message(messages: Sequence[Any], key: str) -> str:
    for message in reversed(messages):
        match message:
            case {"role": "user", "content": str(text)} | {"from": "user" | "human", "value": str(text)}:
                return text
    raise ValueError(f"{key!r} holds no user message: {messages!r:.60}")


def _answer(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, Mapping):
        value = value.get("ground_truth")
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key!r} holds no answer: {value!r:.60}")
    text = str(value).rpartition("####")[2].strip()
    boxed = _BOXED.fullmatch(text)
    text = boxed["content"].strip() if boxed else text
    if not text or text == "nan":
        raise ValueError(f"{key!r} holds no answer: {value!r:.60}")
    return text
