"""Rolls out and scores the siblings of one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.base import Execute, MakeEnvironment, RolloutContext
from megatron_ztrl.envs.prompt_templates import PromptTemplate
from megatron_ztrl.envs.python_tool import PythonTool
from megatron_ztrl.rollout.deadlines import Deadlines, GroupDeadline
from megatron_ztrl.rollout.journal import Journal
from megatron_ztrl.rollout.trajectory import Engine, Sampling, Tokenizer, complete, encode_reply, run_rollout
from megatron_ztrl.types import Prompt, Rollout, RolloutGroup

Score = Callable[[str, str], Awaitable[float]]
"""(response text, ground truth) -> reward."""


class Fleet(Protocol):
    """Where rollouts find engines: an `EngineFleet`, or a share of one."""

    def engine(self) -> AbstractAsyncContextManager[Engine]:
        """The engine of one rollout."""
        ...


@dataclass(frozen=True, kw_only=True)
class GroupRunner:
    """Everything that a group of rollouts needs."""

    fleet: Fleet
    tokenizer: Tokenizer
    execute: Execute
    score: Score
    template: PromptTemplate
    tool: ToolConfig
    sampling: Sampling
    make_environment: MakeEnvironment = PythonTool.of
    journal: Journal | None = None
    """Where rollouts are written down, and from where those of an earlier run are gone on with."""
    deadlines: Deadlines = field(default_factory=Deadlines)

    async def run(
        self, group_id: int, prompt: Prompt, *, group_size: int, env_iterations: int
    ) -> RolloutGroup:
        """Rolls out and scores ``group_size`` siblings with at most ``env_iterations`` executions each."""
        deadline = GroupDeadline(self.deadlines)
        async with asyncio.TaskGroup() as tasks:
            rollouts = [
                tasks.create_task(self._run_one(group_id, index, prompt, env_iterations, deadline))
                for index in range(group_size)
            ]
        return RolloutGroup(group_id=group_id, prompt=prompt, rollouts=[task.result() for task in rollouts])

    async def _run_one(
        self, group_id: int, index: int, prompt: Prompt, env_iterations: int, deadline: GroupDeadline
    ) -> Rollout:
        recorder = self.journal.recorder(group_id, index) if self.journal else None
        rollout = recorder.restored if recorder else None
        if rollout is None or rollout.stop_reason is None:
            environment = self.make_environment(
                RolloutContext(
                    prompt=prompt,
                    env_iterations=env_iterations - (rollout.executed_calls if rollout else 0),
                    template_stop=self.template.stop,
                    execute=self.execute,
                    count_tokens=self._count_tokens,
                    config=self.tool,
                )
            )
            async with self.fleet.engine() as engine:
                rollout = await run_rollout(
                    f"{group_id}.{index}",
                    prompt,
                    engine=engine,
                    tokenizer=self.tokenizer,
                    environment=environment,
                    sampling=self.sampling,
                    partial=rollout,
                    recorder=recorder,
                    deadline_at=deadline.of_next_rollout(),
                )
        else:
            complete(rollout, self.tokenizer)
        assert rollout.prompt.prompt_id == prompt.prompt_id, (
            "a group id stands for one prompt, also after a resume"
        )
        if rollout.trainable and rollout.reward is None:
            rollout.reward = await self.score(rollout.text, prompt.ground_truth)
        if recorder:
            recorder.finished(rollout)
        return rollout

    def _count_tokens(self, text: str) -> int:
        return len(encode_reply(text, self.tokenizer))
