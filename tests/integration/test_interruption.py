"""Publishes under rollouts on the real engine and the real sandbox, with each strategy of ``publish.interruption``."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine_configs import engine_config
from tiny_model import byte_tokenizer, logprobs_under, random_qwen2
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.config.schema import PublishConfig, RolloutConfig, ToolConfig
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.types import Prompt
from megatron_ztrl.weights.publish import WeightPublisher

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _calling_policy import call_the_tool
from _exactness import check_logprobs, check_record
from _interrupted_rollouts import interrupt_rollouts
from _sending_trainer import Policies, SendingTrainer

EXACT = ("retract", "abort")
INTERRUPTS = 40
IN_FLIGHT = 40
"""Above what the server runs: some always wait in it."""
PREFIX = list(range(10, 74))
SCRIPT = ["```Ċ", "```", "python", "Ċ", "7"]
"""The end of a call and a call, as byte-level BPE spells the tokens; "Ċ" is a newline."""


def calling_policies():
    script = byte_tokenizer().convert_tokens_to_ids(SCRIPT)
    return Policies(call_the_tool(random_qwen2(0), script), noise=0.03)


def with_strategy(config, strategy):
    return replace(
        config,
        publish=PublishConfig(interruption=strategy, verify_interval_steps=10),
        rollout=RolloutConfig(env_iterations=3, max_response_tokens=120),
        tool=ToolConfig(run_timeout_seconds=5, max_output_tokens=40),
    )


async def interrupted(config, server, run_directory, policies):
    tokenizer = PolicyTokenizer(run_directory / "model")
    prompts = [
        Prompt(
            prompt_id=f"p{i}", problem="", text=f"Question {i % 4}: {i}", ground_truth="", data_source="test"
        )
        for i in range(16)
    ]
    async with ExecutorServer(preload=["math"]) as executor, ExecutorClient(executor.url) as sandbox:
        record = await interrupt_rollouts(
            config,
            server.url,
            sandbox,
            tokenizer,
            SendingTrainer(policies),
            prompts,
            interrupts=range(INTERRUPTS),
            in_flight=IN_FLIGHT,
            mean_interval_seconds=0.1,
            seed=0,
        )
    return record, check_record(record, tokenizer)


@pytest.mark.parametrize("strategy", EXACT)
async def test_interrupted_rollouts_are_what_the_server_returned_and_hugging_face_computes(
    strategy, config, model, server, run_directory
):
    policies = calling_policies()
    config = with_strategy(config, strategy)
    record, findings = await interrupted(config, server, run_directory, policies)
    wrong = (findings.wrong_tokens, findings.wrong_masks, findings.wrong_versions)
    assert (findings.lost, findings.duplicated, wrong) == (0, 0, (0, 0, 0))
    assert findings.exact
    gaps = check_logprobs(record.rollouts, policies, temperature=1.0)
    assert gaps.largest < 1e-4

    # It could have gone wrong: interrupts came at all moments, and a wrong version would have shown.
    interrupts = record.publishes[1:]
    for state in ("mid-token", "mid-tool", "between turns"):
        assert sum(publish.hit[state] > 0 for publish in interrupts) >= 5
    assert max(publish.hit["mid-token"] for publish in interrupts) > config.engine.max_running_requests
    assert sum(publish.meanwhile["request began"] for publish in interrupts) >= 20
    assert sum(spans > 2 for spans in findings.spans) >= 10
    assert gaps.neighbour_told_apart > 0.5
    by_client = sum(call.finish == "abort" for call in record.calls)
    by_server = sum(call.retractions for call in record.calls)
    assert by_client > by_server if strategy == "abort" else by_server > by_client == 0


async def next_turn(client, sequence):
    return await client.generate(sequence, max_new_tokens=16, temperature=1.0, request_id=f"t{len(sequence)}")


async def assert_new_requests_are_exact_after_a_publish(config, client, *, cached_before):
    """Requests that share a prefix with one that ended, and with one in flight, before the publish."""
    policies = Policies(random_qwen2(0), noise=0.5)
    trainer = SendingTrainer(policies)
    publisher = WeightPublisher(config, trainer, [client], timeout_seconds=60)
    await trainer.hold(1)
    await publisher.publish(1)
    first = await next_turn(client, PREFIX)
    sequence = [*PREFIX, *first.token_ids, 5, 6, 7]
    second = await next_turn(client, sequence)
    assert (second.cached_tokens > 0) == cached_before
    sequence += [*second.token_ids, 8, 9]

    in_flight = asyncio.create_task(
        client.generate(sequence, max_new_tokens=200, temperature=1.0, request_id="in-flight")
    )
    await client.generate([1], max_new_tokens=1, temperature=1.0, request_id="that-one-is-running")
    await trainer.hold(2)
    await publisher.publish(2)
    third = await next_turn(client, sequence)
    fresh = await next_turn(client, PREFIX)
    await in_flight
    await publisher.close()
    for prompt, completion in ((sequence, third), (PREFIX, fresh)):
        assert {span.version for span in completion.version_spans} == {2}
        assert completion.logprobs == pytest.approx(
            logprobs_under(policies.model(2), prompt, completion.token_ids), abs=1e-4
        )
    old = logprobs_under(policies.model(1), sequence, third.token_ids)
    assert third.logprobs != pytest.approx(old, abs=1e-2)


@pytest.mark.parametrize("strategy", EXACT)
async def test_a_prefix_cached_before_a_publish_is_not_used_after_it(strategy, config, client):
    config = with_strategy(config, strategy)
    await assert_new_requests_are_exact_after_a_publish(config, client, cached_before=True)


@pytest.fixture
def in_place_server(run_directory, model):
    config = with_strategy(engine_config(run_directory), "in_place")
    server = EngineServer(config, log_path=run_directory / "in_place.log")
    server.start()
    try:
        server.wait_healthy()
        yield config, server
    finally:
        server.stop()


@pytest.mark.slow
async def test_in_place_loses_nothing_but_is_inexact_and_gives_no_old_kv_to_new_requests(
    in_place_server, run_directory
):
    config, server = in_place_server
    policies = calling_policies()
    record, findings = await interrupted(config, server, run_directory, policies)
    assert findings.exact
    assert check_logprobs(record.rollouts, policies, temperature=1.0).over_limit > 100
    async with EngineClient(server.url, request_timeout_seconds=60) as client:
        await assert_new_requests_are_exact_after_a_publish(config, client, cached_before=False)
