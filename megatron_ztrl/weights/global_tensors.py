"""Where HF weights lie in the global tensors of a Megatron checkpoint, and which part of them a rank saves.

Arithmetic on top of ``hf_mapping``: the one rank of a layout without parallelism holds every tensor whole, so its
slices say where everything is; a rank of another layout is matched with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes, megatron_slices

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: [start, stop) in every dimension."""

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""HF tensors that Megatron pads with rows, to divide the vocabulary among tensor-parallel ranks."""
WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which Megatron saves an object of extra state, empty without FP8."""


@dataclass(frozen=True, kw_only=True)
class GlobalPiece:
    """A block of an HF tensor and where it is in a global tensor."""

    key: str
    """Of the global tensor."""
    layer: int | None
    """The index in the first dimension, where the global tensor stacks layers."""
    hf_shape: tuple[int, ...]
    """Of the whole HF tensor."""
    source: TensorSlice

    @property
    def hf_box(self) -> Box:
        """The block in the HF tensor."""
        box = [(0, size) for size in self.hf_shape]
        start = self.source.tensor_start
        box[self.source.dim] = (start, start + self.source.length)
        return tuple(box)

    @property
    def box(self) -> Box:
        """The block in the global tensor."""
        return self.to_global(self.hf_box)

    def to_global(self, hf_box: Box) -> Box:
        """Where a part of this block lies in the global tensor."""
        dim, shift = self.source.dim, self.source.start - self.source.tensor_start
        moved = [(a + shift, b + shift) if i == dim else (a, b) for i, (a, b) in enumerate(hf_box)]
        return tuple(moved) if self.layer is None else ((self.layer, self.layer + 1), *moved)


def global_pieces(architecture: Architecture) -> dict[str, list[GlobalPiece]]:
    """For every HF tensor, the blocks that cover it, in order."""
    shapes = hf_tensor_shapes(architecture)
    pieces: dict[str, list[GlobalPiece]] = {name: [] for name in shapes}
    for piece in _whole_slices(architecture):
        key, layer = _split_layer(piece.param)
        pieces[piece.tensor].append(
            GlobalPiece(key=key, layer=layer, hf_shape=shapes[piece.tensor], source=piece)
        )
    return pieces


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A block of a global tensor that one rank saves, and the HF blocks that it is made of."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    is_stacked: bool
    """Whether the first dimension is the layer; it is then 1 long here."""
    pieces: list[tuple[int, TensorSlice]]
    """(where along the slice's dimension it starts in the chunk, the HF block)."""
    has_padding: bool
    """Whether there are rows in no piece, which are zero."""


def rank_chunks(architecture: Architecture, layout: ParallelLayout, rank: int) -> Iterator[Chunk]:
    """What a rank saves, replicas included, in the order of its parameters."""
    wholes = _by_param(_whole_slices(architecture))
    shapes = hf_tensor_shapes(architecture)
    place = layout.place(rank)
    mine = _by_param(megatron_slices(architecture, layout, rank, backend="te"))
    # A rank may hold nothing but padding of the vocabulary, and then has no slice of it. Its first peer has one.
    first_peer = megatron_slices(architecture, layout, rank - place.tensor_rank, backend="te")
    for param in _by_param(first_peer):
        name = _global_param(param, architecture, layout, place.pipeline_rank)
        if name not in wholes:
            continue  # the last stage's copy of tied embeddings
        whole = wholes[name]
        shape = list(shapes[whole[0].tensor])
        shape[whole[0].dim] = sum(piece.length for piece in whole)
        runs = _runs(mine.get(param, []), whole)
        if whole[0].tensor in VOCABULARY_TENSORS:
            shape[0] = architecture.padded_vocab_size(layout.tensor_size)
            rows = shape[0] // layout.tensor_size
            runs = [(place.tensor_rank * rows, rows, parts) for _, _, parts in runs or [(0, 0, [])]]
        for run in runs:
            yield _chunk(name, shape, whole[0].dim, run, architecture.num_layers)


def extra_state_keys(architecture: Architecture, layout: ParallelLayout, rank: int) -> Iterator[str]:
    """Names of the empty objects that a rank saves beside its weights, replicas included."""
    place = layout.place(rank)
    per_chunk = architecture.num_layers // (layout.pipeline_size * layout.virtual_size)
    for chunk in range(layout.virtual_size):
        first = layout.first_layer(architecture.num_layers, place.pipeline_rank, chunk)
        for layer in range(first, first + per_chunk):
            for module in WITH_EXTRA_STATE:
                yield f"decoder.layers.{module}._extra_state/shard_{layer}_{architecture.num_layers}"


def intersection(a: Box, b: Box) -> Box | None:
    """What two blocks have in common; None for nothing."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _whole_slices(architecture: Architecture) -> list[TensorSlice]:
    # Checkpoints have Transformer Engine's names under both backends.
    return megatron_slices(architecture, ParallelLayout(), 0, backend="te")


def _split_layer(param: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(decoder\.layers)\.(\d+)\.(.+)", param)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (param, None)


def _global_param(param: str, architecture: Architecture, layout: ParallelLayout, stage: int) -> str:
    """A parameter's name in the layout without parallelism."""
    chunk = 0
    if layout.virtual_size > 1:
        number, param = param.split(".", 1)
        chunk = int(number)
    key, layer = _split_layer(param)
    if layer is None:
        return param
    first = layout.first_layer(architecture.num_layers, stage, chunk)
    return key.replace("decoder.layers.", f"decoder.layers.{first + layer}.", 1)


Run = tuple[int, int, list[tuple[int, TensorSlice]]]
"""(start in the global tensor, length, the pieces and where they start in the run)."""


def _runs(pieces: list[TensorSlice], whole: list[TensorSlice]) -> list[Run]:
    """A rank's part of one parameter: one run, or two for the gate and up halves of a gated MLP."""
    runs: list[Run] = []
    for piece in pieces:
        start = _global_start(piece, whole)
        if runs and runs[-1][0] + runs[-1][1] == start:
            first, length, parts = runs.pop()
            runs.append((first, length + piece.length, [*parts, (length, piece)]))
        else:
            runs.append((start, piece.length, [(0, piece)]))
    return runs


def _chunk(param: str, shape: list[int], dim: int, run: Run, num_layers: int) -> Chunk:
    start, length, pieces = run
    offsets = tuple(start if i == dim else 0 for i in range(len(shape)))
    sizes = tuple(length if i == dim else size for i, size in enumerate(shape))
    key, layer = _split_layer(param)
    is_stacked = layer is not None
    return Chunk(
        key=key,
        global_shape=(num_layers, *shape) if is_stacked else tuple(shape),
        offsets=offsets if layer is None else (layer, *offsets),
        sizes=(1, *sizes) if is_stacked else sizes,
        is_stacked=is_stacked,
        pieces=pieces,
        has_padding=sum(piece.length for _, piece in pieces) < length,
    )


def _by_param(slices: list[TensorSlice]) -> dict[str, list[TensorSlice]]:
    grouped: dict[str, list[TensorSlice]] = {}
    for piece in slices:
        grouped.setdefault(piece.param, []).append(piece)
    return grouped


def _global_start(piece: TensorSlice, whole: list[TensorSlice]) -> int:
    for candidate in whole:
        inside = piece.tensor_start - candidate.tensor_start
        if candidate.tensor == piece.tensor and 0 <= inside < candidate.length:
            return candidate.start + inside
    raise AssertionError(f"{piece} is not in the whole parameter")
