"""How a server is asked to run a snippet: our own protocol, and SandboxFusion's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ztrl_sandbox.bench.loads import Snippet


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said of one snippet."""

    status: str
    stdout: str
    run_seconds: float
    queue_seconds: float | None
    """None: this protocol does not tell."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """How one kind of server is asked."""

    path: str
    body: Callable[[Snippet], dict[str, Any]]
    parse: Callable[[dict[str, Any]], Answer | None]
    """None: the server says that it, and not the snippet, failed."""
    statuses: dict[str, str]
    """Our statuses that a load expects, in the protocol's words."""

    def is_right(self, snippet: Snippet, answer: Answer) -> bool:
        """Whether this is the answer that the snippet must get."""
        return (answer.status, answer.stdout) == (self.statuses[snippet.status], snippet.stdout)


def _native_body(snippet: Snippet) -> dict[str, Any]:
    return {
        "code": snippet.code,
        "run_timeout_seconds": snippet.run_timeout_seconds,
        "memory_limit_bytes": snippet.memory_limit_bytes,
    }


def _parse_native(payload: dict[str, Any]) -> Answer | None:
    if payload["status"] in ("rejected", "sandbox_error"):
        return None
    return Answer(payload["status"], payload["stdout"], payload["run_seconds"], payload["queue_seconds"])


def _fusion_body(snippet: Snippet) -> dict[str, Any]:
    memory_limit_bytes = snippet.memory_limit_bytes
    return {
        "code": snippet.code,
        "language": "python",
        "run_timeout": snippet.run_timeout_seconds,
        "memory_limit_MB": -1 if memory_limit_bytes is None else memory_limit_bytes >> 20,
    }


def _parse_fusion(payload: dict[str, Any]) -> Answer | None:
    run = payload["run_result"]
    if payload["status"] == "SandboxError" or run is None:
        return None
    ended = "ok" if run["return_code"] == 0 else "error"
    status = "timeout" if run["status"] == "TimeLimitExceeded" else ended
    return Answer(status, run["stdout"] or "", run["execution_time"] or 0.0, None)


PROTOCOLS = {
    "native": Protocol(
        path="/v1/execute",
        body=_native_body,
        parse=_parse_native,
        statuses={status: status for status in ("ok", "error", "timeout", "memory", "killed")},
    ),
    "sandboxfusion": Protocol(
        path="/run_code",
        body=_fusion_body,
        parse=_parse_fusion,
        statuses={"ok": "ok", "error": "error", "timeout": "timeout", "memory": "error", "killed": "error"},
    ),
}
