"""Rollouts on the real engine and the real sandbox: every token, mask and version in its place."""

import pytest
import scripted_policy
import torch
from engine_configs import engine_config
from scripted_policy import token_id
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.config.schema import ToolConfig
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.envs.python_tool import PythonTool
from megatron_ztrl.rollout.trajectory import Sampling, run_rollout
from megatron_ztrl.types import NOT_SAMPLED, ExecutionResult, ExecutionStatus, Prompt, StopReason

# The opening fence completes in the middle of a token, "é" is two tokens, and the closing fence shares a
# token with the line break after it. The tool's reply ends in that token, so the second call follows it.
FIRST_CALL = ["``", "`pyt", "hon\nprint('", b"\xc3", b"\xa9", "'*3)\n``", "`\n"]
SECOND_CALL = ["```python\n", "1/", "0\n```"]
SCRIPT = ["Q:", *FIRST_CALL, *SECOND_CALL]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("scripted")


@pytest.fixture(scope="module")
def policy(directory):
    long_tokens = [piece for piece in SCRIPT if len(piece) > 1]
    return scripted_policy.save_checkpoint(directory / "model", long_tokens=long_tokens, script=SCRIPT)


@pytest.fixture(scope="module")
def scripted_server(policy, directory):
    server = EngineServer(engine_config(directory), log_path=directory / "engine.log")
    server.start()
    try:
        server.wait_healthy()
        yield server
    finally:
        server.stop()


@pytest.fixture
async def rollout(scripted_server, directory):
    tokenizer = PolicyTokenizer(directory / "model")
    async with (
        ExecutorServer(preload=["math"]) as executor,
        ExecutorClient(executor.url) as sandbox,
        EngineClient(scripted_server.url, request_timeout_seconds=60) as engine,
    ):

        async def execute(code):
            result = await sandbox.execute(code, run_timeout_seconds=5)
            return ExecutionResult(
                status=ExecutionStatus(result.status),
                stdout=result.stdout,
                stderr=result.stderr,
                run_seconds=result.run_seconds,
                queue_seconds=result.queue_seconds,
            )

        return await run_rollout(
            "0.0",
            Prompt(prompt_id="p", problem="", text="Q:", ground_truth="", data_source="test"),
            engine=engine,
            tokenizer=tokenizer,
            environment=PythonTool(
                execute, lambda text: 0, env_iterations=2, template_stop=(), config=ToolConfig()
            ),
            sampling=Sampling(temperature=0.0, top_p=1.0, max_response_tokens=300),
        )


async def test_tokens_masks_versions_and_logprobs_are_exact_across_two_calls(rollout, policy):
    model, tokenizer = policy

    def ids(*pieces):
        return [token_id(tokenizer, piece) for piece in pieces]

    first, second = rollout.turns[:2]
    assert (first.code, first.result.stdout) == ("print('é'*3)\n", "ééé\n")
    assert second.code == "1/0\n"
    assert second.result.status is ExecutionStatus.ERROR

    # Sampled tokens are kept as sampled; the reply is tokenised on its own, never together with them.
    assert rollout.token_ids[first.start : first.tool_start] == ids(*FIRST_CALL)
    reply_ids = tokenizer.encode("```output\nééé\n```\n", add_special_tokens=False)
    assert rollout.token_ids[first.tool_start : first.end] == reply_ids
    assert reply_ids[-1:] == ids(FIRST_CALL[-1])
    assert rollout.token_ids[second.start : second.tool_start] == ids(*SECOND_CALL)
    as_text = tokenizer.decode(rollout.token_ids)
    assert (
        tokenizer.encode(as_text, add_special_tokens=False) != rollout.token_ids
    )  # re-tokenising would differ

    tool = [False] * len(rollout.token_ids)
    for turn in rollout.turns:
        tool[turn.tool_start : turn.end] = [True] * (turn.end - turn.tool_start)
    assert rollout.loss_mask == [not is_tool for is_tool in tool]
    assert [version == NOT_SAMPLED for version in rollout.weight_versions] == tool
    assert [logprob == 0.0 for logprob in rollout.logprobs] == tool

    sequence = rollout.prompt_ids + rollout.token_ids
    with torch.no_grad():
        logp_LV = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
    for position, (token, logprob, trained) in enumerate(
        zip(rollout.token_ids, rollout.logprobs, rollout.loss_mask, strict=True),
        start=len(rollout.prompt_ids),
    ):
        if trained:
            assert logprob == pytest.approx(logp_LV[position - 1, token].item(), abs=1e-4)


async def test_the_error_of_a_call_is_in_the_reply_and_the_budget_ends_the_rollout(rollout):
    assert "ZeroDivisionError" in rollout.text
    assert rollout.executed_calls == 2
    assert rollout.stop_reason in (StopReason.STOP, StopReason.LENGTH)
