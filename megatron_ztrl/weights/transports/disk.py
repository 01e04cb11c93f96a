"""Through a checkpoint on a file system that trainer and engines share, for engines that no network group reaches."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_ztrl.engines.client import EngineClient, EngineError
from megatron_ztrl.weights.transports import Delivery, TrainerDied


class ExportingWorld(Protocol):
    """What this transport needs of the trainer; the call reaches all ranks."""

    async def export_hf(self, directory: Path) -> None:
        """Write the current weights as a Hugging Face checkpoint."""
        ...


class DiskTransport:
    """The driver's end.

    Args:
        actor: the trainer.
        directory: where the checkpoint goes; each publish replaces the one before it.
    """

    def __init__(self, actor: ExportingWorld, directory: Path) -> None:
        self._actor = actor
        self._directory = directory

    async def close(self) -> None:
        """Remove the checkpoint."""
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def deliver(self, engines: Sequence[EngineClient], version: int) -> Delivery:
        """Write once, and let every engine read."""
        await self.close()
        try:
            await self._actor.export_hf(self._directory)
        except TrainerDied:
            raise
        except (OSError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            return Delivery(trainer_error=reason, untouched=dict.fromkeys(engines, reason))
        outcomes = await asyncio.gather(
            *(engine.load_checkpoint(self._directory, version=version) for engine in engines),
            return_exceptions=True,
        )
        delivery = Delivery()
        for engine, outcome in zip(engines, outcomes, strict=True):
            if isinstance(outcome, EngineError):
                delivery.lost[engine] = str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                delivery.complete.append(engine)
        return delivery

    async def commit(self, engine: EngineClient, version: int) -> None:
        """Nothing is left to do: the checkpoint came with the version."""
