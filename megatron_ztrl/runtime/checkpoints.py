"""Resumable state on disk: ``<run>/checkpoints/step_000020/{actor/, critic/, state.json}``, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PREFIX = "step_"


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is written under another name and renamed when it is whole, so a save that is killed never
    harms the last good one.

    Args:
        directory: ``<run>/checkpoints``.
        keep_last: How many to keep.
    """

    def __init__(self, directory: Path, *, keep_last: int) -> None:
        self._directory = directory
        self._keep_last = keep_last

    async def save(
        self, version: int, save_weights: Callable[[Path], Awaitable[None]], state: dict[str, Any]
    ) -> None:
        """Saves everything that a resumed run needs at ``version``."""
        final = self._directory / f"{PREFIX}{version:06d}"
        if final.exists():
            return
        partial = self._directory / f"partial_{version:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await save_weights(partial)
        (partial / "state.json").write_text(json.dumps({"version": version, **state}))
        os.replace(partial, final)
        for old in self._complete()[: -self._keep_last]:
            shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = self._complete()
        return complete[-1] if complete else None

    def _complete(self) -> list[Path]:
        return sorted(self._directory.glob(f"{PREFIX}*"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `CheckpointStore.save` was given, and ``version``.

    Raises:
        ValueError: The file is missing or broken.
    """
    path = checkpoint / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: unreadable ({error}); remove {checkpoint} to resume from the one before"
        ) from error
