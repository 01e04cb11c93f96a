"""Resumable state on disk, complete or absent.

``<run>/checkpoints/step_000020/`` has ``actor/``, ``critic/``, ``state.json`` and ``manifest.json``: the size and
checksum of every file beside it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_ztrl.trainer.integrity import FileRecord, find_damage, seal, seal_directory

PREFIX = "step_"
PARTIAL_PREFIX = "partial_"
MANIFEST = "manifest.json"
STATE = "state.json"


class Saver(Protocol):
    """Writes weights and optimizer state while training goes on, as ``System`` does."""

    async def save_checkpoint(self, directory: Path) -> None:
        """Begins to write; what is written may change when this returns."""

    async def checkpoint_written(self) -> bool:
        """Whether the files are there.

        Raises:
            OSError: They could not be written.
        """

    async def finish_checkpoint(self) -> dict[str, FileRecord]:
        """Waits for the files. Returns their records by path in the directory."""


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is written under another name, and renamed when every byte of it is on the disk: a save that
    is killed, or a power cut, never harms the last good one.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: How many to keep.
        on_complete: Is given the state of every checkpoint that has become the latest.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int,
        on_complete: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._directory = directory
        self._keep_last = keep_last
        self._on_complete = on_complete
        self._pending: tuple[int, Saver, dict[str, Any]] | None = None

    async def save(self, version: int, saver: Saver, state: dict[str, Any]) -> None:
        """Begins to save everything that a resumed run needs at ``version``; completes the save before.

        Raises:
            OSError: Something could not be written.
        """
        await self.complete()
        if self._path(PREFIX, version).exists():
            return
        for leftover in self._directory.glob(f"{PARTIAL_PREFIX}*"):  # of a save that was killed
            shutil.rmtree(leftover)
        partial = self._path(PARTIAL_PREFIX, version)
        partial.mkdir(parents=True)
        (partial / STATE).write_text(json.dumps({"version": version, **state}))
        await saver.save_checkpoint(partial)
        self._pending = version, saver, state

    async def complete_if_written(self) -> None:
        """Completes the save that is under way if its files are there; call it once in a while.

        Raises:
            OSError: The save has failed.
        """
        if self._pending is not None and await self._pending[1].checkpoint_written():
            await self.complete()

    async def complete(self) -> None:
        """Waits for the save that is under way, if there is one, and makes it the latest checkpoint.

        Raises:
            OSError: The save has failed.
        """
        if self._pending is None:
            return
        version, saver, state = self._pending
        self._pending = None
        partial = self._path(PARTIAL_PREFIX, version)
        records = await saver.finish_checkpoint() | {STATE: seal(partial / STATE)}
        files = {name: dataclasses.asdict(record) for name, record in sorted(records.items())}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
        seal(partial / MANIFEST)
        seal_directory(partial)
        os.replace(partial, self._path(PREFIX, version))
        seal_directory(self._directory)
        for old in self._all()[: -self._keep_last]:
            # Renamed first, so that one which is half deleted is never taken for a checkpoint.
            os.replace(old, doomed := old.with_name(old.name.replace(PREFIX, PARTIAL_PREFIX, 1)))
            shutil.rmtree(doomed)
        self._on_complete(state)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = self._all()
        return found[-1] if found else None

    def latest_version(self) -> int | None:
        """The step of `latest`."""
        found = self.latest()
        return None if found is None else int(found.name.removeprefix(PREFIX))

    def _path(self, prefix: str, version: int) -> Path:
        return self._directory / f"{prefix}{version:06d}"

    def _all(self) -> list[Path]:
        return sorted(self._directory.glob(f"{PREFIX}*"))


def verify(checkpoint: Path) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Raises:
        ValueError: A file is missing, truncated or altered; it is named, with the fix.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        records = {name: FileRecord(**fields) for name, fields in files.items()}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        damage: str | None = f"{checkpoint / MANIFEST} is unreadable ({error})"
    else:
        damage = find_damage(checkpoint, records)
    if damage:
        raise ValueError(f"{damage}; {_fix(checkpoint)}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `CheckpointStore.save` was given, and ``version``.

    Raises:
        ValueError: The file is missing or broken.
    """
    path = checkpoint / STATE
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: unreadable ({error}); {_fix(checkpoint)}") from error


def _fix(checkpoint: Path) -> str:
    return f"remove {checkpoint} to resume from the one before"
