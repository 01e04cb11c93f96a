"""Which policies are evaluated, when training waits for it, and what a resumed run still has to do."""

import asyncio
import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_ztrl.config.schema import EvalConfig, LoggingConfig
from megatron_ztrl.evaluation_schedule import EvaluationSchedule
from megatron_ztrl.observability.metrics import MetricsLogger
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.rollout_log import RolloutLog
from megatron_ztrl.types import Prompt, Rollout

LOGGING = LoggingConfig(tensorboard=False)
PROMPT = Prompt(prompt_id="p", problem="", text="", ground_truth="", data_source="d")


class Gated:
    """Stands in for an `Evaluator`: an evaluation takes until the test opens its gate."""

    identity = "settings"

    def __init__(self, directory, **settings):
        self.config = SimpleNamespace(
            run=SimpleNamespace(directory=str(directory)),
            train=SimpleNamespace(num_steps=10),
            logging=LOGGING,
            eval=EvalConfig(interval_steps=2, env_iterations=[0, 2], interval_env_iterations=[2], **settings),
        )
        self.gate = asyncio.Event()
        self.begun = []
        self.versions = [0, 0]

    async def evaluate(self, env_iterations, *, journal, beside):
        self.begun.append((env_iterations, beside))
        await self.gate.wait()
        rollout = Rollout(
            rollout_id="0.0",
            prompt=PROMPT,
            prompt_ids=[],
            token_ids=[1] * len(self.versions),
            loss_mask=[True] * len(self.versions),
            weight_versions=self.versions,
        )
        return {"d/accuracy": 0.5}, [rollout]


class Run:
    """One life of a run: schedule and logs."""

    def __init__(self, directory, *, restored=None, **settings):
        self.evaluator = Gated(directory, **settings)
        self._path = directory / "metrics.jsonl"
        metrics = MetricsLogger(directory, LOGGING, restored_step=restored)
        log = RolloutLog(directory, str)
        progress = Progress(10, console=Console(file=io.StringIO()))
        self.schedule = EvaluationSchedule(
            self.evaluator, metrics, log, progress, restored_version=restored or 0
        )

    def rows(self):
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def logged(self):
        return [(row["step"], row["env_iterations"]) for row in self.rows()]


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_training_waits_for_the_first_and_the_last_evaluation_and_for_no_other(tmp_path):
    run = Run(tmp_path, beside_steps=1)
    for version, waits in ((0, True), (2, False), (10, True)):
        run.evaluator.gate.clear()
        start = asyncio.create_task(run.schedule.start_if_due(version))
        await settle()
        assert start.done() is not waits
        run.evaluator.gate.set()
        await start
        await run.schedule.finish()
    assert run.logged() == [(0, 0), (0, 2), (2, 2), (10, 0), (10, 2)]
    assert run.evaluator.begun == [(0, False), (2, False), (2, True), (0, False), (2, False)]


async def test_training_waits_for_every_evaluation_if_none_may_run_beside_it(tmp_path):
    run = Run(tmp_path)
    start = asyncio.create_task(run.schedule.start_if_due(4))
    await settle()
    assert not start.done()
    run.evaluator.gate.set()
    await start
    assert run.logged() == [(4, 2)]


async def test_nothing_is_due_between_the_intervals_or_with_an_interval_of_0(tmp_path):
    run = Run(tmp_path)
    await run.schedule.start_if_due(3)
    assert run.evaluator.begun == []


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_the_publish_of_one_version_too_many_waits(tmp_path, steps):
    run = Run(tmp_path, beside_steps=steps)
    await run.schedule.start_if_due(2)
    for version in range(3, 2 + steps):
        await run.schedule.wait_before_publish(version)  # returns while the evaluation runs
    last = asyncio.create_task(run.schedule.wait_before_publish(2 + steps))
    await settle()
    assert not last.done()
    run.evaluator.versions = [2, -1, 1 + steps]
    run.evaluator.gate.set()
    await last
    [row] = run.rows()
    assert (row["step"], row["eval/oldest_version"], row["eval/newest_version"]) == (2, 2, 1 + steps)


async def test_what_was_running_at_the_checkpoint_is_evaluated_once_after_a_resume(tmp_path):
    first = Run(tmp_path, beside_steps=3)
    await first.schedule.start_if_due(2)
    await first.schedule.start_if_due(4)
    assert first.schedule.unfinished() == [2, 4]  # in the checkpoint of version 4
    await first.schedule.stop()
    second = Run(tmp_path, restored=4, beside_steps=3)
    second.schedule.restart([2, 4])
    await second.schedule.start_if_due(4)  # the loop asks again; it runs already
    second.evaluator.gate.set()
    await second.schedule.finish()
    assert sorted(second.logged()) == [(2, 2), (4, 2)]
    third = Run(tmp_path, restored=4, beside_steps=3)
    third.schedule.restart([2, 4])
    await third.schedule.finish()
    assert third.evaluator.begun == []


async def test_whoever_stops_waiting_for_an_evaluation_does_not_end_it(tmp_path):
    first = Run(tmp_path)
    waiting = asyncio.create_task(first.schedule.start_if_due(0))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert first.schedule.unfinished() == [0]  # it runs: what the engines have sampled can still be kept
    await first.schedule.stop()
    assert first.schedule.unfinished() == []


@pytest.mark.parametrize("version", [0, 10])
async def test_after_a_resume_training_waits_as_it_did_for_an_evaluation_that_was_under_way(
    tmp_path, version
):
    run = Run(tmp_path, restored=version, beside_steps=3)
    run.schedule.restart([version])
    start = asyncio.create_task(run.schedule.start_if_due(version))
    await settle()
    assert run.evaluator.begun == [(0, False)]  # with all engines
    assert not start.done()
    run.evaluator.gate.set()
    await start
    assert run.logged() == [(version, 0), (version, 2)]


async def test_a_sweep_that_was_cut_short_goes_on_with_the_values_of_n_that_are_missing(tmp_path):
    MetricsLogger(tmp_path, LOGGING).log({}, step=0, split="eval", env_iterations=0)
    run = Run(tmp_path, restored=0)
    run.evaluator.gate.set()
    await run.schedule.start_if_due(0)
    assert run.evaluator.begun == [(2, False)]


async def test_journals_of_policies_that_the_resume_undoes_are_removed(tmp_path):
    journals = tmp_path / "journal" / "eval"
    for name in ("000004_N2", "000006_N2", "000002_N2"):
        (journals / name).mkdir(parents=True)
    MetricsLogger(tmp_path, LOGGING).log({}, step=2, split="eval", env_iterations=2)
    Run(tmp_path, restored=4)
    assert [path.name for path in journals.iterdir()] == ["000004_N2"]  # 2 is logged, 6 is no more


async def test_an_evaluation_that_fails_ends_the_run(tmp_path):
    run = Run(tmp_path, beside_steps=2)

    async def fail(*args, **kwargs):
        raise ConnectionError("engine died")

    run.evaluator.evaluate = fail
    await run.schedule.start_if_due(2)
    await settle()
    with pytest.raises(ConnectionError, match="engine died"):
        await run.schedule.wait_before_publish(3)
