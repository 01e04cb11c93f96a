"""Which policies are evaluated, and when: with training waiting, or beside it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from megatron_ztrl.evaluate import Evaluator, evaluation_line
from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import read_rows
from megatron_ztrl.observability.metrics import MetricsLogger
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.rollout_log import RolloutLog
from megatron_ztrl.rollout.journal import Journal
from megatron_ztrl.types import NOT_SAMPLED, Rollout


class EvaluationSchedule:
    """Evaluates before the first step, every ``eval.interval_steps``, and after the last one.

    Training waits for the first and the last evaluation. Those in between may run beside ``eval.beside_steps``
    steps: they share the engines, of which they get ``eval.beside_share``, and the publish that would be one too
    many waits for them. Results are logged under the step of the policy that was evaluated.

    An evaluation has a journal like training has, so one that was interrupted goes on after a resume.

    Args:
        evaluator: Rolls out.
        metrics: Of the run.
        rollout_log: Of the run.
        progress: The terminal.
        restored_version: Of the checkpoint that the run resumes from, or 0.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        metrics: MetricsLogger,
        rollout_log: RolloutLog,
        progress: Progress,
        *,
        restored_version: int,
    ) -> None:
        self._config = evaluator.config
        self._evaluator = evaluator
        self._metrics = metrics
        self._rollout_log = rollout_log
        self._progress = progress
        self._restored_version = restored_version
        directory = Path(self._config.run.directory)
        self._journals = directory / "journal" / "eval"
        self._done = {
            (row[names.STEP], row[names.ENV_ITERATIONS])
            for row in read_rows(directory / names.METRICS_FILE)
            if row[names.SPLIT] == names.EVAL
        }
        self._remove_stale_journals()
        self._running: dict[int, asyncio.Task[None]] = {}

    async def start_if_due(self, version: int) -> None:
        """Starts the evaluation of the current policy if there is one to do, and waits for it if training has to.

        Whoever stops waiting ends no evaluation: that is for `stop`.

        Raises:
            Exception: An evaluation has failed, this one or an earlier.
        """
        self._raise_what_failed()
        if self._is_due(version):
            self._start(version)
        if version in self._running and self._training_waits_for(version):
            await self.finish()

    def restart(self, versions: Iterable[int]) -> None:
        """Goes on with what was `unfinished` when the checkpoint of a resumed run was made."""
        for version in versions:
            self._start(version)

    async def wait_before_publish(self, version: int) -> None:
        """Waits for every evaluation that is not to see the policy ``version``."""
        self._raise_what_failed()
        steps = self._config.eval.beside_steps
        due = [task for evaluated, task in self._running.items() if evaluated + steps <= version]
        if due:
            self._progress.phase("waiting for the evaluation")
            await self._wait_for(due)

    async def finish(self) -> None:
        """Waits for everything that runs."""
        await self._wait_for(self._running.values())

    def unfinished(self) -> list[int]:
        """The versions whose evaluation is under way: state for the checkpoint."""
        return [version for version, task in self._running.items() if not task.done()]

    async def stop(self) -> None:
        """Ends everything that runs; journals stay."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._running.clear()

    def _is_due(self, version: int) -> bool:
        interval = self._config.eval.interval_steps
        is_end = version in (0, self._config.train.num_steps)
        return interval > 0 and version not in self._running and (is_end or version % interval == 0)

    def _training_waits_for(self, version: int) -> bool:
        return version in (0, self._config.train.num_steps) or self._config.eval.beside_steps == 0

    def _sweep(self, version: int) -> Sequence[int]:
        """The values of N of one evaluation."""
        settings = self._config.eval
        is_end = version in (0, self._config.train.num_steps)
        return (
            settings.env_iterations if is_end else settings.interval_env_iterations or settings.env_iterations
        )

    def _start(self, version: int) -> None:
        self._running[version] = asyncio.create_task(self._evaluate(version))

    async def _evaluate(self, version: int) -> None:
        beside = not self._training_waits_for(version)
        for env_iterations in self._sweep(version):
            if (version, env_iterations) in self._done:  # by the run that this one resumes
                continue
            if not beside:
                self._progress.phase(f"evaluating at N = {env_iterations}")
            journal = Journal(
                self._journal_directory(version, env_iterations), identity=self._evaluator.identity
            )
            journal.restore(self._restored_version)
            try:
                metrics, rollouts = await self._evaluator.evaluate(
                    env_iterations, journal=journal, beside=beside
                )
                self._log(version, env_iterations, metrics, rollouts)
                journal.clear()
            finally:
                journal.close()

    def _log(
        self, version: int, env_iterations: int, metrics: dict[str, float], rollouts: Sequence[Rollout]
    ) -> None:
        sampled = {v for rollout in rollouts for v in rollout.weight_versions} - {NOT_SAMPLED}
        row = {f"eval/{key}": value for key, value in metrics.items()}
        row[names.EVAL_OLDEST_VERSION] = min(sampled, default=version)
        row[names.EVAL_NEWEST_VERSION] = max(sampled, default=version)
        self._metrics.log(row, step=version, split=names.EVAL, env_iterations=env_iterations)
        self._rollout_log.log(
            rollouts[: self._config.logging.sample_rollouts],
            step=version,
            split=names.EVAL,
            env_iterations=env_iterations,
        )
        self._done.add((version, env_iterations))
        self._progress.note(f"step {version}  N = {env_iterations}  {evaluation_line(metrics)}")

    async def _wait_for(self, evaluations: Collection[asyncio.Task[None]]) -> None:
        if evaluations:  # not gather(), which would end them when it is cancelled
            await asyncio.wait(evaluations, return_when=asyncio.FIRST_EXCEPTION)
        self._raise_what_failed()

    def _raise_what_failed(self) -> None:
        for version in [version for version, task in self._running.items() if task.done()]:
            self._running.pop(version).result()

    def _journal_directory(self, version: int, env_iterations: int) -> Path:
        return self._journals / f"{version:06d}_N{env_iterations}"

    def _remove_stale_journals(self) -> None:
        """Those of policies that the resume has undone, and of evaluations that are logged."""
        for path in self._journals.glob("*_N*"):
            version, env_iterations = map(int, path.name.split("_N"))
            if version > self._restored_version or (version, env_iterations) in self._done:
                shutil.rmtree(path)
