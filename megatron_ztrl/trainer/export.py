"""Writes a policy or a critic as a Hugging Face checkpoint, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_checkpoint import HFCheckpointWriter, head_config
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    Backend,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)


def owners(
    architecture: Architecture, layout: ParallelLayout, backend: Backend
) -> dict[str, list[tuple[int, TensorSlice]]]:
    """For each HF tensor, the slices that cover it exactly once and the lowest rank that holds each."""
    found: dict[str, list[tuple[int, TensorSlice]]] = {name: [] for name in hf_tensor_shapes(architecture)}
    seen: set[tuple[str, int]] = set()
    for rank in range(layout.world_size):
        for piece in megatron_slices(architecture, layout, rank, backend=backend):
            if (piece.tensor, piece.tensor_start) not in seen:
                seen.add((piece.tensor, piece.tensor_start))
                found[piece.tensor].append((rank, piece))
    return found


@torch.no_grad()
def export_hf(
    directory: Path,
    source: Path,
    parameter: Callable[[str], Tensor],
    architecture: Architecture,
    layout: ParallelLayout,
    backend: Backend,
) -> None:
    """Gathers every tensor on rank 0, which writes it; collective over all ranks.

    Args:
        directory: where the checkpoint goes when it is whole, in place of what was there.
        source: the checkpoint that config.json and the tokenizer files are copied from.
        parameter: this rank's parameters by ``TensorSlice.param``.
    """
    rank = dist.get_rank()
    shapes = hf_tensor_shapes(architecture)
    some = parameter(megatron_slices(architecture, layout, rank, backend=backend)[0].param)
    with _replacing(directory) if rank == 0 else nullcontext() as partial:
        writer = HFCheckpointWriter(partial, shapes, some.dtype) if partial else None
        for name, pieces in owners(architecture, layout, backend).items():
            whole = torch.empty(shapes[name], dtype=some.dtype) if writer else None
            for owner, piece in pieces:
                if owner == rank:
                    block = parameter(piece.param).narrow(piece.dim, piece.start, piece.length).contiguous()
                    if rank != 0:
                        dist.send(block, dst=0)
                if whole is not None:
                    target = whole.narrow(piece.dim, piece.tensor_start, piece.length)
                    if owner != 0:
                        block = torch.empty(target.shape, dtype=some.dtype, device=some.device)
                        dist.recv(block, src=owner)
                    target.copy_(block)
            if writer and whole is not None:
                writer.add(name, whole)
        if writer:
            writer.close(source, **head_config(architecture))
    dist.barrier()


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A new directory that gets this name if all goes well; until then, what has the name keeps it."""
    partial, former = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "former"))
    for leftover in (partial, former):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(former)
    partial.rename(directory)
    shutil.rmtree(former, ignore_errors=True)
