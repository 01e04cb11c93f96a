"""What ``/metrics`` exports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ztrl_sandbox.pool import WorkerPool
from ztrl_sandbox.protocol import ExecutionResult, Status
from ztrl_sandbox.sessions import End

_BUCKETS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, pool: WorkerPool) -> None:
        self.registry = CollectorRegistry()
        self._executions = Counter(
            "ztrl_sandbox_executions", "Requests by outcome.", ["status"], registry=self.registry
        )
        self._run = Histogram(
            "ztrl_sandbox_run_seconds",
            "Run time of a snippet.",
            buckets=_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "ztrl_sandbox_queue_seconds",
            "Wait for a worker.",
            buckets=_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self._session_executions = Counter(
            "ztrl_sandbox_session_executions",
            "Those of them that were calls in a session.",
            ["status"],
            registry=self.registry,
        )
        self._sessions = Gauge("ztrl_sandbox_sessions", "Open sessions.", registry=self.registry)
        self._sessions_opened = Counter(
            "ztrl_sandbox_sessions_opened", "Sessions opened.", registry=self.registry
        )
        self._sessions_ended = Counter(
            "ztrl_sandbox_sessions_ended", "Sessions ended, by cause.", ["cause"], registry=self.registry
        )
        for status in Status:
            self._executions.labels(status)
            self._session_executions.labels(status)
        for cause in End:
            self._sessions_ended.labels(cause)
        for name, text, read in (
            ("queued", "Requests waiting for a worker.", lambda: pool.queued),
            ("idle_workers", "Workers waiting for a request.", lambda: pool.idle),
            ("workers", "Live workers.", lambda: len(pool.worker_pids)),
            ("worker_restarts", "Workers replaced because they died.", lambda: pool.restarts),
            ("workers_recycled", "Workers replaced after long service.", lambda: pool.recycled),
        ):
            Gauge(f"ztrl_sandbox_{name}", text, registry=self.registry).set_function(read)

    def observe(self, result: ExecutionResult, *, in_session: bool = False) -> None:
        """Count one answered request."""
        self._executions.labels(result.status).inc()
        if in_session:
            self._session_executions.labels(result.status).inc()
        if not result.status.is_infrastructure:
            self._run.observe(result.run_seconds)
            self._queue.observe(result.queue_seconds)

    def session_opened(self) -> None:
        """Count it."""
        self._sessions.inc()
        self._sessions_opened.inc()

    def session_ended(self, cause: End) -> None:
        """Count it."""
        self._sessions.dec()
        self._sessions_ended.labels(cause).inc()

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
