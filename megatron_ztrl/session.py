"""What a training run keeps besides its processes: data cursor, checkpoints, metrics, progress."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.mismatch import mismatch_warning
from megatron_ztrl.data.prompts import PromptSource
from megatron_ztrl.evaluate import Evaluator
from megatron_ztrl.evaluation_schedule import EvaluationSchedule
from megatron_ztrl.observability import names
from megatron_ztrl.observability.clock import PhaseClock
from megatron_ztrl.observability.metrics import MetricsLogger
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.rollout_log import RolloutLog
from megatron_ztrl.rollout.deadlines import Deadlines
from megatron_ztrl.rollout.group_filter import GroupFilter
from megatron_ztrl.rollout.journal import Journal, identity
from megatron_ztrl.rollout.scheduler import RolloutScheduler, TakenGroups
from megatron_ztrl.rollout.step_metrics import step_metrics
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.runtime.checkpoints import CheckpointStore
from megatron_ztrl.runtime.driver_state import DriverState
from megatron_ztrl.runtime.interrupt import unless_stopped
from megatron_ztrl.runtime.system import System

_SHOWN_DAMAGE = 3
"""Files of a damaged journal that are named."""
_PATIENCE_STEPS = 5
"""As many groups as so many steps take may be refused one after the other before the user is told."""


class TrainingSession:
    """The driver's side of one run. As a context manager it ends what is in flight, and closes its files.

    Args:
        system: The running system.
        source: Training prompts.
        evaluator: Evaluation.
        decode: Token ids to text with special tokens, for people to read.
        resume: Go on with what ``run.directory`` holds.
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
        resume: bool,
        checkpoint: Path | None,
        progress: Progress,
        stop: asyncio.Event,
    ) -> None:
        config = system.rollouts.config
        self.config = config
        self.system = system
        self.stop = stop
        self._source = source
        self._checkpoint = checkpoint
        self._progress = progress
        self._directory = Path(config.run.directory)
        self._restored = state = DriverState.read(checkpoint) if checkpoint else DriverState()
        if state.source is not None:
            source.restore(state.source)
        progress.resume(state.version)
        self._store = CheckpointStore(
            self._directory / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            on_complete=self._forget_covered,
        )
        sampling = training_sampling(config)
        self._journal = self._open_journal(sampling, resume=resume)
        self._metrics = MetricsLogger(
            self._directory, config.logging, restored_step=state.version if resume else None
        )
        self._rollout_log = RolloutLog(self._directory, decode)
        self._rollout_log.truncate_after(state.version)
        self.evaluations = EvaluationSchedule(
            evaluator, self._metrics, self._rollout_log, progress, restored_version=state.version
        )
        self.scheduler = self._make_scheduler(sampling)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.scheduler.stop()
        await self.evaluations.stop()
        self._metrics.close()
        self._rollout_log.close()
        self._journal.close()

    async def restore(self) -> int:
        """Loads the weights of the checkpoint, if there is one. Returns the version of the policy to go on with."""
        if self._checkpoint is not None:
            await self.system.load_checkpoint(self._checkpoint)
        return self._restored.version

    def start(self) -> None:
        """Starts rollouts; those that the resumed run had in flight come first, and go on where they were."""
        self.scheduler.start(self._restored.pending, self._restored.next_group_id)
        self.evaluations.restart(self._restored.evaluations)

    async def take_groups(self) -> TakenGroups | None:
        """The groups of the next step; None when the run was told to stop before they were there."""
        self._progress.phase("rollouts")
        return await unless_stopped(self.stop, self.scheduler.take(self.config.rollout.groups_per_step))

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
        metrics = step_metrics(version, taken, statistics, clock)
        alarm = self.config.algorithm.mismatch_alarm
        if alarm is not None and names.MISMATCH_MEAN in metrics:
            warning = mismatch_warning(metrics, alarm, version)
            metrics[names.MISMATCH_ALARM] = float(warning is not None)
            if warning is not None:
                self._progress.note(warning)
        self._metrics.log(metrics, step=version)
        rollouts = [rollout for group in taken.groups for rollout in group.rollouts]
        sample = random.Random(version).sample(
            rollouts, min(self.config.logging.sample_rollouts, len(rollouts))
        )
        self._rollout_log.log(sample, step=version, env_iterations=self.config.rollout.env_iterations)
        self._progress.step(version, metrics)

    def release(self, taken: TakenGroups) -> None:
        """The policy that was trained on these groups is published: lets new ones in."""
        self.scheduler.release(len(taken.groups))
        self._journal.released([*taken.groups, *taken.dropped])

    async def save_if_due(self, version: int) -> None:
        """Begins a save every ``checkpoint.interval_steps``; training goes on while it is written."""
        await self._store.complete_if_written()
        interval = self.config.checkpoint.interval_steps
        if interval and version % interval == 0:
            await self.save(version)

    async def save(self, version: int) -> None:
        """Begins to save everything that a resumed run needs."""
        self._progress.phase("saving a checkpoint")
        state = DriverState(
            version=version,
            source=self._source.state(),
            pending=self.scheduler.pending(),
            next_group_id=self.scheduler.next_group_id,
            evaluations=self.evaluations.unfinished(),
        )
        self._journal.checkpoint_begun(version)
        await self._store.save(version, self.system, state.as_json())

    async def finish(self, version: int) -> bool:
        """Saves; after the last step also evaluates and exports. Returns whether nothing is left to do."""
        await self.save(version)
        await self._store.complete()
        if version >= self.config.train.num_steps:
            await self.scheduler.stop()
            if await unless_stopped(self.stop, self._end_evaluations(version)):
                await self._export()
                (self._directory / names.FINISHED_FILE).write_text(f"{version}\n")
                return True
        await self.system.rollouts.engines.interrupt()  # what they have sampled goes into the journals
        await self.scheduler.stop()
        return False

    async def _end_evaluations(self, version: int) -> bool:
        """Returns True when none is left."""
        await self.evaluations.start_if_due(version)
        await self.evaluations.finish()
        return True

    async def _export(self) -> None:
        """Writes the policy, and the critic if there is one, in Hugging Face format."""
        if self.config.checkpoint.export_hf:
            self._progress.phase("exporting the policy")
            await self.system.actor.export_hf(self._directory / "policy")
            if self.system.critic is not None:
                await self.system.critic.export_hf(self._directory / "critic")

    def _make_scheduler(self, sampling: Sampling) -> RolloutScheduler:
        rollout = self.config.rollout
        deadlines = Deadlines(
            rollout_seconds=rollout.deadline_seconds, group_seconds=rollout.group_deadline_seconds
        )
        runner = dataclasses.replace(
            self.system.rollouts.group_runner(sampling), journal=self._journal, deadlines=deadlines
        )
        keep_group = GroupFilter(
            self.config.algorithm,
            patience_groups=_PATIENCE_STEPS * rollout.groups_per_step,
            note=self._progress.note,
        )
        return RolloutScheduler(
            self._source.__next__,
            functools.partial(
                runner.run, group_size=rollout.group_size, env_iterations=rollout.env_iterations
            ),
            keep_group,
            groups_per_step=rollout.groups_per_step,
            max_staleness=rollout.max_staleness,
        )

    def _open_journal(self, sampling: Sampling, *, resume: bool) -> Journal:
        """Reads the rollouts that were in flight; a run that begins removes what another has left."""
        config, state = self.config, self._restored
        fingerprint = self._source.state()["fingerprint"]
        rollout = config.rollout
        # With a smaller max_staleness, tokens that were sampled under a larger one may be too old.
        limits = (rollout.group_size, rollout.env_iterations, rollout.max_staleness)
        journal = Journal(
            self._directory / "journal" / "train",
            identity=identity(config, sampling, fingerprint, *limits),
        )
        if not resume:
            journal.clear()
            return journal
        found = journal.restore(state.version, pending=state.pending_ids, next_group_id=state.next_group_id)
        for line in found.damage[:_SHOWN_DAMAGE]:
            self._progress.note(line)
        if len(found.damage) > _SHOWN_DAMAGE:
            self._progress.note(f"and {len(found.damage) - _SHOWN_DAMAGE} more files of the journal")
        if found.rollouts or found.tokens_cut:
            note = f"resumed {found.rollouts} rollouts with {found.tokens:,} tokens from the journal"
            if found.tokens_cut:
                note += f"; {found.tokens_cut:,} of policies after step {state.version}'s are sampled again"
            self._progress.note(note)
        return journal

    def _forget_covered(self, state: dict[str, Any]) -> None:
        """A checkpoint is complete: what was trained before it needs no journal."""
        pending = {group["group_id"] for group in state["pending"]}
        self._journal.checkpoint_complete(pending=pending, next_group_id=state["next_group_id"])


def training_sampling(config: Config) -> Sampling:
    """How training samples."""
    return Sampling(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_response_tokens=config.rollout.max_response_tokens,
        max_call_tokens=config.rollout.max_call_tokens,
    )
