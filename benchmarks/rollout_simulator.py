"""Throughput of the real scheduler and rollout code at the scale of a 32B run, on simulated engines and executors.

Real: `RolloutScheduler`, `GroupRunner`, `EngineFleet`, `run_rollout`, `PythonTool`, `Journal`, the engine client with
its JSON, the pausing and resuming of engines, the tokenizer. Simulated, on a clock that jumps from event to event:
SGLang servers, Python programs, the trainer, the transfer of weights. Nothing is random but by seed, and every
design rolls out the same responses.

How long things take comes from `ztrl plan`'s stated numbers of an H100 and Qwen2.5-32B in bfloat16: 32 engines of
TP 4 that run 64 requests each (and have 80 rollouts while some wait for a tool), and a trainer of TP 8 x PP 4 x DP 3,
which is about as fast as they are: the hardest case for whatever is to keep both busy (`--trainer-replicas`). A decode
step reads the weights once, and the keys and values of every sequence; prefill stops the batch for as long as its
FLOPs take; a publish pauses all engines for its transfer, and what they had cached is computed anew. Other numbers in
flight keep 64 to an engine, and a trainer in proportion. `simulator_fit.py` compares the simulated engine with the real
one.

The driver's share of a core is what the process spends outside of the simulation, its journal included. HTTP is
measured beside it, on loopback with the real client; the verifier's processes are not in it.

Designs, all on the same machines:

* *interrupted, S*: this project. A publish interrupts decoding; groups of S + 1 steps are in flight.
* *drained, S*: the same without interruption. A publish waits until the running requests are complete.
* *barrier*: S = 0. Generate a batch, train on it, publish, and so on.
* *barrier, shared GPUs*: the same, but trainer and engines take turns on all GPUs, and changing over costs nothing.

The bound is the slower of two: engines whose batches are always full and that never compute a prefix twice, and a
trainer that never waits. Publishing is free in it. It is computed from the rollouts that the design trained on.

    python benchmarks/rollout_simulator.py [--rollouts-in-flight 10000 --designs interrupted] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import resource
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from _simulated_engine import SimulatedClient, SimulatedEngine
from _simulated_http import http_seconds_per_call
from _simulated_policy import SimulatedExecutors, SimulatedPolicy
from _simulated_scenario import (
    Scenario,
    generation_bound_seconds,
    needed_prefill,
    planned_scenario,
    shared_gpus,
)
from _simulated_time import CpuMeter, run_virtually
from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.schema import RolloutConfig, ToolConfig
from megatron_ztrl.engines import interruption
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.journal import Journal
from megatron_ztrl.rollout.scheduler import RolloutScheduler, TakenGroups
from megatron_ztrl.rollout.trajectory import Sampling, Tokenizer
from megatron_ztrl.runtime.garbage import collect_garbage_rarely
from megatron_ztrl.types import Prompt, RolloutGroup

BARRIER, SHARED = "barrier", "barrier, shared GPUs"
TOKENIZER = Path(__file__).parents[1] / "examples" / "quickstart" / "base"


@dataclass(frozen=True, kw_only=True)
class Design:
    """How generation and training take turns."""

    name: str
    max_staleness: int
    interruption: Literal["retract", "abort", "drain"]


@dataclass(kw_only=True)
class Figures:
    """What was measured, over the measured steps."""

    step_seconds: float
    rollouts_per_second: float
    sampled_tokens_per_second: float
    trainer_busy: float
    mean_batch: float
    """Sequences that decode at once, per engine."""
    recomputed: float
    """Tokens whose keys and values were computed more than once, per sampled token."""
    worst_staleness: int
    bound_generation_seconds: float
    """Of one step, as is the next."""
    bound_training_seconds: float
    mean_in_flight: float
    peak_in_flight: int
    driver_cpu: float
    """Share of one core per 1,000 rollouts in flight, HTTP left out."""
    calls_per_second: float
    request_bytes: int
    """Mean of an engine call, as is the next."""
    reply_bytes: int
    peak_context_tokens: int
    """Of one engine."""
    peak_memory_bytes: int
    groups: list[int]
    """That were trained, in order."""

    def http_cpu(self, seconds_per_call: float) -> float:
        """Share of one core per 1,000 rollouts in flight."""
        return seconds_per_call * self.calls_per_second / self.mean_in_flight * 1000

    @property
    def of_the_bound(self) -> float:
        return max(self.bound_generation_seconds, self.bound_training_seconds) / self.step_seconds


OnStep = Callable[[int, TakenGroups], None]
"""Is given the version that a step begins with, and its groups."""


def simulate(
    scenario: Scenario, design: Design, tokenizer: Tokenizer, on_step: OnStep = lambda version, taken: None
) -> Figures:
    """Runs one design on a virtual clock."""
    return run_virtually(_Run(scenario, design, tokenizer).measure(on_step))


class _Run:
    """One design in its world. Made outside of the loop that runs it."""

    def __init__(self, scenario: Scenario, design: Design, tokenizer: Tokenizer) -> None:
        self._scenario = scenario
        self._design = design
        self._tokenizer = tokenizer
        self._policy = SimulatedPolicy(scenario.workload, tokenizer)
        self._meter = CpuMeter()
        self._in_flight: list[int] = []
        self._trainer_seconds = 0.0

    async def measure(self, on_step: OnStep) -> Figures:
        """The training loop, as in ``megatron_ztrl.loop``."""
        scenario, design = self._scenario, self._design
        async with contextlib.AsyncExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            journal = stack.enter_context(contextlib.closing(Journal(Path(directory), identity="simulated")))
            scheduler, watch = await self._start(stack, journal)
            trained: list[RolloutGroup] = []
            worst_staleness = 0
            warm_up = design.max_staleness + 1
            for version in range(warm_up + scenario.steps):
                if version == warm_up:
                    spent_before = self._spent()
                    self._in_flight.clear()
                taken = await scheduler.take(scenario.groups_per_step)
                seconds = scenario.trainer_seconds(taken.groups)
                self._trainer_seconds += seconds
                await asyncio.sleep(seconds)
                await self._publish(version + 1)
                scheduler.release(len(taken.groups))
                journal.released([*taken.groups, *taken.dropped])
                with self._meter.simulation():
                    on_step(version, taken)
                    oldest = min(r.oldest_version for group in taken.groups for r in group.rollouts)
                    worst_staleness = max(worst_staleness, version - oldest)
                    if version >= warm_up:
                        trained += taken.groups
            figures = self._figures(trained, worst_staleness, spent_before)
            watch.cancel()
            await scheduler.stop()
        return figures

    async def _start(
        self, stack: contextlib.AsyncExitStack, journal: Journal
    ) -> tuple[RolloutScheduler, asyncio.Task[None]]:
        scenario, policy = self._scenario, self._policy
        self._engines = [
            SimulatedEngine(scenario.timing, policy, self._meter) for _ in range(scenario.engines)
        ]
        self._clients = [await stack.enter_async_context(SimulatedClient(engine)) for engine in self._engines]
        fleet = EngineFleet(self._clients, max_concurrent_per_engine=scenario.timing.max_running_requests)
        runner = GroupRunner(
            fleet=fleet,
            tokenizer=self._tokenizer,
            execute=SimulatedExecutors(scenario.workload, scenario.executor_workers, self._meter).execute,
            score=_score,
            template=get_template("orz_tir"),
            tool=ToolConfig(run_timeout_seconds=scenario.workload.tool_timeout_seconds),
            sampling=Sampling(
                temperature=1.0,
                top_p=1.0,
                max_response_tokens=scenario.workload.max_response_tokens,
                max_call_tokens=RolloutConfig.max_call_tokens,
            ),
            journal=journal,
        )

        async def run_group(group_id: int, prompt: Prompt) -> RolloutGroup:
            group = await runner.run(
                group_id,
                prompt,
                group_size=scenario.group_size,
                env_iterations=scenario.workload.max_calls,
            )
            for rollout in group.rollouts:
                policy.forget(rollout.rollout_id)
            return group

        numbers = itertools.count()
        scheduler = RolloutScheduler(
            lambda: _prompt(next(numbers), policy.prompt_text),
            run_group,
            self._keeps,
            groups_per_step=scenario.groups_per_step,
            max_staleness=self._design.max_staleness,
        )
        scheduler.start()
        return scheduler, asyncio.create_task(self._watch(fleet))

    async def _watch(self, fleet: EngineFleet) -> None:
        """Counts the rollouts in flight once a second."""
        while True:
            with self._meter.simulation():
                self._in_flight.append(sum(fleet.load(client) for client in self._clients))
            await asyncio.sleep(1.0)

    async def _publish(self, version: int) -> None:
        how = self._design.interruption
        if how == "drain":
            await asyncio.gather(*(engine.drain() for engine in self._engines))
        strategy: interruption.Strategy = "retract" if how == "drain" else how
        await asyncio.gather(*(interruption.pause(client, strategy) for client in self._clients))
        await asyncio.sleep(self._scenario.publish_seconds)
        for engine in self._engines:
            engine.version = version
        await asyncio.gather(*(client.resume() for client in self._clients))

    def _keeps(self, group: RolloutGroup) -> bool:
        seed = f"{self._scenario.workload.seed}/{group.group_id}"
        return random.Random(seed).random() >= self._scenario.refused_share

    def _spent(self) -> dict[str, float]:
        """So far: virtual seconds, the driver's processor seconds, the trainer's seconds, and the engines' totals."""
        engines = [asdict(engine.totals) for engine in self._engines]
        return {
            "seconds": asyncio.get_running_loop().time(),
            "driver": self._meter.driver_seconds,
            "trainer": self._trainer_seconds,
        } | {key: sum(totals[key] for totals in engines) for key in engines[0]}

    def _figures(
        self, trained: list[RolloutGroup], worst_staleness: int, spent_before: dict[str, float]
    ) -> Figures:
        scenario = self._scenario
        spent = {key: now - spent_before[key] for key, now in self._spent().items()}
        seconds, calls = spent["seconds"], spent["calls"]
        rollouts = [rollout for group in trained for rollout in group.rollouts]
        needed = sum(needed_prefill(group) for group in trained) / sum(sum(r.loss_mask) for r in rollouts)
        in_flight = fmean(self._in_flight)
        return Figures(
            step_seconds=seconds / scenario.steps,
            rollouts_per_second=len(rollouts) / seconds,
            sampled_tokens_per_second=spent["sampled_tokens"] / seconds,
            trainer_busy=spent["trainer"] / seconds,
            mean_batch=spent["sequence_seconds"] / seconds / scenario.engines,
            recomputed=spent["prefilled_tokens"] / spent["sampled_tokens"] - needed,
            worst_staleness=worst_staleness,
            bound_generation_seconds=generation_bound_seconds(scenario, trained) / scenario.steps,
            bound_training_seconds=scenario.trainer_seconds(trained) / scenario.steps,
            mean_in_flight=in_flight,
            peak_in_flight=max(self._in_flight),
            driver_cpu=spent["driver"] / seconds / in_flight * 1000,
            calls_per_second=calls / seconds,
            request_bytes=round(spent["request_bytes"] / calls),
            reply_bytes=round(spent["reply_bytes"] / calls),
            peak_context_tokens=max(engine.peak_context_tokens for engine in self._engines),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            groups=[group.group_id for group in trained],
        )


def _prompt(number: int, text: str) -> Prompt:
    return Prompt(prompt_id=str(number), problem="", text=text, ground_truth="", data_source="simulated")


async def _score(text: str, ground_truth: str) -> float:
    """Verification runs in processes of its own; only that it happens matters here."""
    return float(zlib.crc32(text.encode()) & 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts-in-flight", type=int, default=2048)
    parser.add_argument("--staleness", type=int, nargs="+", default=[4], help="S, several for a sweep")
    parser.add_argument(
        "--designs",
        nargs="+",
        choices=["interrupted", "drained", "barrier", "shared"],
        default=["interrupted", "drained", "barrier", "shared"],
    )
    parser.add_argument("--trainer-replicas", type=int, default=3, help="DP of the trainer beside 32 engines")
    parser.add_argument("--steps", type=int, default=6, help="measured, after S + 1 that are not")
    parser.add_argument("--refused-share", type=float, default=0.0, help="of groups, by the filter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    from megatron_ztrl.data.tokenizer import PolicyTokenizer

    scenario = planned_scenario(
        rollouts_in_flight=options.rollouts_in_flight,
        trainer_replicas=options.trainer_replicas,
        steps=options.steps,
        seed=options.seed,
        refused_share=options.refused_share,
    )
    collect_garbage_rarely()  # as in a run
    tokenizer = PolicyTokenizer(TOKENIZER)
    figures: dict[str, Figures] = {}
    for design in _designs(options.designs, options.staleness):
        shared = design.name == SHARED
        world = shared_gpus(scenario, options.trainer_replicas) if shared else scenario
        figures[design.name] = measured = simulate(world, design, tokenizer)
        print(f"{design.name}: {measured.rollouts_per_second:.2f} rollouts/s", file=sys.stderr)
    first = next(iter(figures.values()))
    http_seconds = http_seconds_per_call(first.request_bytes, first.reply_bytes)
    print_report(scenario, figures, http_seconds)
    if options.json:
        rows = {name: asdict(each) | {"of_the_bound": each.of_the_bound} for name, each in figures.items()}
        report = {"scenario": asdict(scenario), "http_seconds_per_call": http_seconds, "designs": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _designs(names: Sequence[str], staleness: Sequence[int]) -> list[Design]:
    found = []
    if "interrupted" in names:
        found += [
            Design(name=f"interrupted, S = {s}", max_staleness=s, interruption="retract") for s in staleness
        ]
    if "drained" in names:
        found += [Design(name=f"drained, S = {s}", max_staleness=s, interruption="drain") for s in staleness]
    if "barrier" in names:
        found.append(Design(name=BARRIER, max_staleness=0, interruption="retract"))
    if "shared" in names:
        found.append(Design(name=SHARED, max_staleness=0, interruption="retract"))
    return found


def print_report(scenario: Scenario, figures: dict[str, Figures], http_seconds: float) -> None:
    """A table, one column for each design."""
    timing, console = scenario.timing, Console()
    batch = timing.max_running_requests
    console.print(
        f"{scenario.engines} engines: a decode step of {batch} sequences with 3,000 tokens each takes"
        f" {timing.decode_step_seconds(batch, batch * 3000) * 1e3:.1f} ms, prefill"
        f" {1 / timing.prefill_token_seconds:,.0f} tokens/s; publish {scenario.publish_seconds:.2f} s;"
        f" {scenario.groups_per_step} groups of {scenario.group_size} per step"
    )
    barrier = figures.get(BARRIER)
    table = Table("figure", *figures)

    def row(name: str, value: Callable[[Figures], str]) -> None:
        table.add_row(name, *(value(each) for each in figures.values()))

    row("seconds per step", lambda f: f"{f.step_seconds:.1f}")
    row("rollouts per second", lambda f: f"{f.rollouts_per_second:.2f}")
    row("sampled tokens per second", lambda f: f"{f.sampled_tokens_per_second:,.0f}")
    if barrier is not None:
        row("x barrier", lambda f: f"{f.rollouts_per_second / barrier.rollouts_per_second:.2f}")
    row("bound: generation, seconds per step", lambda f: f"{f.bound_generation_seconds:.1f}")
    row("bound: training, seconds per step", lambda f: f"{f.bound_training_seconds:.1f}")
    row("share of the bound", lambda f: f"{f.of_the_bound:.3f}")
    row("trainer busy", lambda f: f"{f.trainer_busy:.1%}")
    row(f"sequences decoding per engine, of {batch}", lambda f: f"{f.mean_batch:.1f}")
    row("tokens computed again per sampled token", lambda f: f"{f.recomputed:.2f}")
    row("worst staleness", lambda f: str(f.worst_staleness))
    row("rollouts in flight, mean", lambda f: f"{f.mean_in_flight:,.0f}")
    row("rollouts in flight, peak", lambda f: f"{f.peak_in_flight:,}")
    row("most tokens in one engine's batch", lambda f: f"{f.peak_context_tokens:,}")
    row("driver, of a core per 1,000 in flight", lambda f: f"{f.driver_cpu:.1%}")
    row("HTTP beside it, likewise", lambda f: f"{f.http_cpu(http_seconds):.1%}")
    row("memory of driver and simulation, GB", lambda f: f"{f.peak_memory_bytes / 1e9:.2f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
