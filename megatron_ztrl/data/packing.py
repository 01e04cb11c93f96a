"""Packs variable-length samples into thd microbatches: no padding to the longest, balanced over DP ranks.

Shape suffixes: ``T`` tokens of one packed microbatch, ``S`` sequences in it, ``L`` tokens of one sequence.

Every per-token array is aligned with the *predicting* position: entry ``t`` speaks of the token that position
``t`` predicts, which is token ``t + 1`` of the same sequence. The last position of a sequence predicts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One packed forward pass of one data-parallel rank."""

    sample_indices: list[int]
    """[S] Indices into the samples that were packed, in the order they lie in this microbatch."""
    cu_seqlens: np.ndarray
    """[S + 1] int32. Where each sequence starts; the padding at the end is a sequence of its own, not counted in
    ``sample_indices`` (then ``cu_seqlens`` has S + 2 entries)."""
    input_ids_T: np.ndarray
    """[T] int64."""
    position_ids_T: np.ndarray
    """[T] int64."""
    target_ids_T: np.ndarray
    """[T] int64. The next token of the same sequence; 0 where there is none."""
    loss_mask_T: np.ndarray
    """[T] bool. True where the target is a token to train."""
    per_token: dict[str, np.ndarray] = field(default_factory=dict)
    """[T] float32 each, 0.0 where ``loss_mask_T`` is False: ``rollout_logprobs``, and as the loop goes on
    ``old_logprobs`` and ``advantages``."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One optimizer step."""

    microbatches: list[list[Microbatch]]
    """[DP][M] Every data-parallel rank has the same number M of microbatches."""
    trained_tokens: int
    """Sum of all loss masks: the denominator of the token-level loss."""
