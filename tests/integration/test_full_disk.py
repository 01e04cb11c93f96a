"""A checkpoint that cannot be written: one line that names the file, and the last good checkpoint unharmed."""

import asyncio
import os
import re
import resource

import pytest

from megatron_ztrl.runtime.checkpoints import CheckpointStore, verify
from megatron_ztrl.runtime.megatron_world import MegatronWorld

LIMIT_BYTES = 100_000


class Actor:
    """The only world of a run without engines, saved as ``System`` saves it."""

    def __init__(self, world):
        self._world = world

    async def save_checkpoint(self, directory):
        await self._world.save_checkpoint(directory / "actor")

    async def checkpoint_written(self):
        return await self._world.checkpoint_written()

    async def finish_checkpoint(self):
        records = await self._world.finish_checkpoint()
        return {f"actor/{name}": record for name, record in records.items()}


async def limit_file_size(world, size_bytes):
    """The rank's system refuses to let any of its files grow larger, as a full disk would."""
    pids = await asyncio.gather(*(rank.__ray_call__.remote(lambda _: os.getpid()) for rank in world._ranks))
    for pid in pids:
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, most))


def test_a_background_write_that_fails_names_its_file_and_harms_no_checkpoint(
    cluster, model, config, tmp_path
):
    async def scenario():
        world = MegatronWorld(config, "actor")
        try:
            await world.build()
            store = CheckpointStore(tmp_path, keep_last=1)
            await store.save(1, Actor(world), {})
            await store.complete()
            await limit_file_size(world, LIMIT_BYTES)
            await store.save(2, Actor(world), {})
            file = tmp_path / "partial_000002" / "actor" / "__0_0.distcp"
            message = f"{re.escape(str(file))} could not be written: .*File too large"
            with pytest.raises(OSError, match=f"^{message}") as error:
                await store.complete()
            assert len(str(error.value).splitlines()) == 1
            assert store.latest() == tmp_path / "step_000001"
            verify(store.latest())
        finally:
            world.kill()

    asyncio.run(scenario())
