"""Writes a rank's shards of a distributed checkpoint while training goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ztrl.trainer.fp8_weights import plain
from megatron_ztrl.trainer.integrity import FileRecord, seal, seal_directory
from megatron_ztrl.weights.dist_checkpoint import reason_of


class PendingSave:
    """A checkpoint that is being written by a thread of every rank.

    The thread checks that the shards of all ranks cover every tensor once, which takes seconds for hundreds of
    ranks, and writes files. Everything that ranks must tell each other happens before it starts or in ``finish``, in
    the thread that trains, so no collective can meet another one out of order.

    Args:
        directory: Of the checkpoint.
        writer: Writes the shards.
        planner: Holds the copied tensors.
        plan: What this rank writes.
        plans: What every rank writes; on rank 0 only.
    """

    def __init__(
        self,
        directory: Path,
        writer: FileSystemWriter,
        planner: MCoreSavePlanner,
        plan: SavePlan,
        plans: list[SavePlan] | None,
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._metadata: Metadata | None = None
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files = thread.submit(self._write, planner, plan, plans)
        thread.shutdown(wait=False)

    def written(self) -> bool:
        """Whether this rank's shards are on the disk.

        Raises:
            OSError: They could not be written.
        """
        return self._files.done() and bool(self._files.result())

    def finish(self) -> dict[str, FileRecord]:
        """Waits for the shards and completes the checkpoint; collective over all ranks.

        Returns:
            The records of the files that this rank wrote, by name.

        Raises:
            OSError: They could not be written.
        """
        shards, records = self._files.result()
        is_first = dist.get_rank() == 0
        by_rank: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(shards, by_rank)
        if by_rank is not None:
            assert self._metadata is not None
            with _naming(self._directory):
                self._writer.finish(self._metadata, by_rank)
                names = _file_names(shard for shards in by_rank for shard in shards)
                rest = (path for path in self._directory.iterdir() if path.name not in names)
                records |= {path.name: seal(path) for path in rest}
                seal_directory(self._directory)
        return records

    def _write(
        self, planner: MCoreSavePlanner, plan: SavePlan, plans: list[SavePlan] | None
    ) -> tuple[list[WriteResult], dict[str, FileRecord]]:
        if plans is not None:
            _, self._metadata = planner.create_global_plan(plans)
        with _naming(self._directory / f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"):
            shards = self._writer.write_data(plan, planner).value()
            return shards, {name: seal(self._directory / name) for name in _file_names(shards)}


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which file could not be written. Torch's writer raises an error of its archive, whatever the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} could not be written: {reason_of(error)}") from error


def _file_names(shards: Iterable[WriteResult]) -> set[str]:
    return {shard.storage_data.relative_path for shard in shards}


class BackgroundSave(TorchDistSaveShardedStrategy):
    """Copies the tensors, starts a thread that writes them, and leaves it in ``pending``.

    Megatron's own strategies fork writers and spawn a manager process. Forking a process that has CUDA and
    Ray threads is not safe, and spawning runs the entry script again.
    """

    pending: PendingSave

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Returns when the tensors may change again; collective over all ranks."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        for shard in (shard for shards in flat.values() for shard in shards):
            if isinstance(shard, ShardedTensor) and shard.data is not None:
                shard.data = plain(shard.data).to("cpu", copy=True)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        # One thread, hence one file: what goes wrong in torch's further threads is lost.
        writer = FileSystemWriter(checkpoint_dir, thread_count=1)
        is_first = dist.get_rank() == 0
        planner.set_up_planner(mcore_to_pyt_state_dict(flat, False), writer.storage_meta(), is_first)
        writer.set_up_storage_writer(is_first)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(plan, plans)
        # No shard is in two plans, so every rank writes its own as it is, to the file of its number.
        mine = writer.prepare_global_plan([plan] * (dist.get_rank() + 1))[-1]
        self.pending = PendingSave(Path(checkpoint_dir), writer, planner, planner.finish_plan(mine), plans)
