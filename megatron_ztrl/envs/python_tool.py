"""The Python tool: the tool-interrupt state machine of ZeroTIR (arXiv:2505.07773).

OUTSIDE --"```python"--> INSIDE --"```"--> run the block, append its output --> OUTSIDE
any other stop ends the rollout; after N executions the code stops are no longer set
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.base import Reaction
from megatron_ztrl.types import ExecutionResult, ExecutionStatus

OPENING_FENCE = "```python"
CLOSING_FENCE = "```"
TOO_LONG_MESSAGE = "Output too long: please check your code."

Execute = Callable[[str], Awaitable[ExecutionResult]]
CountTokens = Callable[[str], int]


class PythonTool:
    """Runs the Python blocks that a policy writes. Implements `envs.base.Environment`.

    Args:
        execute: Runs one snippet in the sandbox.
        count_tokens: Length of a text in tokens, to bound a reply.
        env_iterations: N, the most executions in this rollout; 0 turns the tool off.
        template_stop: Stop strings of the prompt template; they end the rollout.
        config: Limits.
    """

    def __init__(
        self,
        execute: Execute,
        count_tokens: CountTokens,
        *,
        env_iterations: int,
        template_stop: tuple[str, ...],
        config: ToolConfig,
    ) -> None:
        self._execute = execute
        self._count_tokens = count_tokens
        self._remaining = env_iterations
        self._template_stop = template_stop
        self._config = config
        self._inside = False

    def stop_strings(self) -> tuple[str, ...]:
        if self._inside:
            return (CLOSING_FENCE,)
        if self._remaining > 0:
            return (*self._template_stop, OPENING_FENCE)
        return self._template_stop

    async def react(self, response_text: str, matched: str | None) -> Reaction:
        if not self._inside and matched == OPENING_FENCE:
            self._inside = True
            return Reaction()
        if not self._inside or matched != CLOSING_FENCE:
            return Reaction(finished=True)
        self._inside = False
        self._remaining -= 1
        code, after_fence = last_block(response_text)
        result = await self._execute(code)
        if result.status.is_infrastructure:
            return Reaction(finished=True, code=code, result=result)
        # A token may close the fence and already begin the next line.
        lead = "" if after_fence.endswith("\n") else "\n"
        reply = f"{lead}```output\n{self._visible_output(result)}\n```\n"
        return Reaction(reply=reply, code=code, result=result)

    def _visible_output(self, result: ExecutionResult) -> str:
        text = format_result(result, self._config.run_timeout_seconds)
        return text if self._count_tokens(text) <= self._config.max_output_tokens else TOO_LONG_MESSAGE


def last_block(response_text: str) -> tuple[str, str]:
    """The code of the block that was just closed, and what stands after its fence.

    Inside a block there is no fence, so the last opening fence is the one that belongs to it. The rest of the
    opening line ("```python3", "```python  ") is not code.
    """
    _, opening, block = response_text.rpartition(OPENING_FENCE)
    assert opening, "a block can only close after it was opened"
    block, _, after_fence = block.partition(CLOSING_FENCE)
    _, _, code = block.partition("\n")
    return code, after_fence


def format_result(result: ExecutionResult, timeout_seconds: float) -> str:
    """What the model gets to read: the output, and what went wrong; a time-out is never an empty line."""
    output = result.stdout.rstrip("\n")
    match result.status:
        case ExecutionStatus.OK | ExecutionStatus.OUTPUT_TRUNCATED:
            note = ""
        case ExecutionStatus.TIMEOUT:
            note = f"Time limit of {timeout_seconds:g} seconds exceeded."
        case ExecutionStatus.MEMORY:
            note = "Memory limit exceeded."
        case _:
            note = result.stderr.strip() or "The program was killed."
    return "\n".join(part for part in (output, note) if part)
