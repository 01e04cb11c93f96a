"""Sample rollouts in ``rollouts.jsonl``: what the policy wrote and what the tool replied, in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import JsonLines
from megatron_ztrl.types import Rollout

MODEL = "model"
TOOL = "tool"


class RolloutLog(JsonLines):
    """Appends rollouts to a run's ``rollouts.jsonl``; `truncate_after` cuts it back on resume."""

    def __init__(self, run_directory: str | Path, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode`` turns token ids into text, special tokens included."""
        super().__init__(Path(run_directory) / names.ROLLOUTS_FILE)
        self._decode = decode

    def log(
        self,
        rollouts: Iterable[Rollout],
        *,
        step: int,
        split: str = names.TRAIN,
        env_iterations: int | None = None,
    ) -> None:
        """Writes one row per rollout."""
        for rollout in rollouts:
            row = {names.STEP: step, names.SPLIT: split, names.ENV_ITERATIONS: env_iterations}
            self.append(row | rollout_record(rollout, self._decode))


def rollout_record(rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """What a reader wants to know of one rollout, ready for JSON."""
    return {
        "rollout_id": rollout.rollout_id,
        "prompt_id": rollout.prompt.prompt_id,
        "data_source": rollout.prompt.data_source,
        "problem": rollout.prompt.problem,
        "ground_truth": rollout.prompt.ground_truth,
        "reward": rollout.reward,
        "stop_reason": rollout.stop_reason,
        "executed_calls": rollout.executed_calls,
        "response_tokens": len(rollout.token_ids),
        "segments": _segments(rollout, decode),
    }


def _segments(rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> list[dict[str, str]]:
    """Runs of tokens with one author."""
    pairs = zip(rollout.token_ids, rollout.loss_mask, strict=True)
    return [
        {"author": MODEL if sampled else TOOL, "text": decode([token for token, _ in run])}
        for sampled, run in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]
