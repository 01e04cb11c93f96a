"""Evaluation: avg@k of the current policy on held-out problems, for each number N of env iterations."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from megatron_ztrl.config.schema import Config, DatasetConfig
from megatron_ztrl.data.prompts import load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.observability import names
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.observability.run_info import write_run_info, write_whole
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.journal import Journal, identity
from megatron_ztrl.rollout.statistics import rollout_statistics
from megatron_ztrl.rollout.trajectory import Engine, Sampling
from megatron_ztrl.runtime.garbage import collect_garbage_rarely
from megatron_ztrl.runtime.system import RolloutSystem, launch_rollouts
from megatron_ztrl.trainer.topology import most_rollout_tokens, read_architecture
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader

_FIRST_MEASURES = (names.ACCURACY, names.CODE_PROPORTION, names.CODE_RATIO)


class UrgentShare:
    """A share of the places that a fleet has (None: all), seated before all that wait for an engine.

    Thousands of rollouts of later training steps may stand in that line, and the next publish, or all of training,
    waits for the evaluation. The share is what leaves training the rest of the engines, however many there are just
    then: engines die, are added and removed.
    """

    def __init__(self, fleet: EngineFleet, share: float | None) -> None:
        self._fleet = fleet
        self._share = share
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        """The engine of one rollout."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            await turn
            async with self._fleet.engine(urgent=True) as engine:
                yield engine
        finally:
            if turn.done() and not turn.cancelled():
                self._inside -= 1
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._has_room():
            turn = self._waiting.popleft()
            if not turn.cancelled():
                turn.set_result(None)
                self._inside += 1

    def _has_room(self) -> bool:
        return self._share is None or self._inside < max(1, int(self._share * self._fleet.capacity))


class Evaluator:
    """Evaluates on the prompts of every data set.

    Args:
        system: The running system.
        prompts: By data set, from `load_eval_prompts`.
    """

    def __init__(self, system: RolloutSystem, prompts: dict[str, list[Prompt]]) -> None:
        self.config = config = system.config
        self._prompts = prompts
        self._runner = system.group_runner(
            Sampling(
                temperature=config.eval.temperature,
                top_p=config.eval.top_p,
                max_response_tokens=config.rollout.max_response_tokens,
                max_call_tokens=config.rollout.max_call_tokens,
            )
        )
        self._beside = UrgentShare(system.fleet, config.eval.beside_share)
        self._alone = UrgentShare(system.fleet, None)

    @property
    def num_prompts(self) -> int:
        """Of all data sets."""
        return sum(map(len, self._prompts.values()))

    @property
    def identity(self) -> str:
        """Tells evaluations apart whose rollouts cannot be mixed."""
        texts = [(prompt.text, prompt.ground_truth) for group in self._prompts.values() for prompt in group]
        return identity(self.config, self._runner.sampling, texts)

    async def evaluate(
        self,
        env_iterations: int,
        *,
        journal: Journal | None = None,
        beside: bool = False,
        count: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[dict[str, float], list[Rollout]]:
        """Rolls out every evaluation prompt.

        Args:
            env_iterations: N.
            journal: Where its rollouts are written down.
            beside: Training goes on meanwhile, and keeps most of the engines.
            count: Told after every prompt how many are done, of how many.

        Returns:
            Metrics ``<data set>/<statistic>``, and the rollouts.
        """
        runner = dataclasses.replace(
            self._runner, journal=journal, fleet=self._beside if beside else self._alone
        )
        metrics: dict[str, float] = {}
        every: list[Rollout] = []
        group_ids, done = itertools.count(), itertools.count(1)

        async def run(group_id: int, prompt: Prompt) -> RolloutGroup:
            size = self.config.eval.samples_per_prompt
            group = await runner.run(group_id, prompt, group_size=size, env_iterations=env_iterations)
            count(next(done), self.num_prompts)
            return group

        for name, prompts in self._prompts.items():
            groups = await asyncio.gather(*(run(next(group_ids), prompt) for prompt in prompts))
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            every += rollouts
            statistics = rollout_statistics(rollouts)
            scored = [group for group in groups if any(rollout.trainable for rollout in group.rollouts)]
            if scored:
                statistics["pass_at_k"] = fmean(
                    any(rollout.reward for rollout in group.rollouts) for group in scored
                )
            metrics |= {f"{name}/{key}": value for key, value in statistics.items()}
        return metrics, every


def load_eval_prompts(config: Config, tokenize: Callable[[str], Sequence[int]]) -> dict[str, list[Prompt]]:
    """The prompts of every evaluation set, by its name.

    A prompt that is too long is refused, not left out as in training: the score would be one on other problems.

    Raises:
        ValueError: A data set is missing or broken, or a prompt and its response outgrow the engine's context; the
            message names file and row.
    """
    template = get_template(config.data.prompt_template)
    prompts = {dataset.name: load_prompts(dataset, template.render) for dataset in config.data.eval}
    for dataset in config.data.eval:
        _check_room(config, dataset, prompts[dataset.name], tokenize)
    return prompts


def _check_room(
    config: Config, dataset: DatasetConfig, prompts: list[Prompt], tokenize: Callable[[str], Sequence[int]]
) -> None:
    limit, reason = most_rollout_tokens(config, read_architecture(Path(config.model.path)))
    tokens, longest = max((len(tokenize(prompt.text)), prompt.prompt_id) for prompt in prompts)
    response, row = config.rollout.max_response_tokens, longest.rpartition(":")[2]
    if tokens + response > limit:
        raise ValueError(
            f"data set {dataset.name!r}: {dataset.path}: row {row}: its prompt, the longest, has {tokens} tokens;"
            f" with rollout.max_response_tokens = {response} that is more than {limit}: {reason}. Lower"
            " rollout.max_response_tokens, or take such rows out"
        )


def run_evaluation(config: Config) -> dict[int, dict[str, float]]:
    """Evaluates the policy at ``model.path``; writes ``<run>/eval.json``, and what was evaluated, after each N.

    Returns:
        Metrics ``<data set>/<statistic>`` by N.

    Raises:
        ValueError: Something the user gave is missing or wrong.
    """
    collect_garbage_rarely()
    return asyncio.run(_run(config))


async def _run(config: Config) -> dict[int, dict[str, float]]:
    if not config.data.eval:
        raise ValueError("data.eval: no data set to evaluate on; add one")
    if not config.eval.env_iterations:
        raise ValueError("eval.env_iterations: no N to evaluate at; name one, e.g. [2]")
    if config.engine.path is not None:
        raise ValueError(
            "engine.path: nothing is published to these engines; set model.path to that checkpoint instead"
        )
    HFCheckpointReader(Path(config.model.path))  # refuses missing weights before an engine starts
    tokenizer = PolicyTokenizer(Path(config.model.path))
    prompts = load_eval_prompts(config, tokenizer.encode)
    directory = Path(config.run.directory)
    results: dict[int, dict[str, float]] = {}
    with Progress(len(config.eval.env_iterations), unit="evaluation") as progress:
        async with launch_rollouts(config, directory, tokenizer, progress) as system:
            evaluator = Evaluator(system, prompts)
            count, samples = evaluator.num_prompts, config.eval.samples_per_prompt
            progress.note(f"evaluating {config.model.path}: {count} problems × {samples} rollouts at each N")
            for env_iterations in config.eval.env_iterations:
                progress.phase(f"evaluating at N = {env_iterations}")
                results[env_iterations], _ = await evaluator.evaluate(env_iterations, count=progress.count)
                # After each N: an interrupted evaluation keeps what it has finished.
                write_run_info(config, prefix="eval_")
                write_whole(directory / "eval.json", json.dumps(results, indent=2) + "\n")
                progress.resume(len(results))
                progress.note(f"N = {env_iterations}  {evaluation_line(results[env_iterations])}")
    return results


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """The measures that people look at first, in one line."""
    shown = [f"{key} {value:.3f}" for key, value in metrics.items() if key.endswith(_FIRST_MEASURES)]
    return "  ".join(shown)
