"""The stock SGLang way: one trainer rank gathers whole tensors and broadcasts them to all engine ranks.

For servers that cannot load our weight loader. Every engine rank receives the whole model, and keeps its part.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.client import EngineClient, EngineError
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.broadcaster import BroadcastGroup, TensorBucket
from megatron_ztrl.weights.reshard import Transfer, plan
from megatron_ztrl.weights.transports import Delivery, Network, TrainerDied

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class BroadcastingWorld(Protocol):
    """What this transport needs of the trainer; every call reaches all ranks."""

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        """What each rank holds."""
        ...

    async def join_broadcast_group(self, group: BroadcastGroup) -> None:
        """Run ``WeightBroadcaster.join`` in each rank."""
        ...

    async def broadcast_weights(self, buckets: Sequence[TensorBucket]) -> list[int]:
        """Run ``WeightBroadcaster.send`` in each rank."""
        ...


class BroadcastTransport:
    """The driver's end.

    A collective has no survivors: an engine that fails takes with it all that had not finished.

    Args:
        config: reads ``model.dtype``, ``engine.tensor_parallel_size`` and ``publish.bucket_bytes``.
        actor: the trainer.
        shapes: of the Hugging Face tensors.
        network: between them; the driver keeps the meeting point.
    """

    def __init__(
        self,
        config: Config,
        actor: BroadcastingWorld,
        shapes: Mapping[str, tuple[int, ...]],
        network: Network,
    ) -> None:
        self._config = config
        self._actor = actor
        self._shapes = shapes
        self._network = network
        self._store: dist.TCPStore | None = None
        self._generation = 0
        self._group: BroadcastGroup | None = None
        self._engines: list[EngineClient] = []
        self._buckets: list[TensorBucket] = []

    async def close(self) -> None:
        """Give up the meeting point."""
        self._group = self._store = None

    async def deliver(self, engines: Sequence[EngineClient], version: int) -> Delivery:
        """Gather, broadcast and load one bucket after the other."""
        delivery = Delivery()
        if self._group is None or self._engines != list(engines):
            self._group = None
            await self._join(engines, delivery)
        group, self._group = self._group, None
        if group is None:
            return delivery
        sent, *loaded = await asyncio.gather(
            self._actor.broadcast_weights(self._buckets),
            *(self._load(engine, group, version) for engine in engines),
            return_exceptions=True,
        )
        for engine, outcome in zip(engines, loaded, strict=True):
            if isinstance(outcome, EngineError):
                delivery.lost[engine] = str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                delivery.complete.append(engine)
                model_bytes = sum(map(math.prod, self._shapes.values())) * _ITEM_BYTES[group.dtype]
                delivery.received_bytes[engine.url] = [model_bytes] * self._config.engine.tensor_parallel_size
        if isinstance(sent, TrainerDied):
            raise sent
        if isinstance(sent, BaseException):
            delivery.trainer_error = f"{type(sent).__name__}: {sent}"
        else:
            delivery.sent_bytes = list(sent or ())
        if not delivery.lost and delivery.trainer_error is None:
            self._group = group
        return delivery

    async def commit(self, engine: EngineClient, version: int) -> None:
        """Nothing is left to do: the last bucket carried the version."""

    async def _load(self, engine: EngineClient, group: BroadcastGroup, version: int) -> None:
        for bucket in self._buckets:
            await engine.load_broadcast(
                group.name,
                bucket.names,
                bucket.shapes,
                dtype=group.dtype,
                version=version if bucket is self._buckets[-1] else None,
            )

    async def _join(self, engines: Sequence[EngineClient], delivery: Delivery) -> None:
        self._buckets = self._cut(await self._actor.parameter_slices())
        size = self._config.engine.tensor_parallel_size
        if self._store is None:
            self._store = dist.TCPStore(self._network.address, 0, is_master=True, wait_for_workers=False)
        self._generation += 1
        group = BroadcastGroup(
            name=f"broadcast-{self._generation}",
            address=self._network.address,
            port=self._store.port,
            world_size=1 + size * len(engines),
            backend=self._network.backend,
            dtype=self._config.model.dtype,
            timeout_seconds=self._network.timeout_seconds,
        )
        met, *joined = await asyncio.gather(
            self._actor.join_broadcast_group(group),
            *(
                engine.join_broadcast_group(
                    group.name,
                    address=group.address,
                    port=group.port,
                    rank_offset=1 + size * index,
                    world_size=group.world_size,
                    backend=group.backend,
                )
                for index, engine in enumerate(engines)
            ),
            return_exceptions=True,
        )
        for engine, outcome in zip(engines, joined, strict=True):
            if isinstance(outcome, EngineError):
                delivery.lost[engine] = str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        if isinstance(met, TrainerDied):
            raise met
        if isinstance(met, BaseException):
            delivery.trainer_error = f"{type(met).__name__}: {met}"
        reason = "the broadcast group did not come together"
        if delivery.lost or delivery.trainer_error is not None:
            delivery.untouched = {engine: reason for engine in engines if engine not in delivery.lost}
        else:
            self._group, self._engines = group, list(engines)

    def _cut(self, held: Sequence[list[TensorSlice]]) -> list[TensorBucket]:
        """Whole tensors, up to ``publish.bucket_bytes`` together; a larger one has a bucket of its own."""
        whole = [
            TensorSlice(
                param=name, tensor=name, dim=dim, start=0, tensor_start=0, length=self._shapes[name][dim]
            )
            for name, dim in {item.tensor: item.dim for slices in held for item in slices}.items()
        ]
        parts: dict[str, list[Transfer]] = {}
        for item in plan(held, [whole], 1, self._shapes).transfers:
            parts.setdefault(item.tensor, []).append(item)
        limit = self._config.publish.bucket_bytes // _ITEM_BYTES[self._config.model.dtype]
        groups: list[list[str]] = []
        filled = limit
        for name in parts:
            elements = math.prod(self._shapes[name])
            if filled + elements > limit:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += elements
        return [
            TensorBucket(
                names=tuple(names),
                shapes=tuple(self._shapes[name] for name in names),
                parts=tuple(part for name in names for part in parts[name]),
            )
            for names in groups
        ]
