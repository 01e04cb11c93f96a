"""A rank of a Megatron world that dies: whoever uses the world is told which and why, whatever its peers say."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest
import pytest_asyncio

from megatron_ztrl.config.schema import ActorConfig
from megatron_ztrl.runtime.megatron_world import MegatronWorld
from megatron_ztrl.weights.transports import TrainerDied

pytestmark = pytest.mark.asyncio(loop_scope="module")
RANK_1_DIED = (
    r"^rank 1 of the 2 of the actor died: its process was killed, .*, or crashed \(Ray: Worker [^.]+\)$"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(cluster, model, config):
    world = MegatronWorld(replace(config, actor=ActorConfig(tensor_parallel_size=2)), "actor")
    try:
        await world.build()
        yield world
    finally:
        world.kill()


async def test_an_error_of_a_rank_that_lives_is_raised_as_it_is(world):
    with pytest.raises(AttributeError, match="no such method"):
        await world.call("no such method")


async def test_its_death_is_named_in_one_line_to_all_who_call_or_watch(world):
    first, second = await asyncio.gather(
        *(rank.__ray_call__.remote(lambda _: os.getpid()) for rank in world._ranks)
    )
    watching = asyncio.create_task(world.watch())
    os.kill(first, signal.SIGSTOP)  # as one that waits for its peer in a collective
    try:
        calling = asyncio.create_task(world.canary_logprobs([1, 2, 3]))
        os.kill(second, signal.SIGKILL)
        for told in (calling, watching):
            with pytest.raises(TrainerDied, match=RANK_1_DIED) as error:
                await told
            assert len(str(error.value).splitlines()) == 1
    finally:
        os.kill(first, signal.SIGCONT)
    # Nor is a peer to blame that notices it before Ray does.
    with pytest.raises(TrainerDied, match=RANK_1_DIED):
        await world._all([world._ranks[0].call.remote("this fails in a rank that lives")])
