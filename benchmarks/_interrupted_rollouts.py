"""Real rollouts while weights are published under them, at moments that hurt; everything is recorded."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from _sending_trainer import SendingTrainer
from ztrl_sandbox.client import ExecutorClient

from megatron_ztrl.config.schema import Config
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.envs.python_tool import PythonTool
from megatron_ztrl.rollout.trajectory import Sampling, Tokenizer, encode_reply, run_rollout
from megatron_ztrl.types import Completion, ExecutionResult, ExecutionStatus, Prompt, Rollout
from megatron_ztrl.weights.publish import WeightPublisher

SNIPPET_SECONDS = 0.01
"""Added to every snippet, so that there is time to be interrupted in."""
LONGEST_GAP_SECONDS = 0.005
"""Every request is held back for a random part of it: the time between two turns."""
Moment = Literal["any", "tool", "turn", "at once"]
MOMENTS: tuple[Moment, ...] = ("any", "tool", "turn", "at once")
STATES = ("mid-token", "mid-tool", "between turns")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One reply of the server, as it came, before anything of the project has read it."""

    rollout_id: str
    input_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    spans: list[tuple[int, int, int]]
    """(version, start, end)"""
    finish: str
    retractions: int
    sent_seconds: float
    returned_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """One interruption."""

    version: int
    began_seconds: float
    ended_seconds: float
    pause_seconds: float
    hit: Mapping[str, int]
    """Rollouts by what they were doing when it began (``STATES``)."""
    meanwhile: Mapping[str, int]
    """What went on before it ended: rollouts and requests that began, tool calls that ended."""


@dataclass(kw_only=True)
class Record:
    """All that happened."""

    calls: list[Call] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    publishes: list[Publish] = field(default_factory=list)
    seconds: float = 0.0
    """From the first rollout's start to the last one's end."""


class Activity:
    """What the rollouts are doing, and how often each thing has happened."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        self.tool_began = asyncio.Event()
        self.turn_ended = asyncio.Event()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Count it while it lasts."""
        self.now[what] += 1
        self.total[f"{what} began"] += 1
        try:
            yield
        finally:
            self.now[what] -= 1
            self.total[f"{what} ended"] += 1

    def states(self) -> dict[str, int]:
        """Rollouts in flight by ``STATES``."""
        token, tool = self.now["request"], self.now["tool call"]
        return dict(zip(STATES, (token, tool, self.now["rollout"] - token - tool), strict=True))


class RecordingClient(EngineClient):
    """Keeps the server's replies."""

    def __init__(self, url: str, activity: Activity, chance: random.Random) -> None:
        super().__init__(url, request_timeout_seconds=300)
        self.calls: list[Call] = []
        self._activity = activity
        self._chance = chance

    async def generate(self, input_ids: Sequence[int], **options: Any) -> Completion:
        self._activity.turn_ended.set()
        await asyncio.sleep(self._chance.uniform(0, LONGEST_GAP_SECONDS))
        with self._activity.doing("request"):
            return await super().generate(input_ids, **options)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        sent = time.perf_counter()
        reply = await super()._post(path, body)
        if path == "/generate" and "rid" in body:
            meta = reply["meta_info"]
            self.calls.append(
                Call(
                    rollout_id=body["rid"].rsplit("-", 1)[0],
                    input_ids=list(body["input_ids"]),
                    token_ids=list(reply["output_ids"]),
                    logprobs=[entry[0] for entry in meta.get("output_token_logprobs", [])],
                    spans=[(int(s["version"]), s["start"], s["end"]) for s in meta["weight_versions"]],
                    finish=meta["finish_reason"]["type"],
                    retractions=meta.get("num_retractions", 0),
                    sent_seconds=sent,
                    returned_seconds=time.perf_counter(),
                )
            )
        return reply


class Load:
    """Keeps rollouts in flight.

    Args:
        config: Reads ``rollout`` and ``tool``.
        client: The engine.
        executor: Runs the snippets.
        tokenizer: Of the policy.
        prompts: Drawn at random, so that later rollouts meet the prefixes of earlier ones.
        activity: Told what goes on.
        chance: Draws the prompts.
    """

    def __init__(
        self,
        config: Config,
        client: RecordingClient,
        executor: ExecutorClient,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        activity: Activity,
        chance: random.Random,
    ) -> None:
        self._config = config
        self._client = client
        self._executor = executor
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._activity = activity
        self._chance = chance
        self.rollouts: list[Rollout] = []

    @contextlib.asynccontextmanager
    async def running(self, in_flight: int) -> AsyncIterator[None]:
        """Keep ``in_flight`` rollouts in flight until the block ends, then let them finish."""
        goes_on = True

        async def one_after_the_other() -> None:
            while goes_on:
                await self._roll_out()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(one_after_the_other())
            try:
                yield
            finally:
                goes_on = False

    async def _roll_out(self) -> None:
        rollout = self._config.rollout
        with self._activity.doing("rollout"):
            finished = await run_rollout(
                f"rollout{self._activity.total['rollout began']}",
                self._chance.choice(self._prompts),
                engine=self._client,
                tokenizer=self._tokenizer,
                environment=PythonTool(
                    self._execute,
                    lambda text: len(encode_reply(text, self._tokenizer)),
                    env_iterations=rollout.env_iterations,
                    template_stop=(),
                    config=self._config.tool,
                ),
                sampling=Sampling(
                    temperature=rollout.temperature,
                    top_p=rollout.top_p,
                    max_response_tokens=rollout.max_response_tokens,
                ),
            )
        self.rollouts.append(finished)

    async def _execute(self, code: str) -> ExecutionResult:
        self._activity.tool_began.set()
        with self._activity.doing("tool call"):
            result = await self._executor.execute(
                f"__import__('time').sleep({SNIPPET_SECONDS})\n{code}",
                run_timeout_seconds=self._config.tool.run_timeout_seconds,
            )
        return ExecutionResult(
            status=ExecutionStatus(result.status),
            stdout=result.stdout,
            stderr=result.stderr,
            run_seconds=result.run_seconds,
            queue_seconds=result.queue_seconds,
        )


class Interrupter:
    """Publishes one new version after the other, at random moments.

    Args:
        publisher: The real one.
        trainer: Makes the versions.
        activity: Says what the rollouts are doing.
        chance: Draws the moments.
        mean_interval_seconds: Between two publishes, where no particular moment is waited for.
    """

    def __init__(
        self,
        publisher: WeightPublisher,
        trainer: SendingTrainer,
        activity: Activity,
        chance: random.Random,
        mean_interval_seconds: float,
    ) -> None:
        self._publisher = publisher
        self._trainer = trainer
        self._activity = activity
        self._chance = chance
        self._mean_interval_seconds = mean_interval_seconds
        self._version = 0
        self._moments: list[Moment] = []
        self.publishes: list[Publish] = []

    async def publish(self) -> None:
        """Make the next version and publish it, when a random moment has come."""
        self._version += 1
        await self._trainer.hold(self._version)
        if self._version > 1:
            await self._moment()
        hit, total = self._activity.states(), self._activity.total.copy()
        began = time.perf_counter()
        report = await self._publisher.publish(self._version)
        self.publishes.append(
            Publish(
                version=self._version,
                began_seconds=began,
                ended_seconds=time.perf_counter(),
                pause_seconds=report.pause_seconds,
                hit=hit,
                meanwhile=self._activity.total - total,
            )
        )

    async def _moment(self) -> None:
        """Any time, while a snippet runs, right after a turn, or at once after the last publish: each in its turn."""
        if not self._moments:
            self._moments = self._chance.sample(MOMENTS, len(MOMENTS))
        kind = self._moments.pop()
        if kind == "any":
            await asyncio.sleep(self._chance.expovariate(1 / self._mean_interval_seconds))
        elif kind != "at once":
            event = self._activity.tool_began if kind == "tool" else self._activity.turn_ended
            event.clear()
            async with asyncio.timeout(60):  # a policy that calls no tool
                await event.wait()
            if kind == "tool":
                await asyncio.sleep(self._chance.uniform(0, SNIPPET_SECONDS))


async def interrupt_rollouts(
    config: Config,
    url: str,
    executor: ExecutorClient,
    tokenizer: Tokenizer,
    trainer: SendingTrainer,
    prompts: Sequence[Prompt],
    *,
    interrupts: Iterable[int],
    in_flight: int,
    mean_interval_seconds: float,
    seed: int,
) -> Record:
    """Roll out on the server at ``url`` and publish once for each of ``interrupts`` meanwhile.

    Args:
        config: Reads ``publish.interruption`` and what ``Load`` and ``WeightPublisher`` read.
        url: A fresh server, started with this configuration.
        executor: A running one.
        tokenizer: Of the policy.
        trainer: Of this server's policy.
        prompts: What to roll out.
        interrupts: As many as publishes, such as a range or a progress bar of one.
        in_flight: Rollouts; more than ``engine.max_running_requests`` wait in the server.
        mean_interval_seconds: See ``Interrupter``.
        seed: Draws prompts and moments; the tokens are the server's to draw.
    """
    activity, chance = Activity(), random.Random(seed)
    async with RecordingClient(url, activity, chance) as client:
        publisher = WeightPublisher(config, trainer, [client], timeout_seconds=60)
        load = Load(config, client, executor, tokenizer, prompts, activity, chance)
        interrupter = Interrupter(publisher, trainer, activity, chance, mean_interval_seconds)
        try:
            await interrupter.publish()
            began = time.perf_counter()
            async with load.running(in_flight):
                for _ in interrupts:
                    await interrupter.publish()
            seconds = time.perf_counter() - began
        finally:
            await publisher.close()
    return Record(
        calls=client.calls, rollouts=load.rollouts, publishes=interrupter.publishes, seconds=seconds
    )
