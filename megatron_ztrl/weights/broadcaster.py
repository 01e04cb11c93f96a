"""The trainer ranks' end of the broadcast transport: rank 0 gathers whole tensors and sends them to everybody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist

from megatron_ztrl.weights.reshard import Transfer
from megatron_ztrl.weights.sender import TrainerEnd


@dataclass(frozen=True, kw_only=True, slots=True)
class BroadcastGroup:
    """Rank 0 of the trainer, as rank 0, and every engine rank."""

    name: str
    address: str
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    dtype: Literal["float32", "bfloat16"]
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBucket:
    """Whole Hugging Face tensors that travel in one message, one behind the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    parts: tuple[Transfer, ...]
    """Where rank 0 gets them from: target 0 stands for it, and its parameters are the tensors themselves."""


class _Collective(Protocol):
    """The part of torch's process groups that is used here."""

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> dist.Work: ...


class WeightBroadcaster(TrainerEnd):
    """One trainer rank's end of ``BroadcastTransport``. The ranks gather over their own default process group."""

    _group: BroadcastGroup | None = None
    _channel: _Collective | None = None

    def join(self, group: BroadcastGroup) -> None:
        """Meet the engines; returns when all have come. Only rank 0 does.

        Raises:
            RuntimeError: not everybody came within the time-out.
        """
        self._group, self._channel = group, None
        if self._rank != 0:
            return
        timeout = timedelta(seconds=group.timeout_seconds)
        store: dist.Store = dist.TCPStore(group.address, group.port, is_master=False, timeout=timeout)
        # Where SGLang's process group, made by torch's ``_new_process_group_helper``, looks for its peers.
        for prefix in (group.name, f"{group.name}/", "cpu/" if group.backend == "gloo" else "cuda/"):
            store = dist.PrefixStore(prefix, store)
        if group.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._channel = cast(_Collective, dist.ProcessGroupNCCL(store, 0, group.world_size, options))
        else:
            self._channel = cast(_Collective, dist.ProcessGroupGloo(store, 0, group.world_size, timeout))

    @torch.no_grad()
    def send(self, buckets: Sequence[TensorBucket]) -> int:
        """Gather and broadcast everything; collective over the trainer. Returns the bytes that this rank sent.

        Raises:
            RuntimeError: an engine did not take its weights within the time-out.
        """
        assert self._group is not None, "join() first"
        dtype: torch.dtype = getattr(torch, self._group.dtype)
        return sum(self._send(bucket, dtype) for bucket in buckets)

    def _send(self, bucket: TensorBucket, dtype: torch.dtype) -> int:
        if self._rank != 0:
            return sum(self._give(part, dtype) for part in bucket.parts if part.source == self._rank)
        sizes = [math.prod(shape) for shape in bucket.shapes]
        flat = torch.empty(sum(sizes), dtype=dtype, device=self._device())
        tensors = {
            name: values.view(shape)
            for name, shape, values in zip(bucket.names, bucket.shapes, flat.split(sizes), strict=True)
        }
        for part in bucket.parts:
            target = tensors[part.tensor].narrow(part.dim, part.target_start, part.shape[part.dim])
            if part.source == 0:
                target.copy_(self._block(part))
            else:
                block = torch.empty(part.shape, dtype=dtype, device=flat.device)
                dist.recv(block, src=part.source)
                target.copy_(block)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        assert self._channel is not None
        message = flat.view(torch.uint8)
        self._channel.broadcast([message], options).wait()
        return message.numel()

    def _give(self, part: Transfer, dtype: torch.dtype) -> int:
        block = self._block(part).to(dtype).contiguous()
        dist.send(block, dst=0)
        return block.numel() * block.itemsize

    def _block(self, part: Transfer) -> torch.Tensor:
        return self._parameter(part.source_param).narrow(part.dim, part.source_start, part.shape[part.dim])

    def _device(self) -> torch.device:
        assert self._group is not None
        if self._group.backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
