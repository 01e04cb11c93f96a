"""What the rollout needs from an environment: where generation must stop, and what happens there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_ztrl.types import ExecutionResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Reaction:
    """An environment's answer to a stop. The default one just lets generation go on."""

    finished: bool = False
    reply: str | None = None
    """Text to append, masked out of the loss."""
    code: str | None = None
    result: ExecutionResult | None = None


class Environment(Protocol):
    """One rollout's environment. Stateful: make a new one for every rollout."""

    def stop_strings(self) -> tuple[str, ...]:
        """The strings at which the engine must stop next."""
        ...

    async def react(self, response_text: str, matched: str | None) -> Reaction:
        """Called when generation stopped.

        Args:
            response_text: The whole response so far, tool replies included, ending in the stop string.
            matched: The stop string, or None for end-of-sequence.
        """
        ...
