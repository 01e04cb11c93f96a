"""Publishing: pause the engines, bring the trainer's weights into them, commit, resume, verify.

``WeightPublisher`` lives in the driver, which moves no weights: a transport does (``transports``). Whatever fails,
every engine serves the new version or the old one, entirely, or is lost and never samples again.

``deliver`` has compared every checksum when it returns, and requests go on. ``verify`` then compares log-probs, which
needs no pause: it may run beside the next rollouts, as long as it ends before anything is made of what they sample.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines import interruption
from megatron_ztrl.engines.client import EngineClient, EngineError
from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.weights.fp8_blocks import check_fp8_blocks, with_scales
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)
from megatron_ztrl.weights.transports import Network, Transport
from megatron_ztrl.weights.transports.broadcast import BroadcastingWorld, BroadcastTransport
from megatron_ztrl.weights.transports.disk import DiskTransport, ExportingWorld
from megatron_ztrl.weights.transports.shards import SendingWorld, ShardTransport
from megatron_ztrl.weights.verify import PublishError, canary_tokens, check_canary

MAX_LOGPROB_GAP = {"float32": 1e-4, "bfloat16": 0.1}
"""Nats. What two implementations of one policy may differ by on the canary, where the config does not say."""
MAX_FP8_LOGPROB_GAP = 3.0
"""The same, where the engine's linear layers are in FP8 and the trainer's are not; measured in docs/gpu_checks.md."""


class ActorWorld(SendingWorld, BroadcastingWorld, ExportingWorld, Protocol):
    """What publishing needs of the trainer; every call reaches all ranks. One transport needs one of the three."""

    async def invalid_weights(self) -> list[str | None]:
        """Run ``find_invalid`` and, for ``shards``, ``WeightSender.prepare`` in each rank, while the engines stop."""
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
    transfer_seconds: float
    """The part of it in which weights moved and were committed."""
    stream_seconds: float | None
    """The part of that between the moment when all ranks were ready and the last checksum; ``shards`` only."""
    updated: Sequence[EngineClient]
    """They serve the new version."""
    max_logprob_gap: float | None = None
    """Nats, over the canary and all engines; None when it was not compared (``verify``)."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """By URL, why an engine is dead or holds neither version. It is published to no more, and must not sample."""
    untouched: Mapping[str, str] = field(default_factory=dict)
    """By URL, why an engine still serves the version that it had."""
    sent_bytes: Sequence[int] = ()
    """Per trainer rank."""
    received_bytes: Mapping[str, list[int]] = field(default_factory=dict)
    """Per engine URL and tensor-parallel rank."""


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
            config: reads ``model``, ``engine.path``, ``engine.tensor_parallel_size`` and ``publish``.
            actor: the trainer.
            engines: one client for each server.
            address: of this host, as trainer ranks and engines reach it.
            backend: of the weight group.
            timeout_seconds: the longest wait for a peer that lives and does nothing.

        Raises:
            ValueError: the engines cannot hold this model (see ``engine_slices``).
        """
        self._config = config
        self._actor = actor
        self._engines = list(engines)
        hf_config = _read_hf_config(config.model.path)
        self._fp8_blocks = _holds_fp8_blocks(config, hf_config)
        self._canary = canary_tokens(hf_config["vocab_size"])
        network = Network(address=address, backend=backend, timeout_seconds=timeout_seconds)
        self._transport = _make_transport(config, actor, hf_config, network, fp8_blocks=self._fp8_blocks)

    async def close(self) -> None:
        """Give up what is kept between publishes."""
        await self._transport.close()

    async def publish(self, version: int, engines: Sequence[EngineClient] | None = None) -> PublishReport:
        """``deliver``, and then ``verify``."""
        return await self.verify(await self.deliver(version, engines))

    async def deliver(self, version: int, engines: Sequence[EngineClient] | None = None) -> PublishReport:
        """Bring engines to the trainer's weights; requests in flight go on under them.

        Args:
            version: of the weights that the trainer holds now.
            engines: only these, such as one that was started while the others already serve ``version``.

        Raises:
            PublishError: the trainer failed, or no engine took the weights. ``lost`` names the engines that must
                not sample again; the others serve the new version or still the old.
        """
        fleet = _Fleet(self._engines if engines is None else engines)
        try:
            return await self._deliver(version, fleet)
        finally:
            self._forget(fleet.lost)

    async def verify(self, report: PublishReport) -> PublishReport:
        """Compare the canary's log-probs under the trainer and the engines, if that is due after this publish.

        Args:
            report: of ``deliver``. Trainer and engines still have these weights.

        Returns:
            The report, completed. An engine that fails here is lost, too.

        Raises:
            PublishError: an engine differs from the trainer, or all of them are lost.
        """
        interval = self._config.publish.verify_interval_steps
        if interval == 0 or report.version % interval:
            return report
        fleet = _Fleet(report.updated)
        served: dict[EngineClient, list[float]] = {}

        async def ask(engine: EngineClient) -> None:
            served[engine] = await engine.prompt_logprobs(self._canary)

        trainer, _ = await asyncio.gather(self._actor.canary_logprobs(self._canary), fleet.each(ask))
        self._forget(fleet.lost)
        if not fleet.alive:
            raise fleet.error(report.version, *fleet.lost.values())
        usual_gap = MAX_FP8_LOGPROB_GAP if self._fp8_blocks else MAX_LOGPROB_GAP[self._config.model.dtype]
        max_gap = self._config.publish.max_logprob_gap or usual_gap
        gaps = [
            check_canary(
                trainer, logprobs, self._canary, max_gap=max_gap, version=report.version, engine=engine.url
            )
            for engine, logprobs in served.items()
        ]
        return replace(
            report, updated=fleet.alive, max_logprob_gap=max(gaps), lost={**report.lost, **fleet.lost_urls}
        )

    async def _deliver(self, version: int, fleet: _Fleet) -> PublishReport:
        started = time.perf_counter()
        checking = asyncio.ensure_future(self._actor.invalid_weights())  # the engines stop meanwhile
        await fleet.each(self._open)
        invalid = next(filter(None, await checking), None)
        if invalid is not None:
            await fleet.each(_close)
            raise fleet.error(version, invalid)
        transfer_started = time.perf_counter()
        delivery = await self._transport.deliver(fleet.alive, version)
        fleet.lose(delivery.lost)
        await fleet.each(lambda engine: self._transport.commit(engine, version), delivery.complete)
        transfer_seconds = time.perf_counter() - transfer_started
        await fleet.each(_close)
        ended = time.perf_counter()
        updated = [engine for engine in delivery.complete if engine in fleet.alive]
        if delivery.trainer_error is not None:
            raise fleet.error(version, delivery.trainer_error)
        if not updated:
            raise fleet.error(version, *fleet.lost.values(), *delivery.untouched.values())
        return PublishReport(
            version=version,
            pause_seconds=ended - started,
            transfer_seconds=transfer_seconds,
            stream_seconds=delivery.stream_seconds,
            updated=updated,
            lost=fleet.lost_urls,
            untouched={engine.url: reason for engine, reason in delivery.untouched.items()},
            sent_bytes=delivery.sent_bytes,
            received_bytes=delivery.received_bytes,
        )

    async def _open(self, engine: EngineClient) -> None:
        await interruption.pause(engine, self._config.publish.interruption)
        await engine.begin_weight_update()

    def _forget(self, lost: Mapping[EngineClient, str]) -> None:
        self._engines = [engine for engine in self._engines if engine not in lost]


def check_engines(config: Config) -> None:
    """Finds, before any process starts, engines that weights cannot be published to.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    hf_config = _read_hf_config(config.model.path)
    fp8_blocks = _holds_fp8_blocks(config, hf_config)
    if config.publish.transport == "shards":
        held = engine_slices(hf_config, config.engine.tensor_parallel_size, 0)
        if fp8_blocks:
            architecture = Architecture.from_hf_config(hf_config)
            shapes = hf_tensor_shapes(architecture)
            with_scales(held, shapes, "engine rank 0", "engine.tensor_parallel_size")
            # Of a trainer's layout, only this size cuts tensors.
            layout = ParallelLayout(tensor_size=config.actor.tensor_parallel_size)
            held = megatron_slices(architecture, layout, 0, backend="local")
            with_scales(held, shapes, "trainer rank 0", "actor.tensor_parallel_size")


async def _close(engine: EngineClient) -> None:
    await engine.end_weight_update()
    await engine.resume()


class _Fleet:
    """The engines of one publish; one that fails is out, and the others go on."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        self.alive = list(engines)
        self.lost: dict[EngineClient, str] = {}

    @property
    def lost_urls(self) -> dict[str, str]:
        return {engine.url: reason for engine, reason in self.lost.items()}

    def error(self, version: int, *reasons: str) -> PublishError:
        """What to raise when none serves the version."""
        why = "; ".join(reasons) or "there is no engine"
        return PublishError(f"version {version} was not published: {why}", self.lost_urls)

    def lose(self, reasons: Mapping[EngineClient, str]) -> None:
        self.lost |= reasons
        self.alive = [engine for engine in self.alive if engine not in self.lost]

    async def each(
        self,
        call: Callable[[EngineClient], Awaitable[None]],
        engines: Sequence[EngineClient] | None = None,
    ) -> None:
        """Make a call to all that are alive, or to some of them."""

        async def attempt(engine: EngineClient) -> str | None:
            reason = None
            try:
                await call(engine)
            except* EngineError as errors:
                reason = str(_first(errors))
            return reason

        asked = self.alive if engines is None else list(engines)
        reasons = await asyncio.gather(*map(attempt, asked))
        self.lose({engine: reason for engine, reason in zip(asked, reasons, strict=True) if reason})


def _read_hf_config(model_path: str) -> dict[str, Any]:
    from transformers.utils import cached_file  # a directory or a hub id

    path = cached_file(model_path, "config.json")
    assert path is not None  # raised otherwise
    return json.loads(Path(path).read_text())


def _make_transport(
    config: Config, actor: ActorWorld, hf_config: Mapping[str, Any], network: Network, *, fp8_blocks: bool
) -> Transport:
    if config.publish.transport == "disk":
        return DiskTransport(actor, Path(config.run.directory).resolve() / "publish")
    shapes = hf_tensor_shapes(Architecture.from_hf_config(hf_config))
    if config.publish.transport == "broadcast":
        return BroadcastTransport(config, actor, shapes, network)
    size = config.engine.tensor_parallel_size
    engine_ranks = [engine_slices(hf_config, size, rank) for rank in range(size)]
    return ShardTransport(config, actor, engine_ranks, shapes, network, fp8_blocks=fp8_blocks)


def _holds_fp8_blocks(config: Config, hf_config: Mapping[str, Any]) -> bool:
    """Whether the engines hold their linear layers in block-wise FP8.

    Raises:
        ValueError: they cannot be published to.
    """
    if config.sglang.server_args.get("quantization"):
        raise ValueError(
            "sglang.server_args.quantization: SGLang would quantise what it loads, and nothing that is published; leave"
            " it out, and let engine.path name a checkpoint in block-wise FP8 (docs/checkpoints.md)"
        )
    if hf_config.get("quantization_config"):
        raise ValueError(
            "model.path: quantization_config in config.json: the trainer starts from ordinary weights; let engine.path"
            " name the quantised checkpoint"
        )
    if config.engine.path is None:
        return False
    engine_config = _read_hf_config(config.engine.path)
    if Architecture.from_hf_config(engine_config) != Architecture.from_hf_config(hf_config):
        raise ValueError(f"engine.path: {config.engine.path} is of another model than model.path")
    check_fp8_blocks(engine_config, "engine.path")
    if config.model.dtype != "bfloat16":
        raise ValueError(
            "model.dtype: with FP8 engines (engine.path), everything else is in bfloat16; set it to that"
        )
    if config.publish.transport != "shards":
        raise ValueError(
            f"publish.transport: {config.publish.transport} brings no FP8 weights to the engines of engine.path; set it"
            " to shards"
        )
    return True


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real exception inside nested groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
