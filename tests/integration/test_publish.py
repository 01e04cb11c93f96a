"""Weights from two real sending processes into the running server, seen through what it samples."""

import asyncio
import time
from dataclasses import replace

import psutil
import pytest
import torch
from tensor_parallel_world import TensorParallelWorld
from tiny_model import logprobs_under, only_writes, random_qwen2

from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.types import FinishReason, VersionSpan
from megatron_ztrl.weights.publish import WeightPublisher
from megatron_ztrl.weights.verify import PublishError

PROMPT = [10, 20, 30, 40, 50]
MODEL_BYTES = 4 * sum(parameter.numel() for parameter in random_qwen2(0).parameters())


@pytest.fixture(scope="module")
def world():
    world = TensorParallelWorld()
    yield world
    world.close()


@pytest.fixture
async def publisher(config, world, client):
    publisher = WeightPublisher(config, world, [client], timeout_seconds=60)
    yield publisher
    await publisher.close()


async def test_each_slice_is_sent_once_and_the_engine_then_samples_from_the_new_weights(
    publisher, world, client
):
    await world.hold(random_qwen2(1))
    report = await publisher.publish(1)
    assert sum(report.sent_bytes) == MODEL_BYTES
    assert report.received_bytes == {client.url: [MODEL_BYTES]}
    assert report.max_logprob_gap < 1e-5
    assert await client.weight_version() == 1
    completion = await client.generate(PROMPT, max_new_tokens=40, temperature=1.0, request_id="after-publish")
    expected = logprobs_under(world.model, PROMPT, completion.token_ids)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


async def test_the_group_is_joined_once_for_many_publishes(publisher, world):
    joins_before = world.joins
    reports = []
    for version, seed in enumerate(range(2, 8), start=2):
        await world.hold(random_qwen2(seed))
        reports.append(await publisher.publish(version))
    assert world.joins == joins_before + 1
    assert max(report.max_logprob_gap for report in reports) < 1e-5


async def test_tokens_in_flight_across_a_publish_carry_their_version_and_its_logprobs(
    publisher, world, client
):
    old, new = random_qwen2(20), random_qwen2(21)
    await world.hold(old)
    await publisher.publish(20)
    await world.hold(new)
    published, answers = asyncio.Event(), asyncio.Semaphore(0)

    async def keep_asking(i):
        prompt, completions = [i, 2 * i, 3 * i], []
        while not published.is_set():  # so that some are in flight whenever the engine pauses
            name = f"flight-{i}-{len(completions)}"
            completions.append(
                await client.generate(prompt, max_new_tokens=150, temperature=1.0, request_id=name)
            )
            answers.release()
        return [(prompt, completion) for completion in completions]

    tasks = [asyncio.create_task(keep_asking(i)) for i in range(1, 49)]  # the server runs 32: the rest wait
    for _ in range(8):  # later than the first tokens of those that run
        await answers.acquire()
    await publisher.publish(21)
    published.set()
    finished = [each for completions in await asyncio.gather(*tasks) for each in completions]

    by_version = {20: old, 21: new}
    for prompt, completion in finished:
        assert completion.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        ends = [0, *(span.end for span in completion.version_spans)]
        assert [span.start for span in completion.version_spans] == ends[:-1]
        assert ends[-1] == len(completion.token_ids)
        for span in completion.version_spans:
            expected = logprobs_under(by_version[span.version], prompt, completion.token_ids)
            assert completion.logprobs[span.start : span.end] == pytest.approx(
                expected[span.start : span.end], abs=1e-4
            )
    assert any(len(completion.version_spans) == 2 for _, completion in finished)


async def test_a_stop_string_spelled_in_more_tokens_than_usual_still_ends_the_call(publisher, world, client):
    await world.hold(
        only_writes(random_qwen2(0), "`")
    )  # "```" is one token of the tokenizer; here it comes as three
    await publisher.publish(30)
    completion = await client.generate(
        [1], max_new_tokens=20, stop_patterns=["```"], temperature=0, request_id="spelled"
    )
    assert len(completion.token_ids) == 3
    assert completion.matched_stop == "```"


async def test_weights_that_differ_from_the_trainers_are_an_error(publisher, world, client):
    sent, claimed = random_qwen2(40), random_qwen2(41)
    await world.hold(sent)
    world.model = claimed
    report = await publisher.deliver(40)
    assert report.max_logprob_gap is None
    await client.generate([1], max_new_tokens=1, temperature=1.0, request_id="rollouts-go-on")
    with pytest.raises(PublishError, match=r"version 40: .* nats at canary position \d+ \(token \d+"):
        await publisher.verify(report)


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
async def test_the_other_transports_bring_the_same_weights(config, world, client, transport):
    publish = replace(config.publish, transport=transport, bucket_bytes=1 << 17)  # several buckets
    publisher = WeightPublisher(replace(config, publish=publish), world, [client], timeout_seconds=60)
    for version, seed in ((60, 60), (61, 61)):
        await world.hold(random_qwen2(seed))
        report = await publisher.publish(version)
        assert report.max_logprob_gap < 1e-5
        assert await client.weight_version() == version
    completion = await client.generate(PROMPT, max_new_tokens=40, temperature=1.0, request_id=transport)
    assert completion.version_spans == [VersionSpan(version=61, start=0, end=len(completion.token_ids))]
    expected = logprobs_under(world.model, PROMPT, completion.token_ids)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    await publisher.close()


async def test_a_weight_that_is_not_a_number_reaches_no_engine(publisher, world, client):
    before = random_qwen2(70)
    await world.hold(before)
    await publisher.publish(70)
    diverged = random_qwen2(71)
    with torch.no_grad():
        diverged.model.layers[1].mlp.up_proj.weight[200, 3] = float("nan")  # the second rank's half
    await world.hold(diverged)
    problem = r"version 71 was not published: model.layers.1.mlp.up_proj.weight: 1 of \d+ values on trainer rank 1 are"
    with pytest.raises(PublishError, match=problem) as raised:
        await publisher.publish(71)
    assert raised.value.lost == {}
    assert await client.weight_version() == 70
    completion = await client.generate(PROMPT, max_new_tokens=40, temperature=1.0, request_id="as-before")
    expected = logprobs_under(before, PROMPT, completion.token_ids)
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


async def test_a_paused_engine_leaves_the_processor_to_the_trainer(server, client):
    processes = psutil.Process(server.pid).children(recursive=True)

    def processor_seconds():
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    await client.pause("retract")
    before, began = processor_seconds(), time.monotonic()
    await asyncio.sleep(1)
    share = (processor_seconds() - before) / (time.monotonic() - began)
    waiting = asyncio.create_task(client.prompt_logprobs(PROMPT))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    await client.resume()
    assert len(await waiting) == len(PROMPT) - 1
    assert share < 0.3


async def test_an_engine_that_does_not_answer_is_named(config, world):
    await world.hold(random_qwen2(50))
    async with EngineClient("http://127.0.0.1:9", request_timeout_seconds=5) as nobody:
        with pytest.raises(PublishError, match=r"version 50 was not published: http://127.0.0.1:9/pause"):
            await WeightPublisher(config, world, [nobody]).publish(50)
