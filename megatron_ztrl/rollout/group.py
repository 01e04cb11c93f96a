"""Rolls out and scores the siblings of one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.prompt_templates import PromptTemplate
from megatron_ztrl.envs.python_tool import Execute, PythonTool
from megatron_ztrl.rollout.fleet import EngineFleet
from megatron_ztrl.rollout.trajectory import Sampling, Tokenizer, run_rollout
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup

Score = Callable[[str, str], Awaitable[float]]
"""(response text, ground truth) -> reward."""


@dataclass(frozen=True, kw_only=True)
class GroupRunner:
    """Everything that a group of rollouts needs."""

    fleet: EngineFleet
    tokenizer: Tokenizer
    execute: Execute
    score: Score
    template: PromptTemplate
    tool: ToolConfig
    sampling: Sampling

    async def run(
        self, group_id: int, prompt: Prompt, *, group_size: int, env_iterations: int
    ) -> RolloutGroup:
        """Rolls out and scores ``group_size`` siblings with at most ``env_iterations`` executions each."""
        async with asyncio.TaskGroup() as tasks:
            rollouts = [
                tasks.create_task(self._run_one(f"{group_id}.{index}", prompt, env_iterations))
                for index in range(group_size)
            ]
        return RolloutGroup(group_id=group_id, prompt=prompt, rollouts=[task.result() for task in rollouts])

    async def _run_one(self, rollout_id: str, prompt: Prompt, env_iterations: int) -> Rollout:
        environment = PythonTool(
            self.execute,
            self._count_tokens,
            env_iterations=env_iterations,
            template_stop=self.template.stop,
            config=self.tool,
        )
        async with self.fleet.engine() as engine:
            rollout = await run_rollout(
                rollout_id,
                prompt,
                engine=engine,
                tokenizer=self.tokenizer,
                environment=environment,
                sampling=self.sampling,
            )
        if rollout.trainable:
            rollout.reward = await self.score(rollout.text, prompt.ground_truth)
        return rollout

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))
