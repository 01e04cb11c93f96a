"""The tool-interrupt state machine, on its own."""

import re

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.python_tool import TOO_LONG_MESSAGE, PythonTool, code_of, format_result
from megatron_ztrl.types import ExecutionResult, ExecutionStatus


def result(status=ExecutionStatus.OK, stdout="", stderr=""):
    return ExecutionResult(status=status, stdout=stdout, stderr=stderr, run_seconds=0.0, queue_seconds=0.0)


def tool(outcome, *, env_iterations=2, max_output_tokens=512):
    ran = []

    async def execute(code):
        ran.append(code)
        return outcome

    environment = PythonTool(
        execute,
        len,
        env_iterations=env_iterations,
        template_stop=("</answer>",),
        config=ToolConfig(max_output_tokens=max_output_tokens),
    )
    return environment, ran


def returns_at(environment, text):
    """Whether the engine would return to us at this text."""
    return any(re.search(pattern, text) for pattern in environment.stop_patterns())


BLOCK = "Let me see\n```python\nprint(472*19)\n```"


async def test_a_block_is_run_when_it_closes_and_its_output_is_appended():
    environment, ran = tool(result(stdout="8968\n"))
    assert environment.find_stop(BLOCK[:-1]) is None
    assert environment.find_stop(BLOCK + "\nand so on") == len(BLOCK)
    closed = await environment.react(BLOCK, ended=False)
    assert ran == ["print(472*19)\n"]
    assert closed.reply == "\n```output\n8968\n```\n"
    assert not closed.finished


def test_the_engine_returns_after_a_closing_fence_but_not_at_an_opening_one():
    environment, _ = tool(result())
    assert not returns_at(environment, "Let me see\n```python\nprint(1)\n```")
    assert returns_at(environment, BLOCK + "\n")
    assert returns_at(environment, "</answer>")


async def test_after_n_executions_code_is_no_longer_a_reason_to_stop():
    environment, _ = tool(result(stdout="1"), env_iterations=1)
    await environment.react(BLOCK, ended=False)
    assert environment.find_stop(BLOCK) is None
    assert not returns_at(environment, BLOCK + "\n")
    assert environment.find_stop("7</answer> x") == len("7</answer>")


def test_with_no_iterations_the_tool_is_off_from_the_start():
    environment, _ = tool(result(), env_iterations=0)
    assert environment.find_stop(BLOCK) is None
    assert not returns_at(environment, BLOCK + "\n")


async def test_end_of_sequence_and_template_stops_end_the_rollout():
    environment, ran = tool(result())
    assert (await environment.react("4</answer>", ended=False)).finished
    assert (await environment.react("4", ended=True)).finished
    assert ran == []


def test_a_template_stop_inside_a_block_is_code():
    environment, _ = tool(result())
    text = "```python\nprint('</answer>')\n```"
    assert environment.find_stop(text[:-1]) is None
    assert environment.find_stop(text) == len(text)


async def test_end_of_sequence_inside_a_block_runs_nothing():
    environment, ran = tool(result())
    assert (await environment.react("```python\nprint(1)", ended=True)).finished
    assert ran == []


async def test_a_token_that_already_begins_the_next_line_gets_no_second_newline():
    environment, _ = tool(result(stdout="1"))
    closed = await environment.react("```python\nprint(1)\n```\n", ended=False)
    assert closed.reply == "```output\n1\n```\n"


async def test_infrastructure_failure_ends_the_rollout_without_a_reply():
    environment, _ = tool(result(ExecutionStatus.SANDBOX_ERROR))
    closed = await environment.react(BLOCK, ended=False)
    assert closed.finished
    assert closed.reply is None
    assert closed.result is not None


async def test_a_reply_over_the_limit_asks_to_check_the_code():
    environment, _ = tool(result(stdout="9" * 600), max_output_tokens=100)
    closed = await environment.react(BLOCK, ended=False)
    assert TOO_LONG_MESSAGE in closed.reply
    assert "999" not in closed.reply


def test_the_rest_of_the_opening_line_is_not_code():
    assert code_of("3 \nx = 1\nprint(x)\n```") == ("x = 1\nprint(x)\n", "")
    assert code_of("\nprint(2)\n```\n") == ("print(2)\n", "\n")


def test_each_failure_is_told_to_the_model():
    assert format_result(result(stdout="4\n"), 5) == "4"
    error = result(ExecutionStatus.ERROR, stdout="before\n", stderr="ZeroDivisionError: division by zero\n")
    assert format_result(error, 5) == "before\nZeroDivisionError: division by zero"
    assert "5 seconds" in format_result(result(ExecutionStatus.TIMEOUT), 5)
    assert "Memory" in format_result(result(ExecutionStatus.MEMORY), 5)
    assert format_result(result(ExecutionStatus.KILLED), 5) != ""
