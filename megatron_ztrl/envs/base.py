"""What the rollout needs from an environment: where generation must stop, and what happens there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.types import ExecutionResult, Prompt

Execute = Callable[[str], Awaitable[ExecutionResult]]
CountTokens = Callable[[str], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reaction:
    """An environment's answer to a stop: the end of the rollout, or text to go on with."""

    finished: bool = False
    reply: str | None = None
    """Text to append, masked out of the loss."""
    code: str | None = None
    result: ExecutionResult | None = None


class Environment(Protocol):
    """One rollout's environment. Stateful: make a new one for every rollout.

    ``turn_text`` is what the policy wrote since the last reply.
    """

    def stop_patterns(self) -> tuple[str, ...]:
        """ASCII regular expressions at which the engine returns. Hints: `find_stop` decides, and may disagree."""
        ...

    def find_stop(self, turn_text: str) -> int | None:
        """How much of the turn to keep, in characters, if the policy has to be stopped; None lets it go on."""
        ...

    async def react(self, turn_text: str, *, ended: bool) -> Reaction:
        """Called at a stop.

        Args:
            turn_text: Cut where `find_stop` said; its last token may hold a few characters more.
            ended: The policy ended its response by itself.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutContext:
    """What an environment is made of: ``tool.environment`` names a class or function that takes one."""

    prompt: Prompt
    env_iterations: int
    """N, the most executions; what is left of them when an earlier run's rollout is gone on with."""
    template_stop: tuple[str, ...]
    """Stop strings of the prompt template; they end the rollout."""
    execute: Execute
    """Runs one snippet in the sandbox."""
    count_tokens: CountTokens
    """Length of a text in tokens, to bound a reply."""
    config: ToolConfig


MakeEnvironment = Callable[[RolloutContext], Environment]
