"""What a training run keeps besides its processes: data cursor, checkpoints, metrics, progress."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_ztrl.algorithms.filters import keep_group
from megatron_ztrl.data.mismatch import mismatch_warning
from megatron_ztrl.data.prompts import PromptSource
from megatron_ztrl.evaluate import Evaluator, evaluation_line
from megatron_ztrl.observability import names
from megatron_ztrl.observability.clock import PhaseClock
from megatron_ztrl.observability.jsonl import read_rows
from megatron_ztrl.observability.metrics import MetricsLogger
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.rollout_log import RolloutLog
from megatron_ztrl.rollout.scheduler import PendingGroup, RolloutScheduler, TakenGroups
from megatron_ztrl.rollout.statistics import model_tokens, rollout_statistics
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.runtime.checkpoints import CheckpointStore, read_state
from megatron_ztrl.runtime.system import System
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup


class TrainingSession:
    """The driver's side of one run.

    Args:
        system: The running system.
        source: Training prompts.
        evaluator: Evaluation.
        decode: Token ids to text with special tokens, for people to read.
        checkpoint: Where to resume from; None starts at the initial policy.
        progress: The terminal.
        stop: Set it to end the run after the current step, resumable.
    """

    def __init__(
        self,
        system: System,
        source: PromptSource,
        evaluator: Evaluator,
        *,
        decode: Callable[[Sequence[int]], str],
        checkpoint: Path | None,
        progress: Progress,
        stop: asyncio.Event,
    ) -> None:
        config = system.rollouts.config
        self.config = config
        self.system = system
        self.stop = stop
        self.pending: list[PendingGroup] = []
        self.next_group_id = 0
        self._source = source
        self._decode = decode
        self._evaluator = evaluator
        self._checkpoint = checkpoint
        self._progress = progress
        self._directory = Path(config.run.directory)
        self._store = CheckpointStore(self._directory / "checkpoints", keep_last=config.checkpoint.keep_last)
        runner = system.rollouts.group_runner(
            Sampling(
                temperature=config.rollout.temperature,
                top_p=config.rollout.top_p,
                max_response_tokens=config.rollout.max_response_tokens,
            )
        )

        async def run_group(group_id: int, prompt: Prompt) -> RolloutGroup:
            return await runner.run(
                group_id,
                prompt,
                group_size=config.rollout.group_size,
                env_iterations=config.rollout.env_iterations,
            )

        self.scheduler = RolloutScheduler(
            lambda: next(source),
            run_group,
            lambda group: keep_group(group, config.algorithm),
            groups_per_step=config.rollout.groups_per_step,
            max_staleness=config.rollout.max_staleness,
        )

    async def restore(self) -> int:
        """Loads the checkpoint, if there is one. Returns the version of the policy to go on with."""
        version = 0
        if self._checkpoint is not None:
            state = read_state(self._checkpoint)
            version = state["version"]
            await self.system.load_checkpoint(self._checkpoint)
            self._source.restore(state["source"])
            self.pending = [
                PendingGroup(group_id=group["group_id"], prompt=Prompt(**group["prompt"]))
                for group in state["pending"]
            ]
            self.next_group_id = state["next_group_id"]
            self._progress.resume(version)
        self._metrics = MetricsLogger(self._directory, self.config.logging, restored_step=version or None)
        self._evaluated_versions = {
            row[names.STEP]
            for row in read_rows(self._directory / names.METRICS_FILE)
            if row[names.SPLIT] == names.EVAL
        }
        self._rollout_log = RolloutLog(self._directory, self._decode)
        self._rollout_log.truncate_after(version)
        return version

    async def evaluate_if_due(self, version: int) -> None:
        """Evaluates before the first step, every ``eval.interval_steps``, and after the last one."""
        evaluation = self.config.eval
        last = version in (0, self.config.train.num_steps)
        if evaluation.interval_steps == 0 or (version % evaluation.interval_steps and not last):
            return
        if version in self._evaluated_versions:  # by the run that this one resumes
            return
        sweep = evaluation.env_iterations if last else evaluation.interval_env_iterations
        for env_iterations in sweep or evaluation.env_iterations:
            self._progress.phase(f"evaluating at N = {env_iterations}")
            metrics, rollouts = await self._evaluator.evaluate(env_iterations)
            self._metrics.log(
                {f"eval/{key}": value for key, value in metrics.items()},
                step=version,
                split=names.EVAL,
                env_iterations=env_iterations,
            )
            self._rollout_log.log(
                rollouts[: self.config.logging.sample_rollouts],
                step=version,
                split=names.EVAL,
                env_iterations=env_iterations,
            )
            self._progress.note(f"step {version}  N = {env_iterations}  {evaluation_line(metrics)}")

    async def take_groups(self) -> TakenGroups | None:
        """The groups of the next step; None when the run was told to stop while it waited for them."""
        self._progress.phase("rollouts")
        take = asyncio.create_task(self.scheduler.take(self.config.rollout.groups_per_step))
        interrupted = asyncio.create_task(self.stop.wait())
        await asyncio.wait({take, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        interrupted.cancel()
        if not take.done():
            take.cancel()
            await asyncio.wait({take})
            return None
        return take.result()

    def rng(self, version: int) -> np.random.Generator:
        """Randomness of one step: the same after a resume."""
        return np.random.default_rng((self.config.run.seed, version))

    def log_step(
        self,
        version: int,
        taken: TakenGroups,
        statistics: Sequence[dict[str, float]],
        clock: PhaseClock,
    ) -> None:
        """Writes the metrics and a few rollouts of the step that made ``version``.

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
        # The policy that made this step's update was version - 1.
        metrics[names.TRAIN_STALENESS_MAX] = max(
            version - 1 - rollout.oldest_version for rollout in rollouts if rollout.trainable
        )
        for key in statistics[0]:
            metrics[names.LOSS_POLICY if key == "loss/loss" else key] = fmean(row[key] for row in statistics)
        alarm = self.config.algorithm.mismatch_alarm
        if alarm is not None:
            warning = mismatch_warning(metrics, alarm, version)
            metrics[names.MISMATCH_ALARM] = float(warning is not None)
            if warning is not None:
                self._progress.note(warning)
        metrics |= _times(clock, rollouts)
        seconds = clock.step_seconds()
        metrics[names.THROUGHPUT_TOKENS] = model_tokens(seen) / seconds
        metrics[names.THROUGHPUT_SAMPLES] = len(seen) / seconds
        self._metrics.log(metrics, step=version)
        sample = random.Random(version).sample(
            rollouts, min(self.config.logging.sample_rollouts, len(rollouts))
        )
        self._rollout_log.log(sample, step=version, env_iterations=self.config.rollout.env_iterations)
        self._progress.step(version, metrics)

    async def save_if_due(self, version: int) -> None:
        """Begins a save every ``checkpoint.interval_steps``; training goes on while it is written."""
        await self._store.complete_if_written()
        interval = self.config.checkpoint.interval_steps
        if interval and version % interval == 0:
            await self.save(version)

    async def save(self, version: int) -> None:
        """Begins to save everything that a resumed run needs."""
        self._progress.phase("saving a checkpoint")
        state: dict[str, Any] = {
            "source": self._source.state(),
            "pending": [dataclasses.asdict(group) for group in self.scheduler.pending()],
            "next_group_id": self.scheduler.next_group_id,
        }
        await self._store.save(version, self.system, state)

    async def finish(self, version: int) -> bool:
        """Saves; after the last step also evaluates and exports. Returns whether it was the last."""
        await self.save(version)
        await self._store.complete()
        await self.scheduler.stop()
        finished = version >= self.config.train.num_steps
        if finished:
            await self.evaluate_if_due(version)
            if self.config.checkpoint.export_hf:
                self._progress.phase("exporting the policy")
                await self.system.actor.export_hf(self._directory / "policy")
                if self.system.critic is not None:
                    await self.system.critic.export_hf(self._directory / "critic")
        self._metrics.close()
        self._rollout_log.close()
        return finished


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
        names.TIME_OTHER: clock.other_seconds(),
    }
