"""An SGLang server in virtual time: continuous batching, a prefix cache, and the endpoints that rollouts use."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from _simulated_time import CpuMeter

from megatron_ztrl.engines.client import EngineClient

_ROUNDING_TOKENS = 1e-6
_LOGPROBS = [-((index * 0.6180339887) % 1.0) for index in range(1 << 15)]
"""What the policy says of its tokens; their number of digits matters, for they are serialised."""


@dataclass(frozen=True, kw_only=True)
class EngineTiming:
    """How long an engine takes. Decoding is bound by what it reads, which grows with the batch and its contexts."""

    step_seconds: float
    """Of one decode step, apart from the next two: reading the weights, launching, synchronising."""
    sequence_seconds: float
    """More for each sequence in the batch."""
    context_token_seconds: float
    """More for each token of context in the batch: reading its keys and values."""
    prefill_token_seconds: float
    """Of each token that is not in the prefix cache; the batch stands still meanwhile."""
    max_running_requests: int

    def decode_step_seconds(self, sequences: float, context_tokens: float) -> float:
        """One token for each sequence; ``context_tokens`` is of all together."""
        return (
            self.step_seconds
            + sequences * self.sequence_seconds
            + context_tokens * self.context_token_seconds
        )


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the policy is going to say in one call."""

    token_ids: Sequence[int]
    finish_reason: dict[str, Any]
    """As SGLang words it."""


class Policy(Protocol):
    """What decides about the tokens. The engine knows only how long they take."""

    prompt_tokens: int
    """Every prompt is so long; siblings share it in the prefix cache."""

    def continue_rollout(self, rollout_id: str, max_new_tokens: int) -> Continuation:
        """What comes next in this rollout."""
        ...

    def said(self, rollout_id: str, tokens: int) -> None:
        """So many tokens of the continuation were sampled, and answered."""
        ...


@dataclass(kw_only=True)
class _Request:
    rollout_id: str
    input_tokens: int
    continuation: Continuation
    answer: asyncio.Future[bytes]
    cached_tokens: int = 0
    sampled: int = 0
    """Tokens, when it is not running."""
    joined_at: float = 0.0
    """The engine's decode steps when it joined the batch."""
    spans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def prompt_id(self) -> str:
        return self.rollout_id.partition(".")[0]

    @property
    def remaining(self) -> int:
        return len(self.continuation.token_ids) - self.sampled

    @property
    def context_tokens(self) -> int:
        return self.input_tokens + self.sampled

    def add_sampled(self, tokens: int, version: int) -> None:
        """Counts tokens that were sampled under ``version``."""
        if tokens:
            self.spans.append({"version": str(version), "start": self.sampled, "end": self.sampled + tokens})
            self.sampled += tokens

    def reply(self, finish_reason: dict[str, Any]) -> bytes:
        """As SGLang says it."""
        token_ids = self.continuation.token_ids[: self.sampled]
        meta = {
            "finish_reason": finish_reason,
            "output_token_logprobs": list(zip(_LOGPROBS, token_ids, itertools.repeat(None), strict=False)),
            "weight_versions": self.spans,
            "cached_tokens": self.cached_tokens,
        }
        return orjson.dumps({"output_ids": token_ids, "meta_info": meta})


@dataclass(kw_only=True)
class EngineTotals:
    """What an engine has done so far."""

    calls: int = 0
    request_bytes: int = 0
    reply_bytes: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    sequence_seconds: float = 0.0
    """Sum over the requests of the time that each was in the batch and decoding."""


class SimulatedEngine:
    """One server.

    All running sequences advance together, one token in a decode step, so the state is a single count of steps.
    The time of ``k`` steps has a closed form, since every sequence's context grows by one token in each:
    ``a k + c k^2 / 2``, with ``a`` the time of the first step and ``c`` what each makes the next one longer.
    """

    def __init__(self, timing: EngineTiming, policy: Policy, meter: CpuMeter) -> None:
        self.timing = timing
        self.totals = EngineTotals()
        self.peak_context_tokens = 0
        """Of the batch."""
        self.version = 0
        """Of the weights; to be changed while no request runs."""
        self._policy = policy
        self.meter = meter
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._running: list[tuple[float, int, _Request]] = []
        """Heap by the step at which a request is complete."""
        self._steps = 0.0
        self._context_tokens = 0.0
        """Of the running ones together."""
        self._prefill_seconds = 0.0
        """Still to be computed before decoding goes on."""
        self._settled_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._drained = asyncio.Event()
        self._cached: dict[str, int] = {}
        """Tokens of each rollout, and of each prompt, whose keys and values are here."""

    async def generate(self, body: bytes) -> bytes:
        """``/generate``."""
        with self.meter.simulation():
            self.totals.calls += 1
            self.totals.request_bytes += len(body)
            parsed = orjson.loads(body)
            rollout_id = parsed["rid"].partition("-")[0]
            request = _Request(
                rollout_id=rollout_id,
                input_tokens=len(parsed["input_ids"]),
                continuation=self._policy.continue_rollout(
                    rollout_id, parsed["sampling_params"]["max_new_tokens"]
                ),
                answer=self._loop.create_future(),
            )
            self._waiting.append(request)
            self._advance()
        return await request.answer

    def abort_all(self) -> None:
        """``/abort_request``: all requests return what they have."""
        self._stop_sampling()
        for request in self._waiting:
            self._answer(request, {"type": "abort"})
        self._waiting.clear()
        self._advance()

    def pause(self) -> None:
        """``/pause_generation`` with mode ``retract``: what was sampled stays, its keys and values do not."""
        self._paused = True
        self._stop_sampling()
        self._advance()

    def flush_cache(self) -> None:
        """``/flush_cache``."""
        assert not self._running, "SGLang refuses to flush while requests run"
        self._cached.clear()

    async def drain(self) -> None:
        """Starts nothing new, and waits until what runs is complete. No endpoint: a design to compare with."""
        self._paused = True
        if self._running:
            self._drained.clear()
            await self._drained.wait()

    def resume(self) -> None:
        """``/continue_generation``."""
        self._paused = False
        self._advance()

    def _stop_sampling(self) -> None:
        """Puts the batch back to the head of the queue, with the tokens that it has."""
        self._settle()
        for *_, request in sorted(self._running, key=lambda entry: entry[1], reverse=True):
            tokens = math.floor(self._steps - request.joined_at + _ROUNDING_TOKENS)
            self._add_sampled(request, min(tokens, request.remaining))
            self._waiting.appendleft(request)
        self._running.clear()
        self._context_tokens = self._prefill_seconds = 0.0

    def _advance(self) -> None:
        """Brings the engine to now: answers what is complete, fills the batch, sets the timer for what is next."""
        self._settle()
        while self._running and self._running[0][0] <= self._steps + _ROUNDING_TOKENS:
            _, _, request = heapq.heappop(self._running)
            self._add_sampled(request, request.remaining)
            self._context_tokens -= request.context_tokens
            self._cached[request.rollout_id] = request.context_tokens
            self._answer(request, request.continuation.finish_reason)
        while self._waiting and not self._paused and len(self._running) < self.timing.max_running_requests:
            self._start(self._waiting.popleft())
        if not self._running:
            self._context_tokens = 0.0  # without the rounding of many additions
            self._drained.set()
        self.peak_context_tokens = max(self.peak_context_tokens, round(self._context_tokens))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            first, growth = self._first_step()
            steps = max(0.0, self._running[0][0] - self._steps)
            seconds = self._prefill_seconds + first * steps + growth * steps**2 / 2
            self._timer = self._loop.call_at(self._settled_at + seconds, self._on_timer)

    def _on_timer(self) -> None:
        with self.meter.simulation():
            self._timer = None
            self._advance()

    def _settle(self) -> None:
        """Accounts for the time since the last call: first prefill, then decode steps."""
        now = self._loop.time()
        elapsed, self._settled_at = now - self._settled_at, now
        if not self._running:
            return
        prefill = min(elapsed, self._prefill_seconds)
        self._prefill_seconds -= prefill
        elapsed -= prefill
        first, growth = self._first_step()
        steps = 2 * elapsed / (first + math.sqrt(first**2 + 2 * growth * elapsed))
        self._steps += steps
        self._context_tokens += len(self._running) * steps
        self.totals.sequence_seconds += len(self._running) * elapsed

    def _first_step(self) -> tuple[float, float]:
        """Seconds of the next decode step, and by how much each makes the one after it longer."""
        running = len(self._running)
        seconds = self.timing.decode_step_seconds(running, self._context_tokens)
        return seconds, running * self.timing.context_token_seconds

    def _start(self, request: _Request) -> None:
        if request.answer.cancelled():
            return
        shared = self._cached.setdefault(request.prompt_id, 0)
        cached = max(shared, self._cached.get(request.rollout_id, 0))
        self._cached[request.prompt_id] = self._policy.prompt_tokens
        request.cached_tokens = max(request.cached_tokens, cached)
        uncached = request.context_tokens - cached
        self.totals.prefilled_tokens += uncached
        self._prefill_seconds += uncached * self.timing.prefill_token_seconds
        self._context_tokens += request.context_tokens
        request.joined_at = self._steps
        heapq.heappush(self._running, (self._steps + request.remaining, next(self._numbers), request))

    def _add_sampled(self, request: _Request, tokens: int) -> None:
        request.add_sampled(tokens, self.version)
        self.totals.sampled_tokens += tokens

    def _answer(self, request: _Request, finish_reason: dict[str, Any]) -> None:
        self._policy.said(request.rollout_id, request.sampled)
        if not request.answer.done():
            reply = request.reply(finish_reason)
            self.totals.reply_bytes += len(reply)
            request.answer.set_result(reply)


class SimulatedClient(EngineClient):
    """The real client; only the connection to the server is replaced, by calls."""

    def __init__(self, engine: SimulatedEngine) -> None:
        super().__init__("http://simulated", request_timeout_seconds=math.inf)
        self._engine = engine

    async def _request(self, method: str, path: str, data: bytes | None) -> Any:
        if path == "/generate":
            assert data is not None
            return orjson.loads(await self._engine.generate(data))
        endpoints = {
            "/abort_request": self._engine.abort_all,
            "/pause_generation": self._engine.pause,
            "/flush_cache": self._engine.flush_cache,
            "/continue_generation": self._engine.resume,
        }
        with self._engine.meter.simulation():
            endpoints[path]()
        return None
