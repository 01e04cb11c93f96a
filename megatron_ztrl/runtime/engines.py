"""The engines of a run: started, watched, replaced, kept at the actor's weights, made more or fewer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.client import EngineClient, EngineError, EngineUnreachable
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.trajectory import Engine as RolloutEngine
from megatron_ztrl.runtime.cluster import node_address
from megatron_ztrl.runtime.processes import ProcessTable
from megatron_ztrl.runtime.services import Engine, HostedServer, Started
from megatron_ztrl.runtime.supervision import Supervisor
from megatron_ztrl.weights.publish import PublishReport, WeightPublisher
from megatron_ztrl.weights.verify import PublishError

HEALTH_INTERVAL_SECONDS = 30.0
HEALTH_ANSWER_SECONDS = 25.0
"""SGLang itself gives up after 20."""
LONGEST_FAREWELL_SECONDS = 60.0


class RunEngines:
    """The engines, and ``fleet``, which gives them to rollouts.

    An engine that died, and one that was added, starts with the weights of ``model.path``. So it joins the fleet
    only when a publish has brought it to the actor's weights: the loop's next one or, where the actor does not
    change meanwhile (the loop waits for rollouts, or evaluates), one for the newcomers alone, which the others do
    not notice.

    Args:
        config: The run.
        logs: Directory for ``engine<i>.log``.
        processes: Learns about every engine.
        note: Tells the user.
    """

    def __init__(
        self, config: Config, logs: Path, processes: ProcessTable, note: Callable[[str], None]
    ) -> None:
        self.fleet = EngineFleet(
            max_concurrent_per_engine=config.engine.max_running_requests, on_unreachable=self._look_at
        )
        self.config = config
        self.logs = logs
        self.processes = processes
        self._note = note
        self.slots: dict[int, EngineSlot] = {}
        self.supervisor: Supervisor | None = None
        self._publisher: WeightPublisher | None = None
        self.publishing = asyncio.Lock()
        self.publishes = 0
        self._scaling = asyncio.Lock()
        self.arrival = asyncio.Event()
        self._version: int | None = None
        """Of the last publish; None before the first."""
        self._actor_changed = False
        """Since the last publish."""
        self._verification: asyncio.Task[None] | None = None
        """Of the last publish."""
        self._outage = asyncio.Event()
        """Set while no engine serves."""

    @property
    def clients(self) -> list[EngineClient]:
        """Of the engines that answer, whatever weights they have."""
        return [slot.client for slot in self.slots.values() if slot.client is not None]

    async def start(self) -> None:
        """Starts ``engine.count`` engines. Rollouts have none of them yet."""
        slots = [self._new_slot(index) for index in range(self.config.engine.count)]
        started = await asyncio.gather(*(slot.server.start() for slot in slots))
        for slot, each in zip(slots, started, strict=True):
            slot.came_up(each)

    async def stop(self) -> None:
        """Stops all engines."""
        await asyncio.gather(*(slot.stop() for slot in self.slots.values()))

    def supervise(self, supervisor: Supervisor, publisher: WeightPublisher | None) -> None:
        """Watches the engines from now on, and gives them to rollouts once they have the right weights.

        Args:
            supervisor: Notices deaths.
            publisher: Brings them the actor's weights. None: those of ``model.path`` are right.
        """
        self.supervisor = supervisor
        self._publisher = publisher
        for slot in self.slots.values():
            slot.watcher = supervisor.watch(slot)
        supervisor.spawn(self._bring_in_newcomers())

    async def publish(self, version: int) -> PublishReport:
        """Brings every engine to the actor's weights; waits for one where there is none.

        Rollouts go on when this returns. Their log-probs are compared with the actor's meanwhile: `verified`.

        Raises:
            PublishError: The actor failed, or its weights must not reach an engine.
        """
        assert self._publisher is not None and self.supervisor is not None
        await self.verified()
        deliver = self._publisher.deliver
        async with self.publishing:
            while (
                report := await self._publish_to(await self._some_that_answer(), version, deliver)
            ) is None:
                pass  # those that it was lost on are dead, so this comes to an end
            self._version, self._actor_changed = version, False
            self._verification = self.supervisor.spawn(self._verify(report))
            return report

    async def verified(self) -> None:
        """Returns when the engines are known to sample from the weights that the last publish sent them.

        Await it before anything lasting is made of their tokens.

        Raises:
            PublishError: They do not. The supervisor ends the run with it in any case.
        """
        if self._verification is not None:
            await asyncio.wait({self._verification})  # whoever stops waiting does not stop the comparison
            self._verification.result()

    async def before_actor_changes(self) -> None:
        """Call it before the actor's weights change: until the next publish they are nobody's.

        Raises:
            PublishError: See `verified`.
        """
        await self.verified()
        async with self.publishing:
            self._actor_changed = True

    async def while_any_serves(self, work: Awaitable[None]) -> None:
        """Waits for ``work``, which goes on, but only while rollouts have engines.

        For whoever wants to wait for rollouts before the next publish: without that publish nothing would ever
        serve again, once the last engine with the weights of the one before has died.
        """
        working = asyncio.ensure_future(work)
        outage = asyncio.create_task(self._outage.wait())
        await asyncio.wait({working, outage}, return_when=asyncio.FIRST_COMPLETED)
        outage.cancel()
        if working.done():
            working.result()

    async def interrupt(self) -> None:
        """Ends all calls of rollouts, which get what has been sampled, and begins no more: before a run stops."""
        await self.verified()
        serving = set(self.fleet.engines)
        await asyncio.gather(*(self._empty(client) for client in self.clients if client in serving))

    async def scale(self, count: int) -> None:
        """Makes it ``count`` engines. Rollouts on one that goes keep their tokens and move to another.

        Returns when those that are too many have ended. New ones serve when they have started and have the
        current weights.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"a run needs at least one engine, got {count}")
        assert self.supervisor is not None, "supervise() first"
        async with self._scaling:
            while len(self.slots) < count:
                slot = self._new_slot(next(i for i in range(count) if i not in self.slots))
                slot.watcher = self.supervisor.watch(slot, started=False)
            while len(self.slots) > count:
                # One that has no rollouts yet before those that have, else the youngest.
                await self._remove(max(self.slots.values(), key=lambda slot: (not slot.serves, slot.index)))

    async def _remove(self, slot: EngineSlot) -> None:
        assert slot.watcher is not None
        slot.watcher.cancel()
        await asyncio.wait({slot.watcher})
        async with self.publishing:
            await self.verified()  # no publish can begin now, so none asks the engine that is emptied
            del self.slots[slot.index]
            if slot.client is not None:
                await self._empty(slot.client)
            await slot.stop()
        self._note(f"{slot.name} has left the run")

    async def _empty(self, client: EngineClient) -> None:
        """Has an engine return the tokens that it has sampled."""
        try:
            async with asyncio.timeout(LONGEST_FAREWELL_SECONDS):
                drained = asyncio.create_task(self.fleet.drain(client))
                await client.abort_in_flight()
                await drained
        except (TimeoutError, EngineUnreachable):  # it hangs, or died just now
            self.fleet.abandon(client)

    async def _bring_in_newcomers(self) -> None:
        while True:
            await self.arrival.wait()
            self.arrival.clear()
            async with self.publishing:
                newcomers = [slot for slot in self.slots.values() if slot.usable and not slot.serves]
                if self._publisher is None:
                    for slot in newcomers:
                        slot.serve()
                elif newcomers and self._version is not None and not self._actor_changed:
                    await self._publish_to(newcomers, self._version, self._publisher.publish)

    async def _some_that_answer(self) -> list[EngineSlot]:
        while not (slots := [slot for slot in self.slots.values() if slot.usable]):
            self.arrival.clear()
            await self.arrival.wait()
        return slots

    async def _publish_to(
        self,
        slots: Sequence[EngineSlot],
        version: int,
        publish: Callable[[int, Sequence[EngineClient]], Awaitable[PublishReport]],
    ) -> PublishReport | None:
        """Publishes to these engines only; the others do not notice. Those that have the weights then serve.

        Returns:
            None when none has, because it was lost; the others are as they were.
        """
        clients = [slot.client for slot in slots if slot.client is not None]
        self.publishes += 1
        try:
            report = await publish(version, clients)
        except PublishError as error:
            if not error.lost:  # then it is not for want of engines
                raise
            self._condemn(clients, error.lost, version)
            return None
        self._condemn(clients, {**report.lost, **report.untouched}, version)
        for slot in slots:
            if slot.client in report.updated:  # else it died, and is replaced already
                slot.serve()
        return report

    async def _verify(self, report: PublishReport) -> None:
        assert self._publisher is not None
        try:
            lost = (await self._publisher.verify(report)).lost
        except PublishError as error:
            if not error.lost:
                raise
            lost = error.lost
        self._condemn(report.updated, lost, report.version)

    def _condemn(self, clients: Sequence[EngineClient], lost: Mapping[str, str], version: int) -> None:
        """Has those of the engines replaced that a publish lost, unless they are already."""
        for slot in self.slots.values():
            if slot.client is not None and slot.client in clients and slot.client.url in lost:
                slot.condemn(f"{slot.name} did not take version {version}: {lost[slot.client.url]}")

    def note_outage(self) -> None:
        """Some engine begins to serve, or serves no more."""
        if any(slot.serves for slot in self.slots.values()):
            self._outage.clear()
        else:
            self._outage.set()

    def _new_slot(self, index: int) -> EngineSlot:
        slot = self.slots[index] = EngineSlot(self, index)
        return slot

    def _look_at(self, engine: RolloutEngine) -> None:
        for slot in self.slots.values():
            if slot.client is engine:
                slot.look.set()


class EngineSlot:
    """A place for an engine, with its GPUs, where one server follows the other. A `supervision.Charge`."""

    def __init__(self, run: RunEngines, index: int) -> None:
        config, log_path = run.config, run.logs / f"engine{index}.log"
        self.name = f"engine {index}"
        self.index = index
        self.max_restarts = config.engine.max_restarts
        self.server = HostedServer(
            lambda _: Engine(
                lambda: EngineServer(config, index=index, log_path=log_path, host=node_address())
            ),
            gpus=config.engine.tensor_parallel_size,
        )
        self.client: EngineClient | None = None
        """None while no server answers."""
        self.serves = False
        """Whether rollouts use it: it has the right weights."""
        self.look = asyncio.Event()
        """Set it to have the engine looked at now."""
        self.watcher: asyncio.Task[None] | None = None
        self._run = run
        self._condemned: str | None = None

    @property
    def usable(self) -> bool:
        """Whether a server answers that nobody has condemned."""
        return self.client is not None and self._condemned is None

    def came_up(self, started: Started) -> None:
        """A server answers; it has the weights of ``model.path``."""
        config = self._run.config
        self.client = EngineClient(started.url, request_timeout_seconds=config.engine.request_timeout_seconds)
        self._condemned = None
        self._run.processes.update(self.name, **started._asdict(), state="waits for weights")
        self._run.arrival.set()

    def serve(self) -> None:
        """Gives it to rollouts: it has the right weights."""
        assert self.client is not None
        self._run.fleet.add(self.client)
        if not self.serves:
            self.serves = True
            self._run.note_outage()
            self._run.processes.update(self.name, state="serves")

    def condemn(self, reason: str) -> None:
        """Has it replaced; it samples no more from now on."""
        assert self.client is not None
        self._run.fleet.abandon(self.client)
        self.serves = False
        self._run.note_outage()
        self._condemned = reason
        self.look.set()

    async def fails(self) -> str:
        """Returns when it is condemned, or has answered no health check for too long.

        During a publish it samples nothing, and is only asked whether it is there: a publish does not end before an
        engine that hangs is replaced.
        """
        limit_seconds = self._run.config.engine.health_timeout_seconds
        healthy_at = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(HEALTH_INTERVAL_SECONDS, limit_seconds / 4)):
                    await self.look.wait()
            self.look.clear()
            if self._condemned is not None:
                return self._condemned
            publishes, paused = self._run.publishes, self._run.publishing.locked()
            if await self._answers(paused):
                healthy_at = time.monotonic()
                if self.serves and not paused:
                    self.serve()  # again, if a connection broke
            elif not paused and publishes != self._run.publishes:  # it was paused meanwhile
                healthy_at = time.monotonic()
            elif time.monotonic() - healthy_at > limit_seconds:
                return f"{self.name} has answered no health check for {limit_seconds:.0f} s"

    async def _answers(self, paused: bool) -> bool:
        assert self.client is not None
        limit_seconds = min(HEALTH_ANSWER_SECONDS, self._run.config.engine.health_timeout_seconds)
        try:
            async with asyncio.timeout(limit_seconds):
                if not paused:
                    return await self.client.healthy()
                await self.client.weight_version()  # which the server says without its scheduler
                return True
        except (TimeoutError, EngineError):
            return False

    def went_down(self) -> None:
        """Its rollouts move, and whoever waits for an answer waits no more."""
        assert self.client is not None and self._run.supervisor is not None
        self._run.fleet.abandon(self.client)
        self._run.supervisor.spawn(self.client.close())
        self.client, self.serves = None, False
        self._run.note_outage()
        self._run.processes.update(self.name, state="starts")
        self._run.processes.count_restart(self.name)

    def give_up(self) -> bool:
        """Whether there are other engines."""
        assert self._run.supervisor is not None
        del self._run.slots[self.index]
        self._run.supervisor.spawn(self.stop())
        return bool(self._run.slots)

    async def stop(self) -> None:
        """Ends it for good."""
        if self.client is not None:
            await self.client.close()
        await self.server.stop()
        self._run.processes.remove(self.name)
