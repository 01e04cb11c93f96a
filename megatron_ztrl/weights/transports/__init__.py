"""Ways for the weights to get from the trainer into the engines; ``publish`` pauses and commits around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_ztrl.engines.client import EngineClient


class TrainerDied(RuntimeError):
    """A process of the trainer has ended, and the others are of no use without it. The message says which, and why."""


@dataclass(kw_only=True)
class Delivery:
    """What became of every engine. None is in two of the three."""

    complete: list[EngineClient] = field(default_factory=list)
    """They hold all of the new weights, and can commit."""
    untouched: dict[EngineClient, str] = field(default_factory=dict)
    """They hold the old weights, and why: nothing has been written."""
    lost: dict[EngineClient, str] = field(default_factory=dict)
    """Why an engine is dead, or holds neither version: it must not sample again."""
    trainer_error: str | None = None
    """Why the trainer could not send, if it could not."""
    sent_bytes: list[int] = field(default_factory=list)
    """Per trainer rank; empty where a transport cannot tell."""
    received_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Per engine URL and tensor-parallel rank."""
    stream_seconds: float | None = None
    """From the moment when all were ready to the last checksum, in the slowest engine rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """How trainer ranks, engines and the driver reach each other."""

    address: str = "127.0.0.1"
    """Of the driver's host."""
    backend: Literal["gloo", "nccl"] = "gloo"
    timeout_seconds: float = 300.0
    """The longest wait for a peer that lives and does nothing."""


class Transport(Protocol):
    """Moves weights into paused engines with an open weight update."""

    async def deliver(self, engines: Sequence[EngineClient], version: int) -> Delivery:
        """Bring the trainer's current weights into these engines. Other failures are in what is returned.

        Raises:
            TrainerDied: nobody has the weights any more.
        """
        ...

    async def commit(self, engine: EngineClient, version: int) -> None:
        """Let a complete engine take the version number.

        Raises:
            EngineError: it did not.
        """
        ...

    async def close(self) -> None:
        """Give up what is kept between publishes."""
        ...
