"""What the simulated policy writes, and the programs it has run."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass

from _simulated_engine import Continuation
from _simulated_time import CpuMeter

from megatron_ztrl.rollout.trajectory import Tokenizer
from megatron_ztrl.types import ExecutionResult, ExecutionStatus

_END_OF_SEQUENCE = 0

_PROSE = (
    "We want the number of ways to choose 3 of the 12 points such that no two of them are next to each other. "
    "Fix the first point; by symmetry, count the choices of the other two among the 9 that remain, and divide "
    "by 3 because each triple is counted once for each of its points. Let x = 9, so x(x - 1)/2 - (x - 1) = 28. "
)
_PROGRAM = """
```python
# {name}
from itertools import combinations
total = 0
for triple in combinations(range(12), 3):
    if all((b - a) % 12 not in (1, 11) for a, b in combinations(triple, 2)):
        total += 1
print(total)
```
"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How long rollouts are, drawn from their ids: every design rolls out the same ones."""

    seed: int = 0
    prompt_tokens: int = 300
    median_response_tokens: int = 3000
    """Tokens of the policy, log-normal."""
    response_sigma: float = 0.9
    """Of the logarithm."""
    max_response_tokens: int = 16384
    mean_calls: float = 4.0
    """Exponential, rounded down."""
    max_calls: int = 20
    median_tool_seconds: float = 0.2
    """Log-normal."""
    tool_sigma: float = 1.5
    tool_timeout_seconds: float = 20.0


@dataclass(kw_only=True)
class _Script:
    """What a rollout will have written when nothing stops it, turn by turn."""

    random: random.Random
    turn_lengths: list[int]
    """Tokens of prose; every turn but the last ends with a program."""
    turn: int = 0
    token_ids: list[int]
    """Of this turn."""
    said: int = 0


class SimulatedPolicy:
    """Writes prose and programs. Implements ``_simulated_engine.Policy``."""

    def __init__(self, workload: Workload, tokenizer: Tokenizer) -> None:
        self._workload = workload
        self._tokenizer = tokenizer
        prose = tokenizer.encode(_PROSE, add_special_tokens=False)
        self._prose_ids = prose * (2 + workload.max_response_tokens // len(prose))
        self._prose_period = len(prose)
        self.prompt_tokens = workload.prompt_tokens
        self.prompt_text = self._text_of_length(workload.prompt_tokens)
        self._scripts: dict[str, _Script] = {}

    def continue_rollout(self, rollout_id: str, max_new_tokens: int) -> Continuation:
        script = self._scripts.get(rollout_id)
        if script is None:
            script = self._scripts[rollout_id] = self._new_script(rollout_id)
        rest = script.token_ids[script.said :]
        if len(rest) > max_new_tokens:
            return Continuation(token_ids=rest[:max_new_tokens], finish_reason={"type": "length"})
        matched: str | int = "```[^p]" if script.turn < len(script.turn_lengths) - 1 else _END_OF_SEQUENCE
        return Continuation(token_ids=rest, finish_reason={"type": "stop", "matched": matched})

    def said(self, rollout_id: str, tokens: int) -> None:
        script = self._scripts[rollout_id]
        script.said += tokens
        if script.said == len(script.token_ids) and script.turn < len(script.turn_lengths) - 1:
            script.turn, script.said = script.turn + 1, 0
            script.token_ids = self._turn_ids(script, rollout_id)

    def forget(self, rollout_id: str) -> None:
        """The rollout is complete."""
        del self._scripts[rollout_id]

    def _new_script(self, rollout_id: str) -> _Script:
        workload = self._workload
        rng = random.Random(f"{workload.seed}/{rollout_id}")
        length = rng.lognormvariate(math.log(workload.median_response_tokens), workload.response_sigma)
        calls = min(workload.max_calls, int(rng.expovariate(1 / workload.mean_calls)))
        weights = [rng.expovariate(1.0) for _ in range(calls + 1)]
        length = min(length, workload.max_response_tokens)
        turn_lengths = [1 + int(length * weight / sum(weights)) for weight in weights]
        script = _Script(random=rng, turn_lengths=turn_lengths, token_ids=[])
        script.token_ids = self._turn_ids(script, rollout_id)
        return script

    def _turn_ids(self, script: _Script, rollout_id: str) -> list[int]:
        start = script.random.randrange(self._prose_period)
        token_ids = self._prose_ids[start : start + script.turn_lengths[script.turn]]
        if script.turn < len(script.turn_lengths) - 1:
            program = _PROGRAM.format(name=f"{self._workload.seed}/{rollout_id}/{script.turn}")
            return token_ids + self._tokenizer.encode(program, add_special_tokens=False)
        return token_ids

    def _text_of_length(self, tokens: int) -> str:
        text = self._tokenizer.decode(self._prose_ids[:tokens])
        self.prompt_tokens = len(self._tokenizer.encode(text, add_special_tokens=False))
        return text


class SimulatedExecutors:
    """Executors with so many workers together; snippets beyond that wait in order."""

    def __init__(self, workload: Workload, workers: int, meter: CpuMeter) -> None:
        self._workload = workload
        self._workers = asyncio.Semaphore(workers)
        self._meter = meter

    async def execute(self, code: str) -> ExecutionResult:
        """Takes as long as the seed in the program's first line says."""
        workload = self._workload
        with self._meter.simulation():
            rng = random.Random(code.partition("\n")[0])
            seconds = rng.lognormvariate(math.log(workload.median_tool_seconds), workload.tool_sigma)
            stdout = _PROSE[: rng.randrange(1, len(_PROSE))]
        timed_out = seconds > workload.tool_timeout_seconds
        seconds = min(seconds, workload.tool_timeout_seconds)
        loop = asyncio.get_running_loop()
        queued_at = loop.time()
        async with self._workers:
            queue_seconds = loop.time() - queued_at
            await asyncio.sleep(seconds)
        return ExecutionResult(
            status=ExecutionStatus.TIMEOUT if timed_out else ExecutionStatus.OK,
            stdout="" if timed_out else stdout,
            stderr="",
            run_seconds=seconds,
            queue_seconds=queue_seconds,
        )
