"""One Megatron world: its rank processes as Ray actors, commanded together.

Commands and host arrays (packed batches, log-probs) travel through Ray; gradients and weights never do.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.packing import PackedBatch
from megatron_ztrl.engines.ports import port_of, reserve_port
from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import Link
from megatron_ztrl.runtime.cluster import cluster_gpus, node_address, user_facing
from megatron_ztrl.trainer.integrity import FileRecord
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.broadcaster import BroadcastGroup, TensorBucket
from megatron_ztrl.weights.hf_mapping import ParallelLayout
from megatron_ztrl.weights.sender import SendReport
from megatron_ztrl.weights.transports import TrainerDied

Role = Literal["actor", "critic", "reference"]
WATCH_INTERVAL_SECONDS = 5.0
NOTICE_SECONDS = 30.0
"""Ray may learn of the death of a rank's process so long after its peers have."""


class RankProcess:
    """What runs in one rank's process: its part of a model, and a way to call it."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, which nothing has done yet
        self._rank: Any = None
        self._reservation: socket.socket | None = None

    def rendezvous(self) -> str:
        """An address on this node where the ranks can meet."""
        address = node_address()
        self._reservation = reserve_port(address)
        return f"tcp://{address}:{port_of(self._reservation)}"

    def build(
        self, role: Role, config: Config, rank: int, world_size: int, init_method: str
    ) -> tuple[int, bool]:
        """Builds the model and loads its weights.

        Returns:
            (data-parallel rank, whether this rank returns outputs).
        """
        from megatron_ztrl.trainer.actor import ActorRank, PolicyRank
        from megatron_ztrl.trainer.critic import CriticRank
        from megatron_ztrl.weights.broadcaster import WeightBroadcaster
        from megatron_ztrl.weights.sender import WeightSender

        kinds = {"actor": ActorRank, "critic": CriticRank, "reference": PolicyRank}
        self._rank = kinds[role](config, rank, world_size, init_method)
        if self._reservation is not None:
            self._reservation.close()  # the ranks have met, so the port is listened on
            self._reservation = None
        self._sender = WeightSender(self._rank.parameter, rank)
        self._broadcaster = WeightBroadcaster(self._rank.parameter, rank)
        self._index = rank
        return self._rank.dp_rank, self._rank.is_output_rank

    def exist(self) -> None:
        """Returns once the rank has done all that it was told before."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the rank."""
        return getattr(self._rank, method)(*args, **kwargs)

    def join_weight_group(self, group: WeightGroup, links: Sequence[Link]) -> None:
        """Meets the engine ranks that this rank sends to."""
        self._sender.join(group, links)

    def send_weights(self, publish: int) -> SendReport:
        """Sends this rank's slices to the engines."""
        return self._sender.send(publish)

    def invalid_weights(self) -> str | None:
        """Which weight of this rank must not reach an engine, if any; also takes the checksums of all."""
        from megatron_ztrl.weights.verify import find_invalid

        self._sender.prepare()
        return find_invalid(self._rank.parameter_slices(), self._rank.parameter, self._index)

    def join_broadcast_group(self, group: BroadcastGroup) -> None:
        """Rank 0 meets the engines."""
        self._broadcaster.join(group)

    def broadcast_weights(self, buckets: Sequence[TensorBucket]) -> int:
        """Gathers whole tensors on rank 0, which sends them to all engines."""
        return self._broadcaster.send(buckets)


class MegatronWorld:
    """The ranks of one model. Every method is one collective command to all of them.

    Args:
        config: The run.
        role: What the ranks hold; the reference policy is laid out like the actor.
    """

    def __init__(self, config: Config, role: Role) -> None:
        import ray

        world = config.critic if role == "critic" else config.actor
        self._config = config
        self._role = role
        layout = parallel_layout(world)
        self._world_size = layout.world_size
        self._gpus = _reserve_gpus(layout) if cluster_gpus() else None
        remote = ray.remote(num_cpus=0)(RankProcess)
        self._ranks = [
            remote.options(**_place(self._gpus, rank // layout.tensor_size)).remote()
            for rank in range(self._world_size)
        ]
        self._output_rank_of_dp: list[int] = []

    async def build(self) -> None:
        """Starts all ranks and loads the first weights into their shards."""
        (init_method,) = await self._all([self._ranks[0].rendezvous.remote()])
        roles = await user_facing(
            self._all(
                rank.build.remote(self._role, self._config, index, self._world_size, init_method)
                for index, rank in enumerate(self._ranks)
            )
        )
        outputs = {dp_rank: index for index, (dp_rank, is_output) in enumerate(roles) if is_output}
        self._output_rank_of_dp = [outputs[dp_rank] for dp_rank in sorted(outputs)]

    async def watch(self) -> None:
        """Notices the death of a rank that nobody calls just then. Never returns.

        Raises:
            TrainerDied: A rank's process has ended.
        """
        while True:
            await self._all(rank.exist.remote() for rank in self._ranks)
            await asyncio.sleep(WATCH_INTERVAL_SECONDS)

    async def logprobs(self, batch: PackedBatch) -> list[list[np.ndarray]]:
        """Log-probs of the trained tokens: [DP][M] arrays of [T], in nats."""
        return await self._per_replica("logprobs", batch)

    async def reference_logprobs(self, batch: PackedBatch) -> list[list[np.ndarray]]:
        """``logprobs`` under the first weights, in the actor's ranks."""
        return await self._per_replica("reference_logprobs", batch)

    async def values(self, batch: PackedBatch) -> list[list[np.ndarray]]:
        """The critic's values before the trained tokens: [DP][M] arrays of [T]."""
        return await self._per_replica("values", batch)

    async def train_step(self, batch: PackedBatch, step: int) -> dict[str, float]:
        """One optimizer step. Returns its statistics."""
        results = await self.call("train_step", batch, step)
        return results[self._output_rank_of_dp[0]]

    async def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob of every token but the first, given those before it."""
        results = await self.call("canary_logprobs", list(token_ids))
        return results[self._output_rank_of_dp[0]]

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        """What each rank holds."""
        return await self.call("parameter_slices")

    async def join_weight_group(self, group: WeightGroup, links: Sequence[Sequence[Link]]) -> None:
        """Lets every rank meet the engine ranks it sends to."""
        await self._all(
            rank.join_weight_group.remote(group, mine) for rank, mine in zip(self._ranks, links, strict=True)
        )

    async def send_weights(self, publish: int) -> list[SendReport]:
        """Sends the current weights to the engines, all ranks at once."""
        return await self._all(rank.send_weights.remote(publish) for rank in self._ranks)

    async def invalid_weights(self) -> list[str | None]:
        """Which weights must not reach an engine, per rank."""
        return await self._all(rank.invalid_weights.remote() for rank in self._ranks)

    async def join_broadcast_group(self, group: BroadcastGroup) -> None:
        """Lets rank 0 meet the engines."""
        await self._all(rank.join_broadcast_group.remote(group) for rank in self._ranks)

    async def broadcast_weights(self, buckets: Sequence[TensorBucket]) -> list[int]:
        """Sends the current weights to all engines at once. Returns the bytes that each rank sent."""
        import ray

        shared = ray.put(list(buckets))
        return await self._all(rank.broadcast_weights.remote(shared) for rank in self._ranks)

    async def save_checkpoint(self, directory: Path) -> None:
        await user_facing(self.call("save_checkpoint", directory))

    async def checkpoint_written(self) -> bool:
        return all(await user_facing(self.call("checkpoint_written")))

    async def finish_checkpoint(self) -> dict[str, FileRecord]:
        """Waits for the files of ``save_checkpoint``. Returns their records by name."""
        by_rank = await user_facing(self.call("finish_checkpoint"))
        return {name: file for files in by_rank for name, file in files.items()}

    async def load_checkpoint(self, directory: Path) -> None:
        await user_facing(self.call("load_checkpoint", directory))

    async def export_hf(self, directory: Path) -> None:
        await user_facing(self.call("export_hf", directory))

    async def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls a method on all ranks at once.

        Returns:
            One result per rank. The first error of any rank is raised: its peers may hang in a collective, so
            the world cannot be used any more.

        Raises:
            TrainerDied: A rank's process has ended.
        """
        import ray

        shared = [ray.put(arg) if isinstance(arg, PackedBatch) else arg for arg in args]
        return await self._all(rank.call.remote(method, *shared, **kwargs) for rank in self._ranks)

    async def _per_replica(self, method: str, batch: PackedBatch) -> list[list[np.ndarray]]:
        results = await self.call(method, batch)
        return [results[index] for index in self._output_rank_of_dp]

    async def _all(self, replies: Iterable[Awaitable[Any]]) -> list[Any]:
        """What they return; instead of the first error, `TrainerDied` where it comes of the death of a rank."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.gather(*replies)
        except RayActorError:
            await self._find_dead()
            raise
        except RayTaskError as error:
            if not isinstance(error.cause, ValueError | OSError):  # else it has nothing to do with the peers
                await self._find_dead()
            raise

    async def _find_dead(self) -> None:
        """Raises `TrainerDied` if a rank's process has ended. Those that live may hang, and are not waited for."""
        from ray.exceptions import RayActorError

        replies = [asyncio.ensure_future(rank.exist.remote()) for rank in self._ranks]
        await asyncio.wait(replies, timeout=NOTICE_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        for reply in replies:
            reply.cancel()  # does nothing to one that is there
        for index, error in enumerate(await asyncio.gather(*replies, return_exceptions=True)):
            if isinstance(error, RayActorError):
                raise TrainerDied(
                    f"rank {index} of the {self._world_size} of the {self._role} died: {_cause(error)}"
                ) from error

    def kill(self) -> None:
        """Ends all ranks at once."""
        import ray

        for rank in self._ranks:
            ray.kill(rank)
        if self._gpus is not None:
            ray.util.remove_placement_group(self._gpus)


def _cause(death: Exception) -> str:
    """What Ray says of a death, in one line for people."""
    *_, last = str(death).strip().splitlines()
    detail = last.partition("Worker exit detail: ")[2].partition(". ")[0]
    if not detail:  # its node is gone, say
        return last
    return f"its process was killed, as a rule for want of memory, or crashed (Ray: {detail})"


def _reserve_gpus(layout: ParallelLayout) -> Any:
    """A GPU for every rank; those of a tensor-parallel group are on one node.

    They exchange hidden states twice in every layer, which wants NVLink. Without this Ray would fill each node by half
    first: a group would be torn apart, and no node left whole for an engine that needs all its GPUs.
    """
    from ray.util import placement_group

    groups = layout.world_size // layout.tensor_size
    return placement_group([{"GPU": layout.tensor_size}] * groups, strategy="PACK")


def _place(gpus: Any | None, group: int) -> dict[str, Any]:
    """Options of a rank's process."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if gpus is None:
        return {}
    strategy = PlacementGroupSchedulingStrategy(gpus, placement_group_bundle_index=group)
    return {"num_gpus": 1, "scheduling_strategy": strategy}
