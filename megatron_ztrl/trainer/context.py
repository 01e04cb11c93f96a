"""Context parallelism: which tokens of a packed microbatch each rank works on. Arithmetic only.

Attention is causal, so the end of a sequence costs more than its beginning. Every sequence is therefore cut into
twice as many equal pieces as there are ranks, and rank r takes piece r from the front and piece r from the back. This
is how Transformer Engine and Megatron want the tokens of packed sequences to be spread.

Shape suffixes: see ``megatron_ztrl.trainer``; ``P`` is the tokens of the microbatch with every sequence padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

PADDING = -1


@dataclass(frozen=True, kw_only=True)
class ContextPart:
    """One context-parallel rank's part of a packed microbatch."""

    size: int
    rank: int
    cu_seqlens: np.ndarray
    """[S + 1] int32. Where each padded sequence starts, and where the last one ends."""
    source_T: np.ndarray
    """[T] Position in the microbatch of every token that this rank works on; ``PADDING`` where there is none."""

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, *, size: int, rank: int, multiple: int) -> ContextPart:
        """The part of one rank.

        Args:
            cu_seqlens: [S + 1] Of the microbatch.
            size: Context-parallel ranks.
            rank: Which of them.
            multiple: What the tokens of each rank must be a multiple of.
        """
        lengths_S = np.diff(cu_seqlens)
        padded_S = -(-lengths_S // (2 * size)) * (2 * size)
        padded_S[-1] += -padded_S.sum() % math.lcm(2 * size, size * multiple)
        padded = np.concatenate([[0], np.cumsum(padded_S)]).astype(np.int32)
        source_P = np.full(padded[-1], PADDING, dtype=np.int64)
        for start, length, at in zip(cu_seqlens, lengths_S, padded, strict=False):
            source_P[at : at + length] = np.arange(start, start + length)
        return cls(size=size, rank=rank, cu_seqlens=padded, source_T=source_P[_pieces(padded, size, rank)])

    @property
    def placed_T(self) -> np.ndarray:
        """[T] Position in the padded sequences of every token that this rank works on."""
        return _pieces(self.cu_seqlens, self.size, self.rank)

    @property
    def order_P(self) -> np.ndarray:
        """[P] Where each token of the padded sequences is when the parts of all ranks lie behind each other."""
        parts = [_pieces(self.cu_seqlens, self.size, rank) for rank in range(self.size)]
        return np.argsort(np.concatenate(parts))


def _pieces(cu_seqlens: np.ndarray, size: int, rank: int) -> np.ndarray:
    """[P / size] Positions in the padded sequences, in the order in which the rank holds them."""
    found = []
    for start, end in pairwise(cu_seqlens):
        length = (end - start) // (2 * size)
        for piece in (rank, 2 * size - 1 - rank):
            found.append(np.arange(start + piece * length, start + (piece + 1) * length))
    return np.concatenate(found)
