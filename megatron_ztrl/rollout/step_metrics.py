"""The row of one training step in ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_ztrl.observability import names
from megatron_ztrl.observability.clock import PhaseClock
from megatron_ztrl.rollout.scheduler import TakenGroups
from megatron_ztrl.rollout.statistics import model_tokens, rollout_statistics
from megatron_ztrl.types import Rollout


def step_metrics(
    version: int, taken: TakenGroups, statistics: Sequence[dict[str, float]], clock: PhaseClock
) -> dict[str, float]:
    """Everything that is logged of the step that made ``version``.

    Args:
        version: After the step.
        taken: Its groups.
        statistics: One row for each mini-batch.
        clock: Of the step.
    """
    rollouts = [rollout for group in taken.groups for rollout in group.rollouts]
    seen = rollouts + [rollout for group in taken.dropped for rollout in group.rollouts]
    metrics = {f"train/{key}": value for key, value in rollout_statistics(seen).items()}
    metrics[names.TRAIN_REWARD] = metrics.get(names.TRAIN_ACCURACY, 0.0)
    metrics[names.TRAIN_GROUPS_KEPT] = len(taken.groups)
    metrics[names.TRAIN_GROUPS_DROPPED] = len(taken.dropped)
    sampled = [rollout for rollout in rollouts if rollout.trainable and any(rollout.loss_mask)]
    # The policy that made this step's update was version - 1.
    metrics[names.TRAIN_STALENESS_MAX] = max(version - 1 - rollout.oldest_version for rollout in sampled)
    for key in statistics[0]:
        metrics[names.LOSS_POLICY if key == "loss/loss" else key] = fmean(row[key] for row in statistics)
    metrics |= _times(clock, rollouts)
    seconds = clock.step_seconds()
    metrics[names.THROUGHPUT_TOKENS] = model_tokens(seen) / seconds
    metrics[names.THROUGHPUT_SAMPLES] = len(seen) / seconds
    return metrics


def _times(clock: PhaseClock, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Seconds by phase; the wait for rollouts is split as the rollouts spent their own time."""
    tools = sum(rollout.tool_seconds for rollout in rollouts)
    generate = sum(rollout.generate_seconds for rollout in rollouts)
    tool_share = tools / (tools + generate) if tools else 0.0
    waited = clock.seconds("rollout")
    return {
        names.TIME_STEP: clock.step_seconds(),
        names.TIME_GENERATE: waited * (1 - tool_share),
        names.TIME_TOOLS: waited * tool_share,
        names.TIME_LOGPROBS: clock.seconds("logprobs"),
        names.TIME_TRAIN: clock.seconds("train"),
        names.TIME_PUBLISH: clock.seconds("publish"),
        names.TIME_OTHER: clock.other_seconds() + clock.seconds("evaluation"),
        names.TIME_EVALUATION: clock.seconds("evaluation"),
    }
