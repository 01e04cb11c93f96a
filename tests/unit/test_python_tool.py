"""The tool-interrupt state machine, on its own."""

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.envs.python_tool import TOO_LONG_MESSAGE, PythonTool, format_result, last_block
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


async def test_a_block_is_run_when_it_closes_and_its_output_is_appended():
    environment, ran = tool(result(stdout="8968\n"))
    assert environment.stop_strings() == ("</answer>", "```python")
    opened = await environment.react("Let me see\n```python", "```python")
    assert opened.reply is None
    assert not opened.finished
    assert environment.stop_strings() == ("```",)
    closed = await environment.react("Let me see\n```python\nprint(472*19)\n```", "```")
    assert ran == ["print(472*19)\n"]
    assert closed.reply == "\n```output\n8968\n```\n"
    assert not closed.finished
    assert environment.stop_strings() == ("</answer>", "```python")


async def test_after_n_executions_code_is_no_longer_a_reason_to_stop():
    environment, _ = tool(result(stdout="1"), env_iterations=1)
    await environment.react("```python", "```python")
    await environment.react("```python\nprint(1)\n```", "```")
    assert environment.stop_strings() == ("</answer>",)


def test_with_no_iterations_the_tool_is_off_from_the_start():
    environment, _ = tool(result(), env_iterations=0)
    assert environment.stop_strings() == ("</answer>",)


async def test_end_of_sequence_and_template_stops_end_the_rollout():
    for matched in (None, "</answer>"):
        environment, ran = tool(result())
        assert (await environment.react("4</answer>", matched)).finished
        assert ran == []


async def test_end_of_sequence_inside_a_block_runs_nothing():
    environment, ran = tool(result())
    await environment.react("```python", "```python")
    assert (await environment.react("```python\nprint(1)", None)).finished
    assert ran == []


async def test_a_token_that_already_begins_the_next_line_gets_no_second_newline():
    environment, _ = tool(result(stdout="1"))
    await environment.react("```python", "```python")
    closed = await environment.react("```python\nprint(1)\n```\n", "```")
    assert closed.reply == "```output\n1\n```\n"


async def test_infrastructure_failure_ends_the_rollout_without_a_reply():
    environment, _ = tool(result(ExecutionStatus.SANDBOX_ERROR))
    await environment.react("```python", "```python")
    closed = await environment.react("```python\nprint(1)\n```", "```")
    assert closed.finished
    assert closed.reply is None
    assert closed.result is not None


async def test_a_reply_over_the_limit_asks_to_check_the_code():
    environment, _ = tool(result(stdout="9" * 600), max_output_tokens=100)
    await environment.react("```python", "```python")
    closed = await environment.react("```python\nprint('9'*600)\n```", "```")
    assert TOO_LONG_MESSAGE in closed.reply
    assert "999" not in closed.reply


def test_the_rest_of_the_opening_line_is_not_code():
    assert last_block("```python3 \nx = 1\nprint(x)\n```") == ("x = 1\nprint(x)\n", "")
    earlier = "```python\nprint(1)\n```\n```output\n1\n```\n"
    assert last_block(earlier + "```python\nprint(2)\n```\n") == ("print(2)\n", "\n")


def test_each_failure_is_told_to_the_model():
    assert format_result(result(stdout="4\n"), 5) == "4"
    error = result(ExecutionStatus.ERROR, stdout="before\n", stderr="ZeroDivisionError: division by zero\n")
    assert format_result(error, 5) == "before\nZeroDivisionError: division by zero"
    assert "5 seconds" in format_result(result(ExecutionStatus.TIMEOUT), 5)
    assert "Memory" in format_result(result(ExecutionStatus.MEMORY), 5)
    assert format_result(result(ExecutionStatus.KILLED), 5) != ""
