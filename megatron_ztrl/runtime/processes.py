"""``<run>/processes.json``: which process is which, for people and for tools that look at a run from outside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROCESSES_FILE = "processes.json"
LOCK_FILE = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Some cluster file systems have none."""


@contextlib.contextmanager
def sole_driver(run_directory: Path) -> Iterator[None]:
    """Keeps other drivers out of a run's directory. The kernel ends this with the process, however that ends.

    Raises:
        ValueError: A driver is at work there, or the directory cannot be made.
    """
    path = run_directory / LOCK_FILE
    try:
        run_directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise ValueError(f"run.directory: {error.strerror}: {error.filename}; choose another") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # processes that are forked do not inherit it
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"run.directory: a run is going on in {run_directory}; wait for its end, or choose another"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def read_processes(run_directory: Path) -> dict[str, Any]:
    """``{"driver": {"pid": ..., "host": ...}, "servers": {name: row}}`` of a run that is going on.

    Raises:
        ValueError: There is none.
    """
    path = run_directory / PROCESSES_FILE
    if not path.exists():
        raise ValueError(f"{run_directory}: no run is going on there ({PROCESSES_FILE} is missing)")
    table = json.loads(path.read_text())
    driver = table["driver"]
    if driver["host"] == socket.gethostname() and not Path("/proc", str(driver["pid"])).exists():
        raise ValueError(
            f"{run_directory}: no run is going on there: its driver, process {driver['pid']}, was killed"
            " (ztrl train --resume goes on with it)"
        )
    return table


class ProcessTable:
    """Where the driver is, and a row per server: ``url``, ``pid`` on its node, ``state``, ``restarts``.

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
        driver = {"pid": os.getpid(), "host": socket.gethostname()}
        content = {"driver": driver, "servers": dict(sorted(self._servers.items()))}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self._path)  # a reader sees the old table or the new one
