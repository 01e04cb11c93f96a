"""Does the simulated engine tell the truth? Fits it to the real SGLang server on this machine, and predicts a batch.

1. Fit: `--tokens` tokens for n requests at once, n from 1 to 64, give a decode step's time as a + b n.
2. A real batch: the quickstart's prompts, the tool included, all rollouts at once.
3. The same tokens and the same times of programs, in the simulator: how long does it think the batch takes?

Driver, engine and executors share this machine's cores, which the simulation knows nothing of.

    python benchmarks/simulator_fit.py [--json FILE] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _simulated_engine import Continuation, EngineTiming, SimulatedClient, SimulatedEngine
from _simulated_time import CpuMeter, run_virtually
from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.group import GroupRunner
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.runtime.system import RolloutSystem, launch_rollouts
from megatron_ztrl.types import ExecutionResult, Prompt, Rollout

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "config.yaml"
AT_ONCE = (1, 4, 16, 64)
PREFILL_TOKENS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=64, help="in the batch")
    parser.add_argument("--tokens", type=int, default=100, help="of each request of the fit")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of the fit and of the batch; the fastest counts"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = load_config(CONFIG, [f"run.directory={directory}", *options.overrides])
        figures = asyncio.run(measure(config, options))
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


async def measure(config: Config, options: argparse.Namespace) -> dict[str, float]:
    """Returns the fit, its errors, and the batch, real and simulated."""
    tokenizer = PolicyTokenizer(Path(config.model.path))
    prompts = load_prompts(config.data.train, get_template(config.data.prompt_template).render)
    source = PromptSource(
        prompts, seed=0, max_prompt_tokens=config.data.max_prompt_tokens, tokenize=tokenizer.encode
    )
    batch = list(islice(source, options.rollouts))
    with Progress(2) as progress:
        async with launch_rollouts(config, Path(config.run.directory), tokenizer, progress) as system:
            progress.phase("fitting")
            (engine,) = system.engines.clients
            steps = await _step_seconds(engine, options.tokens, options.repeats)
            prefill = await _prefill_token_seconds(engine, options.repeats)
            progress.phase("rolling out")
            runs = [await _batch(system, batch) for _ in range(options.repeats)]
    seconds, rollouts = min(runs, key=lambda run: run[0])
    timing, error = fit(steps, prefill, config.engine.max_running_requests)
    # The simulator has an event loop of its own.
    replay = await asyncio.to_thread(run_virtually, _replay(config, tokenizer, timing, batch, rollouts))
    return {
        **{f"decode step of {n}, ms": value * 1e3 for n, value in steps.items()},
        "fit: step, ms": timing.step_seconds * 1e3,
        "fit: and for each sequence, ms": timing.sequence_seconds * 1e3,
        "fit: largest relative error": error,
        "fit: prefill, tokens/s": 1 / timing.prefill_token_seconds,
        "batch: tokens sampled": sum(sum(rollout.loss_mask) for rollout in rollouts),
        "batch: programs run": sum(rollout.executed_calls for rollout in rollouts),
        "batch: seconds, real": seconds,
        "batch: seconds, simulated": replay,
        "simulated / real": replay / seconds,
    }


def fit(
    step_seconds: dict[int, float], prefill_token_seconds: float, max_running_requests: int
) -> tuple[EngineTiming, float]:
    """Least squares of the relative errors of a + b n. Returns the largest of them, too."""
    at_once = np.array(list(step_seconds))
    seconds = np.array(list(step_seconds.values()))
    columns = np.stack([1 / seconds, at_once / seconds], axis=1)
    (fixed, each), *_ = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)
    timing = EngineTiming(
        step_seconds=float(fixed),
        sequence_seconds=float(each),
        context_token_seconds=0.0,  # a tiny model's contexts cost next to nothing
        prefill_token_seconds=prefill_token_seconds,
        max_running_requests=max_running_requests,
    )
    return timing, float(np.abs(columns @ [fixed, each] - 1).max())


async def _step_seconds(engine: EngineClient, tokens: int, repeats: int) -> dict[int, float]:
    found = {}
    for at_once in AT_ONCE:
        spent = []
        for _ in range(repeats + 1):  # the first one is not counted
            first = await _timed_requests(engine, at_once, new_tokens=1)
            spent.append((await _timed_requests(engine, at_once, new_tokens=tokens) - first) / (tokens - 1))
        found[at_once] = min(spent[1:])
    return found


async def _prefill_token_seconds(engine: EngineClient, repeats: int) -> float:
    at_once = max(AT_ONCE)
    spent = [await _timed_requests(engine, at_once, new_tokens=1) for _ in range(repeats)]
    return min(spent) / (at_once * PREFILL_TOKENS)


async def _timed_requests(engine: EngineClient, at_once: int, *, new_tokens: int) -> float:
    """Seconds of so many requests at once, of random tokens, so that nothing is cached."""
    rng = np.random.default_rng()
    requests: list[dict[str, Any]] = [
        {
            "input_ids": rng.integers(10, 200, PREFILL_TOKENS).tolist(),
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
        }
        for _ in range(at_once)
    ]
    started = time.monotonic()
    await asyncio.gather(*(engine._post("/generate", request) for request in requests))
    return time.monotonic() - started


async def _batch(system: RolloutSystem, prompts: Sequence[Prompt]) -> tuple[float, list[Rollout]]:
    started = time.monotonic()
    rollouts = await _roll_out(system.group_runner(_sampling(system.config)), prompts, system.config)
    return time.monotonic() - started, rollouts


async def _roll_out(runner: GroupRunner, prompts: Sequence[Prompt], config: Config) -> list[Rollout]:
    groups = await asyncio.gather(
        *(
            runner.run(number, prompt, group_size=1, env_iterations=config.rollout.env_iterations)
            for number, prompt in enumerate(prompts)
        )
    )
    return [group.rollouts[0] for group in groups]


def _sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature, top_p=rollout.top_p, max_response_tokens=rollout.max_response_tokens
    )


class _Recorded:
    """Says again what real rollouts said. Implements ``_simulated_engine.Policy``."""

    prompt_tokens = 0
    """One rollout of each prompt: nothing is shared."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._turns = {
            rollout.rollout_id: deque(rollout.token_ids[t.start : t.tool_start] for t in rollout.turns)
            for rollout in rollouts
        }

    def continue_rollout(self, rollout_id: str, max_new_tokens: int) -> Continuation:
        turn = self._turns[rollout_id][0]
        ends = len(self._turns[rollout_id]) == 1
        reason = (
            {"type": "length"}
            if len(turn) == max_new_tokens
            else {"type": "stop", "matched": 0 if ends else "`"}
        )
        return Continuation(token_ids=turn, finish_reason=reason)

    def said(self, rollout_id: str, tokens: int) -> None:
        self._turns[rollout_id].popleft()


async def _replay(
    config: Config,
    tokenizer: PolicyTokenizer,
    timing: EngineTiming,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
) -> float:
    """Virtual seconds of the batch."""
    results: dict[str | None, deque[tuple[float, ExecutionResult]]] = defaultdict(deque)
    for rollout in rollouts:
        for turn in rollout.turns:
            if turn.result is not None:
                seconds = rollout.tool_seconds / rollout.executed_calls
                results[turn.code].append((seconds, turn.result))

    async def execute(code: str) -> ExecutionResult:
        seconds, result = results[code].popleft()
        await asyncio.sleep(seconds)
        return result

    async def score(text: str, truth: str) -> float:
        return 0.0

    async with SimulatedClient(SimulatedEngine(timing, _Recorded(rollouts), CpuMeter())) as client:
        runner = GroupRunner(
            fleet=EngineFleet([client], max_concurrent_per_engine=timing.max_running_requests),
            tokenizer=tokenizer,
            execute=execute,
            score=score,
            template=get_template(config.data.prompt_template),
            tool=config.tool,
            sampling=_sampling(config),
        )
        replayed = await _roll_out(runner, prompts, config)
    assert [r.token_ids for r in replayed] == [r.token_ids for r in rollouts], (
        "the simulation said something else"
    )
    return asyncio.get_running_loop().time()


if __name__ == "__main__":
    sys.exit(main())
