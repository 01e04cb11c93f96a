"""Shard to shard: every engine rank receives exactly its slices, from the trainer ranks or the engine before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.client import EngineClient, EngineError
from megatron_ztrl.engines.server import WEIGHT_LOADER
from megatron_ztrl.engines.weight_group import FORMING, WeightGroup, close_gate, why_not_formed
from megatron_ztrl.engines.weight_receiver import commit_message, receive_message
from megatron_ztrl.engines.weight_stream import Link, Piece, schedule
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.fp8_blocks import travelling_dtypes, with_scale_shapes, with_scales
from megatron_ztrl.weights.reshard import PublishPlan, plan
from megatron_ztrl.weights.sender import SendReport
from megatron_ztrl.weights.transports import Delivery, Network, TrainerDied

GRACE_SECONDS = 15.0
"""How long the others may take to notice that one has failed."""


class SendingWorld(Protocol):
    """What this transport needs of the trainer; every call reaches all ranks."""

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        """What each rank holds."""
        ...

    async def join_weight_group(self, group: WeightGroup, links: Sequence[Sequence[Link]]) -> None:
        """Run ``WeightSender.join`` in each rank, with what it sends; returns when the group is complete."""
        ...

    async def send_weights(self, publish: int) -> list[SendReport]:
        """Run ``WeightSender.send`` in each rank."""
        ...


class ShardTransport:
    """The driver's end: plans, forms the weight group, and finds out what became of everyone.

    Args:
        config: reads ``model.dtype`` and ``publish``.
        actor: the trainer.
        engine_ranks: per tensor-parallel rank of an engine, what it needs.
        shapes: of the Hugging Face tensors.
        network: between them; the driver keeps the meeting point.
        fp8_blocks: the engines hold linear weights in block-wise FP8.

    Raises:
        ValueError: ``publish.bucket_bytes`` is too small for this model, or an engine's slice cuts FP8 blocks.
    """

    def __init__(
        self,
        config: Config,
        actor: SendingWorld,
        engine_ranks: Sequence[list[TensorSlice]],
        shapes: Mapping[str, tuple[int, ...]],
        network: Network,
        *,
        fp8_blocks: bool = False,
    ) -> None:
        self._config = config
        self._actor = actor
        self._fp8_blocks = fp8_blocks
        self._dtypes = dict.fromkeys(shapes, str(config.model.dtype))
        if fp8_blocks:
            engine_ranks = [
                with_scales(slices, shapes, f"engine rank {rank}", "engine.tensor_parallel_size")
                for rank, slices in enumerate(engine_ranks)
            ]
            shapes = with_scale_shapes(shapes)
            self._dtypes = travelling_dtypes(shapes, config.model.dtype)
        self._engine_ranks = engine_ranks
        self._shapes = shapes
        self._network = network
        self._store: dist.TCPStore | None = None
        self._generation = 0
        self._joined: _Joined | None = None
        for slices in engine_ranks:  # as both ends will, who could not say so as clearly
            link = Link(0, 0, None, tuple(self._piece(item) for item in slices))
            schedule([link], config.publish.bucket_bytes)

    async def close(self) -> None:
        """Give up the meeting point; the group's members stay connected to each other."""
        self._joined = self._store = None

    async def deliver(self, engines: Sequence[EngineClient], version: int) -> Delivery:
        """Send to all engines; those that a dead one kept from being served are served again without it."""
        total = Delivery()
        waiting = list(engines)
        while waiting:
            attempt = await self._attempt(waiting, version)
            total.complete += attempt.complete
            total.lost |= attempt.lost
            total.received_bytes |= attempt.received_bytes
            total.sent_bytes = total.sent_bytes or attempt.sent_bytes
            total.stream_seconds = (total.stream_seconds or 0.0) + attempt.stream_seconds
            waiting = [engine for engine in waiting if engine in attempt.reasons]
            if attempt.trainer_error is None and attempt.lost:
                continue  # with fewer than before
            total.trainer_error = attempt.trainer_error
            for engine in waiting:
                fate = total.untouched if engine in attempt.untouched else total.lost
                fate[engine] = attempt.reasons[engine]
            break
        return total

    async def commit(self, engine: EngineClient, version: int) -> None:
        messages = [commit_message(version)] * len(self._engine_ranks)
        await engine.load_weights(messages, loader=WEIGHT_LOADER, version=version)

    async def _attempt(self, engines: Sequence[EngineClient], version: int) -> _Attempt:
        """One run of both ends. Any failure ends the group's membership."""
        joined, invitations = self._joined, None
        if joined is None or joined.engines != list(engines):
            published = plan(await self._held(), self._engine_ranks, len(engines), self._shapes)
            joined = _Joined(self._new_group(published), published, list(engines))
            invitations = published.receiver_links(self._dtypes)
        self._joined = None
        attempt = _Attempt(
            joined, joined.publishes, dist.PrefixStore(joined.group.name, self._meeting_point())
        )
        joined.publishes += 1
        sending = self._send(joined, attempt.publish, join=invitations is not None)
        receiving = [
            engine.load_weights(
                self._messages(joined, attempt.publish, version, index, invitations),
                loader=WEIGHT_LOADER,
                version=None,  # what has arrived is committed later
            )
            for index, engine in enumerate(engines)
        ]
        await attempt.run(sending, receiving)
        if attempt.intact:
            self._joined = joined
        return attempt

    async def _held(self) -> list[list[TensorSlice]]:
        """What each trainer rank holds, or can make of what it holds."""
        held = await self._actor.parameter_slices()
        if not self._fp8_blocks:
            return held
        setting = "actor.tensor_parallel_size"
        return [
            with_scales(slices, self._shapes, f"trainer rank {rank}", setting)
            for rank, slices in enumerate(held)
        ]

    def _piece(self, item: TensorSlice) -> Piece:
        shape = self._shapes[item.tensor]
        block = (*shape[: item.dim], item.length, *shape[item.dim + 1 :])
        return Piece(item.tensor, item.param, item.dim, item.start, block, self._dtypes[item.tensor])

    async def _send(self, joined: _Joined, publish: int, *, join: bool) -> list[SendReport]:
        if join:
            await self._actor.join_weight_group(joined.group, joined.plan.sender_links(self._dtypes))
        return await self._actor.send_weights(publish)

    def _messages(
        self,
        joined: _Joined,
        publish: int,
        version: int,
        engine: int,
        invitations: Sequence[Sequence[Sequence[Link]]] | None,
    ) -> list[str]:
        ranks = range(len(self._engine_ranks))
        group = joined.group
        if invitations is None:
            return [receive_message(group.name, publish, version)] * len(ranks)
        return [
            receive_message(
                group.name,
                publish,
                version,
                (group, joined.plan.group_rank(engine, rank), invitations[engine][rank]),
            )
            for rank in ranks
        ]

    def _meeting_point(self) -> dist.TCPStore:
        if self._store is None:  # the driver keeps it, on a port that the system picks
            self._store = dist.TCPStore(self._network.address, 0, is_master=True, wait_for_workers=False)
        return self._store

    def _new_group(self, published: PublishPlan) -> WeightGroup:
        self._generation += 1
        return WeightGroup(
            name=f"weights-{self._generation}",
            address=self._network.address,
            port=self._meeting_point().port,
            world_size=published.world_size,
            backend=self._network.backend,
            bucket_bytes=self._config.publish.bucket_bytes,
            checksums=self._config.publish.checksums,
            timeout_seconds=self._network.timeout_seconds,
        )


class _Joined:
    """A weight group and its members."""

    def __init__(self, group: WeightGroup, plan: PublishPlan, engines: list[EngineClient]) -> None:
        self.group = group
        self.plan = plan
        self.engines = engines
        self.publishes = 0


class _Attempt:
    """One publish through one group, and what became of each engine."""

    def __init__(self, joined: _Joined, publish: int, store: dist.Store) -> None:
        self.publish = publish
        self.complete: list[EngineClient] = []
        self.lost: dict[EngineClient, str] = {}
        self.reasons: dict[EngineClient, str] = {}
        """Why an engine that lives has not got everything."""
        self.untouched: set[EngineClient] = set()
        self.trainer_error: str | None = None
        self.sent_bytes: list[int] = []
        self.received_bytes: dict[str, list[int]] = {}
        self.stream_seconds = 0.0
        self._joined = joined
        self._store = store

    @property
    def intact(self) -> bool:
        """Whether the group can be used again."""
        return len(self.complete) == len(self._joined.engines) and self.trainer_error is None

    async def run(
        self,
        sending: Coroutine[Any, Any, list[SendReport]],
        receiving: Sequence[Coroutine[Any, Any, None]],
    ) -> None:
        """Run both ends to their end; when one fails, the others are told, and have a little time."""
        sender = asyncio.create_task(sending)
        receivers = [asyncio.create_task(call) for call in receiving]
        try:
            running: set[asyncio.Task[Any]] = {sender, *receivers}
            deadline: float | None = None
            clock = asyncio.get_running_loop().time
            while running and (deadline is None or clock() < deadline):
                timeout = None if deadline is None else deadline - clock()
                done, running = await asyncio.wait(
                    running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                )
                problems = [problem for task in done if (problem := _problem(task))]
                if problems and deadline is None:
                    self._end(problems[0])
                    deadline = clock() + GRACE_SECONDS
            self._end("done")
        finally:
            for task in (sender, *receivers):
                task.cancel()
            await asyncio.gather(sender, *receivers, return_exceptions=True)
        self._judge_trainer(sender)
        for index, task in enumerate(receivers):
            self._judge_engine(index, task)

    def _end(self, verdict: str) -> None:
        """Tell everyone who waits at a gate, or inside NCCL, that there is nothing to wait for."""
        for gate in (*FORMING, self._joined.group.gate(self.publish)):
            close_gate(self._store, gate, verdict)
        self._store.compare_set(f"{self.publish}/over", "", verdict)

    def _judge_trainer(self, sender: asyncio.Task[list[SendReport]]) -> None:
        if sender.cancelled():
            self.trainer_error = (
                f"the trainer did not notice within {GRACE_SECONDS:.0f} s that an engine failed"
            )
        elif isinstance(error := sender.exception(), TrainerDied):
            raise error
        elif error is not None:
            self.trainer_error = f"{type(error).__name__}: {error}"
        else:
            self.sent_bytes = [report.sent_bytes for report in sender.result()]

    def _judge_engine(self, index: int, task: asyncio.Task[None]) -> None:
        engine = self._joined.engines[index]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, EngineError):
            self.lost[engine] = str(error)
        elif error is not None:
            raise error
        elif task.cancelled():
            self.lost[engine] = f"{engine.url} did not answer within {GRACE_SECONDS:.0f} s of a failure"
        else:
            self._read_reports(index, engine)

    def _read_reports(self, index: int, engine: EngineClient) -> None:
        ranks = range(self._joined.plan.ranks_per_engine)
        keys = [f"{self.publish}/report/{self._joined.plan.group_rank(index, rank)}" for rank in ranks]
        reports = [json.loads(self._store.get(key)) if self._store.check([key]) else {} for key in keys]
        for key in keys:
            self._store.delete_key(key)
        self.received_bytes[engine.url] = [report.get("received_bytes", 0) for report in reports]
        self.stream_seconds = max(self.stream_seconds, *(r.get("stream_seconds", 0.0) for r in reports))
        if all(report.get("complete") for report in reports):
            self.complete.append(engine)
            return
        reasons = [report["error"] for report in reports if "error" in report]
        self.reasons[engine] = (
            "; ".join(reasons)
            or why_not_formed(self._store)
            or f"{engine.url} is in no weight group: it could not join it, or was started after it"
        )
        if not any(report.get("begun") for report in reports):
            self.untouched.add(engine)


def _problem(task: asyncio.Task[Any]) -> str | None:
    """Why a finished end has failed, if it has."""
    if task.cancelled():
        return "cancelled"
    if (error := task.exception()) is not None:
        return str(error)
    reports = task.result() or []
    return next((report.broken for report in reports if report.broken), None)
