"""``<run>/processes.json``: which process is which, for people and for tools that look at a run from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PROCESSES_FILE = "processes.json"


def read_processes(run_directory: Path) -> dict[str, Any]:
    """``{"driver": {"pid": ...}, "servers": {name: row}}`` of a run that is going on, or was killed.

    Raises:
        ValueError: There is none.
    """
    path = run_directory / PROCESSES_FILE
    if not path.exists():
        raise ValueError(f"{run_directory}: no run is going on there ({PROCESSES_FILE} is missing)")
    return json.loads(path.read_text())


class ProcessTable:
    """The driver's process id, and a row per server: ``url``, ``pid`` on its node, ``state``, ``restarts``.

    Args:
        run_directory: Of the run. The file is there while the run is; one that was killed leaves it behind.
    """

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / PROCESSES_FILE
        self._servers: dict[str, dict[str, Any]] = {}

    def update(self, name: str, **fields: Any) -> None:
        """Changes some fields of a server's row."""
        self._servers.setdefault(name, {"restarts": 0}).update(fields)
        self._write()

    def count_restart(self, name: str) -> None:
        """One more."""
        self.update(name, restarts=self._servers[name]["restarts"] + 1)

    def remove(self, name: str) -> None:
        """The server is gone for good."""
        self._servers.pop(name, None)
        self._write()

    def close(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        content = {"driver": {"pid": os.getpid()}, "servers": dict(sorted(self._servers.items()))}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self._path)  # a reader sees the old table or the new one
