"""The comparison of log-probs after a publish: rollouts do not wait for it, whatever lasts does."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ztrl.config.schema import Config, DataConfig, DatasetConfig, ModelConfig, RunConfig, TrainConfig
from megatron_ztrl.runtime.engines import RunEngines
from megatron_ztrl.runtime.processes import ProcessTable
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.runtime.system import System
from megatron_ztrl.weights.publish import PublishReport
from megatron_ztrl.weights.verify import PublishError

CONFIG = Config(
    run=RunConfig(directory="none"),
    model=ModelConfig(path="none"),
    data=DataConfig(train=DatasetConfig(name="none", path="none")),
    train=TrainConfig(num_steps=1),
)


class Slot:
    """An `EngineSlot` in memory, whose engine answers."""

    def __init__(self, index):
        self.name = f"engine {index}"
        self.client = SimpleNamespace(url=f"http://{index}")
        self.usable = True
        self.serves = False
        self.condemned = None

    def serve(self):
        self.serves = True

    def condemn(self, reason):
        self.condemned = reason


class Publisher:
    """Delivers at once; the comparison waits for ``may_verify``, and finds what ``outcome`` makes of the report."""

    def __init__(self):
        self.may_verify = asyncio.Event()
        self.outcome = lambda report: report

    async def deliver(self, version, engines):
        return PublishReport(
            version=version,
            pause_seconds=0.0,
            transfer_seconds=0.0,
            stream_seconds=None,
            updated=engines,
        )

    async def verify(self, report):
        await self.may_verify.wait()
        return self.outcome(report)


class Actor:
    def __init__(self):
        self.saved = False

    async def save_checkpoint(self, directory):
        self.saved = True


@pytest.fixture
def run(tmp_path):
    """Two engines and a publisher, to be used under a supervisor."""
    engines = RunEngines(CONFIG, tmp_path, ProcessTable(tmp_path), note=lambda line: None)
    publisher, actor = Publisher(), Actor()
    rollouts = SimpleNamespace(engines=engines, config=CONFIG)
    system = System(rollouts=rollouts, actor=actor, critic=None, reference=None)

    def begin(supervisor):
        engines.supervise(supervisor, publisher)
        engines.slots.update({index: Slot(index) for index in range(2)})

    return SimpleNamespace(engines=engines, publisher=publisher, actor=actor, system=system, begin=begin)


async def everything_that_can_run():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_rollouts_go_on_while_the_next_step_and_a_checkpoint_wait_for_the_comparison(run):
    async with Supervisor(note=print) as supervisor:
        run.begin(supervisor)
        await run.system.publish(1)
        assert all(slot.serves for slot in run.engines.slots.values())
        changing = asyncio.create_task(run.engines.before_actor_changes())
        saving = asyncio.create_task(run.system.save_checkpoint(Path("none")))
        await everything_that_can_run()
        assert not changing.done()
        assert not run.actor.saved
        run.publisher.may_verify.set()
        await asyncio.gather(changing, saving)
        assert run.actor.saved


def differs(report):
    raise PublishError(f"version {report.version}: differs")


async def test_a_difference_ends_the_run_before_the_actor_changes(run):
    changed = False

    async def train():
        nonlocal changed
        async with Supervisor(note=print) as supervisor:
            run.begin(supervisor)
            await run.system.publish(7)
            run.publisher.may_verify.set()
            await run.engines.before_actor_changes()
            changed = True

    run.publisher.outcome = differs
    with pytest.raises(PublishError, match="version 7: differs"):
        await train()
    assert not changed


async def test_a_difference_ends_a_run_that_waits_for_its_rollouts(run):
    async def wait_for_rollouts():
        async with asyncio.timeout(10), Supervisor(note=print) as supervisor:
            run.begin(supervisor)
            await run.system.publish(7)
            run.publisher.may_verify.set()
            await asyncio.Event().wait()

    run.publisher.outcome = differs
    with pytest.raises(PublishError, match="version 7: differs"):
        await wait_for_rollouts()


async def test_an_engine_that_fails_in_the_comparison_is_replaced_and_the_others_go_on(run):
    run.publisher.outcome = lambda report: replace(
        report, updated=report.updated[1:], lost={"http://0": "HTTP 500"}
    )
    run.publisher.may_verify.set()
    async with Supervisor(note=print) as supervisor:
        run.begin(supervisor)
        await run.system.publish(3)
        await run.engines.before_actor_changes()
        first, second = run.engines.slots.values()
        assert first.condemned == "engine 0 did not take version 3: HTTP 500"
        assert second.condemned is None
