"""Two real engines: the second is fed by the first, and when one is killed the other does not mind."""

import asyncio
import time
from dataclasses import replace

import psutil
import pytest
from tensor_parallel_world import TensorParallelWorld
from tiny_model import logprobs_under, random_qwen2

from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.weights.publish import WeightPublisher

PROMPT = [10, 20, 30, 40, 50]
MODEL_BYTES = 4 * sum(parameter.numel() for parameter in random_qwen2(0).parameters())
NOTICED_SECONDS = 60
"""The time-out is 300 s."""


@pytest.fixture(scope="module")
def second_server(config, model, run_directory):
    server = EngineServer(config, log_path=run_directory / "second.log", index=1)
    server.start()
    try:
        server.wait_healthy()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def world():
    world = TensorParallelWorld()
    yield world
    world.close()


async def samples_from(client, model):
    completion = await client.generate(PROMPT, max_new_tokens=40, temperature=1.0, request_id="sample")
    expected = logprobs_under(model, PROMPT, completion.token_ids)
    return completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow  # a second engine, and its start; tests/distributed kills without one
async def test_an_engine_killed_while_it_receives_is_lost_and_the_one_it_feeds_gets_the_weights_all_the_same(
    config, world, client, second_server
):
    async with EngineClient(second_server.url, request_timeout_seconds=400) as doomed:
        config = replace(config, publish=replace(config.publish, bucket_bytes=1 << 16))
        publisher = WeightPublisher(config, world, [doomed, client])
        await world.hold(random_qwen2(1))
        report = await publisher.publish(1)
        assert sum(report.sent_bytes) == MODEL_BYTES  # once, for both
        assert report.received_bytes == {doomed.url: [MODEL_BYTES], client.url: [MODEL_BYTES]}
        assert await samples_from(client, world.model)
        assert await samples_from(doomed, world.model)

        await world.hold(random_qwen2(2))
        await world.stop_before(3)
        publishing = asyncio.create_task(publisher.publish(2))
        await world.until_stopped()
        scheduler_of(second_server).kill()
        world.go_on()
        began = time.monotonic()
        report = await publishing
        assert time.monotonic() - began < NOTICED_SECONDS
        assert list(report.lost) == [doomed.url]
        assert await client.weight_version() == 2
        assert await samples_from(client, world.model)

        await world.hold(random_qwen2(3))
        assert not (await publisher.publish(3)).lost
        assert await samples_from(client, world.model)
        await publisher.close()


def scheduler_of(server):
    """The process that has the weights; the HTTP server is another."""
    (found,) = (
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "scheduler" in " ".join(process.cmdline())
    )
    return found
