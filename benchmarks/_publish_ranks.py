"""Trainer ranks without a trainer: processes that hold exactly a Megatron rank's shards, and really send them.

Their slices are those of ``megatron_slices``, their weights are read by the trainer's own loader, and the HF export
is the trainer's. And plain receivers, for what the same connections carry when nothing is done with the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ztrl.engines.weight_group import WeightGroup
from megatron_ztrl.engines.weight_stream import Link
from megatron_ztrl.trainer.export import export_hf
from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.broadcaster import BroadcastGroup, TensorBucket, WeightBroadcaster
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointReader, load_slices
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)
from megatron_ztrl.weights.sender import SendReport, WeightSender
from megatron_ztrl.weights.verify import find_invalid

BARE_TIMEOUT_SECONDS = 120.0


class ShardRank:
    """What runs in one sending process."""

    def __init__(self, checkpoint: Path, layout: ParallelLayout, rank: int, meeting_file: str) -> None:
        self._architecture = Architecture.from_hf_config(json.loads((checkpoint / "config.json").read_text()))
        self._layout = layout
        self._checkpoint = checkpoint
        self._rank = rank
        self.slices = megatron_slices(self._architecture, layout, rank, backend="local")
        shapes = hf_tensor_shapes(self._architecture)
        self._parameters: dict[str, torch.Tensor] = {}
        for param in {piece.param: None for piece in self.slices}:
            pieces = [piece for piece in self.slices if piece.param == param]
            shape = list(shapes[pieces[0].tensor])
            shape[pieces[0].dim] = max(piece.start + piece.length for piece in pieces)
            self._parameters[param] = torch.empty(shape)
        self.hold(checkpoint)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=layout.world_size
        )
        sender = WeightSender(self._parameters.__getitem__, rank)
        broadcaster = WeightBroadcaster(self._parameters.__getitem__, rank)
        self.prepare, self.join, self.send = sender.prepare, sender.join, sender.send
        self.join_broadcast, self.broadcast = broadcaster.join, broadcaster.send

    def hold(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint, as an optimizer step would leave them."""
        load_slices(self.slices, self._parameters, HFCheckpointReader(checkpoint))

    def parameter_slices(self) -> list[TensorSlice]:
        return self.slices

    def invalid(self) -> str | None:
        self.prepare()
        return find_invalid(self.slices, self._parameters.__getitem__, self._rank)

    def export(self, directory: Path) -> None:
        export_hf(
            directory,
            self._checkpoint,
            self._parameters.__getitem__,
            self._architecture,
            self._layout,
            "local",
        )


class Nothing:
    """What runs in a plain receiving process."""


class Peak:
    """The most memory that a process has had beyond what it had when this was made (see proc(5), clear_refs)."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def num_bytes(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB$", self._status.read_text(), re.MULTILINE)
        assert found
        return int(found[1]) * 1024


def bare(
    address: str,
    port: int,
    name: str,
    rank: int,
    world_size: int,
    sends: Mapping[int, int],
    receives: Mapping[int, int],
) -> tuple[float, float]:
    """Send and receive so many bytes to and from each peer, all at once, one message each.

    Returns:
        When it began, with everybody connected, and when the last byte was there; a clock of the whole machine.
    """
    timeout = timedelta(seconds=BARE_TIMEOUT_SECONDS)
    store = dist.PrefixStore(name, dist.TCPStore(address, port, is_master=False, timeout=timeout))
    group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout)
    out = {peer: torch.ones(num_bytes, dtype=torch.uint8) for peer, num_bytes in sends.items()}
    into = {peer: torch.zeros(num_bytes, dtype=torch.uint8) for peer, num_bytes in receives.items()}
    group.barrier().wait()
    began = time.perf_counter()
    works = [group.recv([buffer], peer, 0) for peer, buffer in into.items()]
    works += [group.send([buffer], peer, 0) for peer, buffer in out.items()]
    for work in works:
        work.wait()
    ended = time.perf_counter()
    group.barrier().wait()
    return began, ended


def serve(pipe: Any, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Obey (method, arguments) until the pipe closes; answers are (ok, result)."""
    torch.set_num_threads(1)
    target = make(*arguments)
    with contextlib.suppress(EOFError):
        while True:
            name, args = pipe.recv()
            try:
                method = bare if name == "bare" else getattr(target, name)
                pipe.send((True, method(*args)))
            except (RuntimeError, ValueError, OSError) as error:
                pipe.send((False, f"{type(error).__name__}: {error}"))


class Process:
    """A process and the pipe to it."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._thread = ThreadPoolExecutor(1)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    async def call(self, method: str, *arguments: Any) -> Any:
        def exchange() -> tuple[bool, Any]:
            self._pipe.send((method, arguments))
            return self._pipe.recv()

        ok, result = await asyncio.get_running_loop().run_in_executor(self._thread, exchange)
        if not ok:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._thread.shutdown()


class ShardWorld:
    """An ``ActorWorld`` of sending processes.

    Args:
        checkpoint: What they hold first.
        layout: How they cut it.
        canaries: Log-probs of the canary by checkpoint.
    """

    def __init__(
        self, checkpoint: Path, layout: ParallelLayout, canaries: Mapping[Path, list[float]]
    ) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._canaries = canaries
        self._held = checkpoint
        meeting_file = str(Path(self._directory.name) / "meet")
        self.ranks = [
            Process(ShardRank, checkpoint, layout, rank, meeting_file) for rank in range(layout.world_size)
        ]

    async def hold(self, checkpoint: Path) -> None:
        self._held = checkpoint
        await self._all("hold", checkpoint)

    async def parameter_slices(self) -> list[list[TensorSlice]]:
        return await self._all("parameter_slices")

    async def join_weight_group(self, group: WeightGroup, links: Sequence[Sequence[Link]]) -> None:
        await asyncio.gather(
            *(rank.call("join", group, mine) for rank, mine in zip(self.ranks, links, strict=True))
        )

    async def send_weights(self, publish: int) -> list[SendReport]:
        return await self._all("send", publish)

    async def invalid_weights(self) -> list[str | None]:
        return await self._all("invalid")

    async def join_broadcast_group(self, group: BroadcastGroup) -> None:
        await self._all("join_broadcast", group)

    async def broadcast_weights(self, buckets: Sequence[TensorBucket]) -> list[int]:
        return await self._all("broadcast", buckets)

    async def export_hf(self, directory: Path) -> None:
        await self._all("export", directory)

    async def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self._canaries[self._held]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self._directory.cleanup()

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*(rank.call(method, *arguments) for rank in self.ranks)))


async def bare_seconds(world: ShardWorld, links: Mapping[tuple[int, int], int], repeats: int) -> list[float]:
    """Times of plain sends between the trainer's processes and as many as the engines have.

    Args:
        world: The trainer.
        links: Bytes from one process to another; those after the trainer's stand for the engines'.
        repeats: How often.
    """
    num_senders = len(world.ranks)
    world_size = 1 + max(to for _, to in links)
    receivers = [Process(Nothing) for _ in range(world_size - num_senders)]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        return [
            await _bare([*world.ranks, *receivers], links, store.port, f"bare-{index}")
            for index in range(repeats)
        ]
    finally:
        for receiver in receivers:
            receiver.close()


async def _bare(
    processes: Sequence[Process], links: Mapping[tuple[int, int], int], port: int, name: str
) -> float:
    times = await asyncio.gather(
        *(
            process.call(
                "bare",
                "127.0.0.1",
                port,
                name,
                rank,
                len(processes),
                {to: num_bytes for (source, to), num_bytes in links.items() if source == rank},
                {source: num_bytes for (source, to), num_bytes in links.items() if to == rank},
            )
            for rank, process in enumerate(processes)
        )
    )
    return max(ended for _, ended in times) - min(began for began, _ in times)


def engine_rank_bytes(
    slices: Sequence[TensorSlice], shapes: Mapping[str, tuple[int, ...]], itemsize: int
) -> int:
    """Bytes of everything that an engine rank holds, padding aside."""
    return itemsize * sum(
        piece.length * math.prod(shapes[piece.tensor]) // shapes[piece.tensor][piece.dim] for piece in slices
    )
