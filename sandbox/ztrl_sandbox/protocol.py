"""What crosses a process boundary: requests, results, limits. Standard library only."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MEMORY_EXIT_CODE = 250
"""The snippet process exits with this when a ``MemoryError`` reaches its top level.

Only the dying process knows why it dies, so this much is self-reported; a snippet that exits with it on
purpose mislabels nobody but itself. Every other part of a result comes from the worker's ``wait4``.
"""


class Status(enum.StrEnum):
    """What became of one snippet."""

    OK = "ok"
    ERROR = "error"
    """Exit code other than 0: an uncaught exception, or ``sys.exit``."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_TRUNCATED = "output_truncated"
    """Exit code 0, but the middle of the output was cut; or stopped because it flooded the pipe."""
    KILLED = "killed"
    """Died by a signal of its own making, or was stopped for having too many processes."""
    REJECTED = "rejected"
    """Never ran: the queue was full, or the request too large."""
    SANDBOX_ERROR = "sandbox_error"
    """The executor failed. Says nothing about the snippet."""

    @property
    def is_infrastructure(self) -> bool:
        """Whether this is the executor's failure and no verdict on the snippet."""
        return self in (Status.REJECTED, Status.SANDBOX_ERROR)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Caps on one snippet, fixed when the server starts."""

    memory_bytes: int = 1 << 30
    """Address space that a process may add to the preloaded interpreter's; also caps its process tree."""
    scratch_bytes: int = 64 << 20
    """Size of the scratch directory (a cap in ``full`` and ``user`` only)."""
    scratch_inodes: int = 4096
    file_bytes: int = 64 << 20
    open_files: int = 256
    processes: int = 128
    """Processes and threads together."""
    output_bytes: int = 64 << 10
    """Of each stream kept; beyond it the middle is cut."""
    flood_bytes: int = 16 << 20
    """Of each stream after which the snippet is stopped."""
    fetch_bytes: int = 16 << 20
    """Of all files together that are fetched from one snippet."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"limits.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionRequest:
    """One snippet to run."""

    code: str
    run_timeout_seconds: float
    stdin: str | None = None
    memory_limit_bytes: int | None = None
    """None means the server's limit; a larger value is lowered to it."""
    print_last_expression: bool = False
    """As an interactive interpreter does: print the last expression's value if nothing else was printed."""
    files: Mapping[str, bytes] = field(default_factory=dict, hash=False)
    """Path → content, put into the working directory before the code runs. Not for sessions."""
    fetch_files: Sequence[str] = ()
    """Paths of files to read from the working directory when the code has ended, however it did. Not for sessions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionResult:
    """What the executor says of one snippet."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    """Negative: died by that signal. None: it never ran, or nobody saw it end."""
    run_seconds: float = 0.0
    queue_seconds: float = 0.0
    cpu_seconds: float = 0.0
    """User and system time of the main process and of the children it waited for."""
    peak_memory_bytes: int = 0
    """Largest resident set of one process, or of the whole tree when that came near its limit; the preloaded
    interpreter is included."""
    message: str = ""
    """For ``sandbox_error`` and ``rejected``: what failed. Else which files could not be fetched."""
    files: Mapping[str, bytes] = field(default_factory=dict, hash=False)
    """Those of ``fetch_files`` that were there."""
