"""What a set of rollouts looks like, in the paper's terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from megatron_ztrl.envs.python_tool import OPENING_FENCE
from megatron_ztrl.types import ExecutionStatus, Rollout, StopReason


def rollout_statistics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the rollouts that the infrastructure did not fail.

    Written code is reported beside executed code: with the tool off, or used up, a policy can still write
    blocks that nobody runs.
    """
    scored = [rollout for rollout in rollouts if rollout.trainable]
    failures = {
        "infrastructure_failures": fmean(r.stop_reason is StopReason.INFRASTRUCTURE for r in rollouts),
        "missed_deadlines": fmean(r.stop_reason is StopReason.DEADLINE for r in rollouts),
    }
    if not scored:
        return failures

    def mean(value: Callable[[Rollout], float]) -> float:
        return fmean(value(rollout) for rollout in scored)

    return {
        "accuracy": mean(lambda r: r.reward or 0.0),
        "code_proportion": mean(lambda r: r.executed_calls > 0),
        "code_ratio": mean(lambda r: r.executed_calls),
        "written_proportion": mean(lambda r: OPENING_FENCE in r.text),
        "written_calls": mean(lambda r: r.text.count(OPENING_FENCE)),
        "failed_calls": mean(
            lambda r: sum(t.result is not None and t.result.status is not ExecutionStatus.OK for t in r.turns)
        ),
        "response_tokens": mean(lambda r: len(r.token_ids)),
        "truncated": mean(lambda r: r.stop_reason is StopReason.LENGTH),
    } | failures


def model_tokens(rollouts: Sequence[Rollout]) -> int:
    """Tokens that the policy sampled."""
    return sum(sum(rollout.loss_mask) for rollout in rollouts)
