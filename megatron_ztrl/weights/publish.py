"""Publishing: pause the engines, send every slice straight to the engine rank that needs it, resume, verify.

``WeightPublisher`` lives in the driver, which moves no weights; the ranks' end is `weights.sender`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines import interruption, weight_receiver
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.engines.server import WEIGHT_LOADER
from megatron_ztrl.engines.weight_group import Piece, WeightGroup
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.reshard import Transfer, plan
from megatron_ztrl.weights.verify import PublishError, canary_tokens, check_canary

MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 0.1}
"""Nats. What two implementations of one policy may differ by on the canary, where the config does not say."""


class ActorWorld(Protocol):
    """What publishing needs of the trainer; every call reaches all ranks."""

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        """What each rank holds."""
        ...

    async def join_weight_group(self, group: WeightGroup, transfers: Sequence[Transfer]) -> None:
        """Run ``WeightSender.join`` in each rank; returns when the group is complete."""
        ...

    async def send_weights(self) -> None:
        """Run ``WeightSender.send`` in each rank."""
        ...

    async def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of every token after the first, [L - 1], under the current weights."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishReport:
    """What one publish did."""

    version: int
    pause_seconds: float
    """How long no engine sampled."""
    total_seconds: float
    """Verification included."""
    max_logprob_gap: float | None
    """Nats, over the canary and all engines; None when it was not checked."""


class WeightPublisher:
    """Driver's end: brings every engine to the trainer's current weights."""

    def __init__(
        self,
        config: Config,
        actor: ActorWorld,
        engines: Sequence[EngineClient],
        *,
        address: str = "127.0.0.1",
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout_seconds: float = 300.0,
    ) -> None:
        """Describe both ends.

        Args:
            config: reads ``model``, ``engine.tensor_parallel_size`` and ``publish``.
            actor: the trainer.
            engines: one client for each server.
            address: of this host, as trainer ranks and engines reach it.
            backend: of the weight group.
            timeout_seconds: the longest wait for any peer.

        Raises:
            ValueError: the engines cannot hold this model (see ``engine_slices``).
        """
        self._config = config
        self._actor = actor
        self._engines = list(engines)
        self._address = address
        self._backend: Literal["gloo", "nccl"] = backend
        self._timeout_seconds = timeout_seconds
        hf_config = _read_hf_config(config.model.path)
        size = config.engine.tensor_parallel_size
        self._slices = [engine_slices(hf_config, size, rank) for rank in range(size)]
        self._canary = canary_tokens(hf_config["vocab_size"])
        self._store: dist.TCPStore | None = None
        self._generation = 0
        self._group: WeightGroup | None = None

    async def close(self) -> None:
        """Give up the meeting point; the group's members stay connected to each other."""
        self._group = self._store = None

    def replace_engines(self, engines: Sequence[EngineClient]) -> None:
        """Publish to these from now on; the next publish forms a new weight group."""
        self._engines = list(engines)
        self._group = None

    async def publish(self, version: int) -> PublishReport:
        """Bring all engines to the trainer's weights; requests in flight go on under them.

        Raises:
            PublishError: an engine or a trainer rank failed, or the canary differs. The engines' weights are
            then
                undefined: replace the engines before anything samples.
        """
        started = time.perf_counter()
        try:
            await interruption.pause(self._engines, self._config.publish.interruption)
            await self._each(lambda engine: engine.begin_weight_update())
            await self._transfer(version)
            await self._each(lambda engine: engine.end_weight_update())
            await interruption.resume(self._engines, self._config.publish.interruption)
            pause_seconds = time.perf_counter() - started
            gap = await self._verify(version) if self._due(version) else None
        except* Exception as errors:
            self._group = None
            raise PublishError(f"version {version} was not published: {_first(errors)}") from errors
        total_seconds = time.perf_counter() - started
        return PublishReport(
            version=version, pause_seconds=pause_seconds, total_seconds=total_seconds, max_logprob_gap=gap
        )

    async def _transfer(self, version: int) -> None:
        """Run both ends at once; the first time they meet and learn who sends what."""
        if self._group is not None:
            message = weight_receiver.payload(self._group.name)
            messages = [[message] * len(self._slices) for _ in self._engines]
            await _together(self._actor.send_weights(), *self._load(messages, version))
            return
        held = await self._actor.parameter_slices()
        transfers = plan(held, [slices for _ in self._engines for slices in self._slices])
        group = self._new_group(len(held))

        async def join_and_send() -> None:
            await self._actor.join_weight_group(group, transfers)
            await self._actor.send_weights()

        await _together(join_and_send(), *self._load(self._invitations(group, transfers, len(held)), version))
        self._group = group

    def _invitations(
        self, group: WeightGroup, transfers: Sequence[Transfer], num_senders: int
    ) -> list[list[str]]:
        """Messages for every rank of every engine: its number, and what it receives from whom."""
        pieces: list[list[Piece]] = [[] for _ in range(group.world_size - num_senders)]
        for item in transfers:
            pieces[item.target].append(
                Piece(item.source, item.target_param, item.dim, item.target_start, item.length)
            )
        flat = [
            weight_receiver.payload(group.name, (group, num_senders + target, mine))
            for target, mine in enumerate(pieces)
        ]
        size = len(self._slices)
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    def _load(self, messages: Sequence[Sequence[str]], version: int) -> list[Any]:
        return [
            engine.load_weights(message, loader=WEIGHT_LOADER, version=version)
            for engine, message in zip(self._engines, messages, strict=True)
        ]

    def _new_group(self, num_senders: int) -> WeightGroup:
        if self._store is None:  # the driver keeps the meeting point, on a port that the system picks
            self._store = dist.TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        self._generation += 1
        return WeightGroup(
            name=f"weights-{self._generation}",
            address=self._address,
            port=self._store.port,
            world_size=num_senders + len(self._engines) * len(self._slices),
            backend=self._backend,
            dtype=self._config.model.dtype,
            timeout_seconds=self._timeout_seconds,
        )

    def _due(self, version: int) -> bool:
        interval = self._config.publish.verify_interval_steps
        return interval > 0 and version % interval == 0

    async def _verify(self, version: int) -> float:
        trainer, *served = await _together(
            self._actor.canary_logprobs(self._canary),
            *(engine.prompt_logprobs(self._canary) for engine in self._engines),
        )
        max_gap = self._config.publish.max_logprob_gap or MAX_LOGPROB_GAP[self._config.model.dtype]
        return max(
            check_canary(trainer, logprobs, self._canary, max_gap=max_gap, version=version, engine=engine.url)
            for engine, logprobs in zip(self._engines, served, strict=True)
        )

    async def _each(self, call: Callable[[EngineClient], Any]) -> None:
        await _together(*(call(engine) for engine in self._engines))


def _read_hf_config(model_path: str) -> dict[str, Any]:
    from transformers.utils import cached_file  # a directory or a hub id

    path = cached_file(model_path, "config.json")
    assert path is not None  # raised otherwise
    return json.loads(Path(path).read_text())


async def _together(*calls: Any) -> list[Any]:
    """Await all; the first failure cancels the rest."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real exception inside nested groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
