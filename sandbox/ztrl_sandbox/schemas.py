"""The bodies of requests and answers, as pydantic models: they check the former and document the latter."""

from __future__ import annotations

import base64
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ztrl_sandbox.files import MAX_FILES, path_parts
from ztrl_sandbox.protocol import ExecutionRequest, ExecutionResult, Status

MAX_RUN_TIMEOUT_SECONDS = 600.0
MAX_CODE_CHARACTERS = 1 << 20
MAX_SESSION_TTL_SECONDS = 24 * 3600.0


class _CodeBody(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"code": "print(6 * 7)", "run_timeout_seconds": 5}]},
    )

    code: str = Field(description=f"Python source, at most {MAX_CODE_CHARACTERS} characters.")
    run_timeout_seconds: float = Field(
        default=20.0,
        gt=0,
        le=MAX_RUN_TIMEOUT_SECONDS,
        description="Wall time; the wait in the queue is free.",
    )
    stdin: str | None = Field(default=None, description="Standard input; null is an empty one.")
    print_last_expression: bool = Field(
        default=False, description="Print the last expression's value if nothing else was printed."
    )

    def request(self) -> ExecutionRequest:
        """As the pool takes it."""
        return ExecutionRequest(**dict(self))


class ExecuteBody(_CodeBody):
    """One snippet to run."""

    memory_limit_bytes: int | None = Field(
        default=None, gt=0, description="Lowers the server's limit; a larger value has no effect."
    )


class SessionExecuteBody(_CodeBody):
    """Code to run where the session's earlier code ran."""

    memory_limit_bytes: None = Field(default=None, description="Set when the session is opened.")


class SessionBody(BaseModel):
    """A session to open."""

    model_config = ConfigDict(extra="forbid")

    ttl_seconds: float | None = Field(
        default=None,
        gt=0,
        le=MAX_SESSION_TTL_SECONDS,
        description="The session ends when it is unused for so long; null is the server's default.",
    )
    memory_limit_bytes: int | None = Field(
        default=None, gt=0, description="Of the session; a larger value than the server's has no effect."
    )


class RunCodeBody(BaseModel):
    """SandboxFusion's request; its fields that mean nothing for Python are ignored."""

    code: str
    language: str = Field(default="python", description="Only `python` is supported.")
    run_timeout: float = Field(default=10.0, gt=0, le=MAX_RUN_TIMEOUT_SECONDS, description="Seconds.")
    stdin: str | None = None
    memory_limit_MB: int = Field(default=-1, description="Not positive: the server's limit.")
    files: dict[str, str | None] = Field(
        default_factory=dict,
        description=f"Path → content in base64, at most {MAX_FILES}: put into the working directory before the code "
        "runs. Paths are relative to it.",
    )
    fetch_files: list[str] = Field(
        default_factory=list,
        description=f"Paths, at most {MAX_FILES}: files to return from the working directory when the code has ended.",
    )

    def request(self) -> ExecutionRequest:
        """As the pool takes it.

        Raises:
            ValueError: a path or a content is refused.
        """
        for name, paths in (("files", self.files), ("fetch_files", self.fetch_files)):
            if len(paths) > MAX_FILES:
                raise ValueError(f"{name}: there are {len(paths)}; at most {MAX_FILES} are accepted")
        contents = {path: content for path, content in self.files.items() if content is not None}
        for path in (*contents, *self.fetch_files):
            path_parts(path)
        return ExecutionRequest(
            code=self.code,
            run_timeout_seconds=self.run_timeout,
            stdin=self.stdin,
            memory_limit_bytes=self.memory_limit_MB << 20 if self.memory_limit_MB > 0 else None,
            files={path: _decoded(path, content) for path, content in contents.items()},
            fetch_files=self.fetch_files,
        )


def _decoded(path: str, content: str) -> bytes:
    try:
        return base64.b64decode(content)
    except ValueError as error:
        raise ValueError(f"files: the content of {path!r} is not base64: {error}") from None


class ExecuteAnswer(BaseModel):
    """What became of one snippet."""

    status: Status = Field(
        description="`ok`, `error` (exit code other than 0), `timeout`, `memory`, `output_truncated`, `killed` "
        "(by a signal, or for too many processes), `rejected` (never ran), `sandbox_error` (the executor failed)."
    )
    stdout: str = Field(description="The middle of long output is cut and the cut is stated.")
    stderr: str
    exit_code: int | None = Field(
        description="Negative: the signal. Null: it never ran, or nobody saw it end."
    )
    run_seconds: float = Field(description="Wall time of the snippet alone.")
    queue_seconds: float = Field(description="Wait before it started.")
    cpu_seconds: float
    peak_memory_bytes: int = Field(description="The preloaded interpreter is included.")
    message: str = Field(description="For `rejected` and `sandbox_error`: what failed.")


class SessionExecuteAnswer(ExecuteAnswer):
    """What became of one call in a session."""

    session_alive: bool = Field(
        description="False: the state is lost, `message` says why, and later calls get 404."
    )


class SessionAnswer(BaseModel):
    """An open session."""

    session_id: str = Field(description="Unguessable; whoever has it can run code in the session.")
    state: Literal["idle", "busy"]
    pending_calls: int = Field(description="Calls that run or wait.")
    ttl_seconds: float
    idle_seconds: float = Field(description="Since the last call ended.")
    memory_limit_bytes: int
    calls: int
    max_calls: int
    run_seconds: float = Field(description="All calls together.")
    max_run_seconds: float


class RunCodeAnswer(BaseModel):
    """SandboxFusion's answer."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = Field(description="Why nothing ran, or which files could not be fetched.")
    compile_result: None
    run_result: dict[str, Any] | None
    executor_pod_name: None
    files: dict[str, str] = Field(
        description="Path → content in base64, of the fetched files that were there."
    )


class HealthAnswer(BaseModel):
    """What is served, and how well it is isolated."""

    status: Literal["ok"]
    version: str
    python: str
    isolation: str = Field(description="The tier in force: `full`, `user` or `basic`.")
    isolation_reason: str = Field(description="Why it is this tier.")
    isolation_layers: list[str] = Field(description="What separates a snippet from the host.")
    preload: list[str] = Field(description="Modules that snippets find imported already.")
    limits: dict[str, int] = Field(description="Caps on one snippet.")
    workers: int = Field(description="Snippets that run at once.")
    worker_pids: list[int]
    zygote_pid: int
    worker_restarts: int = Field(description="Workers replaced because they died.")
    workers_recycled: int = Field(description="Workers replaced because they had served long enough.")
    queued: int = Field(description="Requests that wait for a worker.")
    sessions: int = Field(description="Open sessions.")
    max_sessions: int


class ReadyAnswer(BaseModel):
    """Whether a snippet could start now."""

    ready: bool
    workers: int = Field(description="Live workers.")


class Refusal(BaseModel):
    """Why nothing was done."""

    detail: str


def native_shape(result: ExecutionResult) -> dict[str, Any]:
    """The content of an :class:`ExecuteAnswer`."""
    return {name: getattr(result, name) for name in ExecuteAnswer.model_fields}


def fusion_failure(message: str) -> dict[str, Any]:
    """The content of a :class:`RunCodeAnswer` for what did not run."""
    return {
        "status": "SandboxError",
        "message": message,
        "compile_result": None,
        "run_result": None,
        "executor_pod_name": None,
        "files": {},
    }


def fusion_shape(result: ExecutionResult) -> dict[str, Any]:
    """SandboxFusion has fewer statuses: what it lacks is told by the return code and the standard error."""
    if result.status.is_infrastructure:
        return fusion_failure(result.message)
    timed_out = result.status is Status.TIMEOUT
    return {
        **fusion_failure(result.message),
        "status": "Success" if result.exit_code == 0 else "Failed",
        "run_result": {
            "status": "TimeLimitExceeded" if timed_out else "Finished",
            "execution_time": result.run_seconds,
            "return_code": None if timed_out else result.exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        },
        "files": {path: base64.b64encode(content).decode() for path, content in result.files.items()},
    }
