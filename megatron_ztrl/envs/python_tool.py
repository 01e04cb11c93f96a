"""The Python tool: the tool-interrupt state machine of ZeroTIR (arXiv:2505.07773).

    OUTSIDE --"```python"--> INSIDE --"```"--> run the block, append its output --> OUTSIDE
    a stop string of the template, outside a block, ends the rollout
    after N executions code is text like any other

Both fences are found in the text of the turn, so one engine call writes a whole block. The engine is asked to
return at "```" plus one character that is not the "p" of an opening fence; what was sampled after the closing
fence is dropped, token by token, and has no effect on what is kept.
"""

from __future__ import annotations

import re

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.base import CountTokens, Execute, Reaction, RolloutContext
from megatron_ztrl.types import ExecutionResult, ExecutionStatus

OPENING_FENCE = "```python"
CLOSING_FENCE = "```"
_AFTER_CLOSING_FENCE = "```[^p]"
TOO_LONG_MESSAGE = "Output too long: please check your code."


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

    @classmethod
    def of(cls, context: RolloutContext) -> PythonTool:
        """The tool of one rollout."""
        return cls(
            context.execute,
            context.count_tokens,
            env_iterations=context.env_iterations,
            template_stop=context.template_stop,
            config=context.config,
        )

    def stop_patterns(self) -> tuple[str, ...]:
        template = tuple(re.escape(string) for string in self._template_stop)
        return (*template, _AFTER_CLOSING_FENCE) if self._remaining > 0 else template

    def find_stop(self, turn_text: str) -> int | None:
        outside, block = self._split(turn_text)
        ends = [outside.find(string) + len(string) for string in self._template_stop if string in outside]
        if ends:
            return min(ends)
        if block is None or CLOSING_FENCE not in block:
            return None
        return len(outside) + len(OPENING_FENCE) + block.index(CLOSING_FENCE) + len(CLOSING_FENCE)

    async def react(self, turn_text: str, *, ended: bool) -> Reaction:
        _, block = self._split(turn_text)
        if ended or block is None or CLOSING_FENCE not in block:
            return Reaction(finished=True)
        self._remaining -= 1
        code, after_fence = code_of(block)
        result = await self._execute(code)
        if result.status.is_infrastructure:
            return Reaction(finished=True, code=code, result=result)
        # A token may close the fence and already begin the next line.
        lead = "" if after_fence.endswith("\n") else "\n"
        reply = f"{lead}```output\n{self._visible_output(result)}\n```\n"
        return Reaction(reply=reply, code=code, result=result)

    def _split(self, turn_text: str) -> tuple[str, str | None]:
        """The text before the first block that may run, and what follows its opening fence."""
        if self._remaining == 0:
            return turn_text, None
        outside, opening, block = turn_text.partition(OPENING_FENCE)
        return outside, block if opening else None

    def _visible_output(self, result: ExecutionResult) -> str:
        text = format_result(result, self._config.run_timeout_seconds)
        return text if self._count_tokens(text) <= self._config.max_output_tokens else TOO_LONG_MESSAGE


def code_of(block: str) -> tuple[str, str]:
    """The code of a closed block, and what stands after its fence.

    Args:
        block: What follows "```python". The rest of that line ("3", spaces) is not code.
    """
    inside, _, after_fence = block.partition(CLOSING_FENCE)
    _, _, code = inside.partition("\n")
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
