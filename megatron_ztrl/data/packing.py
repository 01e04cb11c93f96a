"""Packs variable-length samples into thd microbatches: no padding to the longest, balanced over DP ranks.

Shape suffixes: ``T`` tokens of one packed microbatch, ``S`` sequences in it, ``L`` tokens of one sequence,
``B`` samples of the batch.

Every per-token array is aligned with the *predicting* position: entry ``t`` speaks of the token that
position ``t`` predicts, which is token ``t + 1`` of the same sequence. The last position predicts nothing.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_ztrl.config.schema import WorldConfig
from megatron_ztrl.types import TrainingSample


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One packed forward pass of one data-parallel rank."""

    sample_indices: list[int]
    """[S] Indices into the samples that were packed, in the order they lie in this microbatch."""
    cu_seqlens: np.ndarray
    """[S + 1] int32. Where each sequence starts; the padding at the end is a sequence of its own, not counted
    in ``sample_indices`` (then ``cu_seqlens`` has S + 2 entries)."""
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
    ``old_logprobs``, ``advantages`` and ``importance_weights``."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One optimizer step."""

    microbatches: list[list[Microbatch]]
    """[DP][M] Every data-parallel rank has the same number M of microbatches."""
    trained_tokens: int
    """Sum of all loss masks: the denominator of the token-level loss."""


def token_multiple(world: WorldConfig, transformer: Mapping[str, Any]) -> int:
    """What the tokens of a microbatch must be a multiple of.

    Sequence parallelism spreads them over the tensor-parallel ranks, and FP8 kernels take 16 rows (mxfp8: 32) of
    what each rank has.

    Args:
        world: The layout.
        transformer: ``megatron.transformer``.
    """
    ranks = world.tensor_parallel_size if world.sequence_parallel else 1
    if not transformer.get("fp8"):
        return ranks
    return ranks * (32 if transformer.get("fp8_recipe") == "mxfp8" else 16)


def pack(
    samples: Sequence[TrainingSample],
    *,
    max_tokens_per_microbatch: int,
    data_parallel_size: int,
    pad_to_multiple: int = 1,
) -> PackedBatch:
    """Packs samples into microbatches: DP ranks get nearly equal tokens, and equally many microbatches.

    Inside a microbatch the sequences lie longest first, so that equal lengths are neighbours. A rank with
    fewer microbatches than another gets empty ones: ``pad_to_multiple`` padding tokens and no sample.

    Args:
        samples: Indexed by ``Microbatch.sample_indices``.
        max_tokens_per_microbatch: Budget of a microbatch, its padding included.
        data_parallel_size: Number of ranks to spread over.
        pad_to_multiple: Every microbatch has a multiple of this many tokens (``token_multiple``).

    Raises:
        ValueError: No samples, or one that does not fit the budget.
    """
    if not samples:
        raise ValueError("no samples to pack: every group was filtered out, or every rollout failed")
    lengths = [len(sample.token_ids) for sample in samples]
    capacity = max_tokens_per_microbatch // pad_to_multiple * pad_to_multiple
    if max(lengths) > capacity:
        raise ValueError(
            f"a sample of {max(lengths)} tokens does not fit actor.max_tokens_per_microbatch="
            f"{max_tokens_per_microbatch} (padded to a multiple of {pad_to_multiple}): raise it to at least "
            "data.max_prompt_tokens + rollout.max_response_tokens"
        )
    ranks = [_fill_bins(indices, lengths, capacity) for indices in _balance(lengths, data_parallel_size)]
    count = max(len(bins) for bins in ranks)
    arrays = [_SampleArrays.of(sample) for sample in samples]
    microbatches = [
        [_microbatch(bins[m] if m < len(bins) else [], arrays, pad_to_multiple) for m in range(count)]
        for bins in ranks
    ]
    trained_tokens = sum(int(mb.loss_mask_T.sum()) for rank in microbatches for mb in rank)
    return PackedBatch(microbatches=microbatches, trained_tokens=trained_tokens)


def split_minibatches(sample_count: int, count: int, rng: np.random.Generator) -> list[list[int]]:
    """Splits sample indices at random into ``count`` minibatches whose sizes differ by at most one.

    There are fewer minibatches if the infrastructure has failed so many rollouts that some would be empty.
    """
    return [part.tolist() for part in np.array_split(rng.permutation(sample_count), min(count, sample_count))]


def with_per_token(batch: PackedBatch, name: str, values: Sequence[Sequence[np.ndarray]]) -> PackedBatch:
    """A copy of the batch whose microbatches carry ``values[rank][m]`` ([T]) as ``per_token[name]``.

    Values where the loss mask is False become 0.0, whatever they were.
    """
    assert len(values) == len(batch.microbatches), "one list of arrays for each data-parallel rank"
    ranks = [
        [_attach(mb, name, array_T) for mb, array_T in zip(rank, arrays, strict=True)]
        for rank, arrays in zip(batch.microbatches, values, strict=True)
    ]
    return replace(batch, microbatches=ranks)


def trained_values(
    batch: PackedBatch, values: Sequence[Sequence[np.ndarray]], sample_count: int
) -> list[np.ndarray]:
    """Takes per-token arrays apart again.

    Args:
        batch: The packed samples.
        values: ``values[rank][m]`` is [T].
        sample_count: How many samples were packed.

    Returns:
        For each sample the values of its trained tokens, in their order.
    """
    found: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * sample_count
    for rank, arrays in zip(batch.microbatches, values, strict=True):
        for mb, array_T in zip(rank, arrays, strict=True):
            parts = np.split(array_T[mb.loss_mask_T], np.cumsum(_trained_counts(mb))[:-1])
            for index, part in zip(mb.sample_indices, parts, strict=False):
                found[index] = part
    return found


def spread_trained(batch: PackedBatch, values: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The inverse of ``trained_values``; fits ``with_per_token``.

    Args:
        batch: The packed samples.
        values: For each sample, by its index, the values of its trained tokens.

    Returns:
        ``arrays[rank][m]``: [T] float32, 0.0 where the loss mask is False.
    """
    return [[_spread(mb, values) for mb in rank] for rank in batch.microbatches]


def _balance(lengths: Sequence[int], rank_count: int) -> list[list[int]]:
    """Longest first to the rank with the fewest tokens so far; each rank's list is longest first, too."""
    ranks: list[list[int]] = [[] for _ in range(rank_count)]
    loads = [(0, rank) for rank in range(rank_count)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rank = heapq.heappop(loads)
        ranks[rank].append(index)
        heapq.heappush(loads, (tokens + lengths[index], rank))
    return ranks


def _fill_bins(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sample goes to the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted (free tokens, bin)
    for index in indices:
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place < len(free):
            tokens, bin_index = free.pop(place)
        else:
            tokens, bin_index = capacity, len(bins)
            bins.append([])
        bins[bin_index].append(index)
        bisect.insort(free, (tokens - lengths[index], bin_index))
    return bins


@dataclass(frozen=True, slots=True)
class _SampleArrays:
    """One sample, aligned with the predicting position."""

    input_ids_L: np.ndarray
    target_ids_L: np.ndarray
    loss_mask_L: np.ndarray
    rollout_logprobs_L: np.ndarray

    @classmethod
    def of(cls, sample: TrainingSample) -> _SampleArrays:
        tokens = len(sample.token_ids)
        assert tokens == len(sample.loss_mask) == len(sample.rollout_logprobs)
        # Reading the lists is nearly all the time of pack(): fromiter() and bytes() beat array() here.
        ids_L = np.fromiter(sample.token_ids, dtype=np.int64, count=tokens)
        mask_L = np.frombuffer(bytes(sample.loss_mask), dtype=bool)
        logprobs_L = np.fromiter(sample.rollout_logprobs, dtype=np.float32, count=tokens)
        logprobs_L[~mask_L] = 0.0
        return cls(ids_L, _shift(ids_L), _shift(mask_L), _shift(logprobs_L))


def _shift(values_L: np.ndarray) -> np.ndarray:
    """Moves what is said of a token to the position before it, which predicts it."""
    shifted_L = np.zeros_like(values_L)
    shifted_L[:-1] = values_L[1:]
    return shifted_L


def _microbatch(indices: list[int], arrays: Sequence[_SampleArrays], pad_to_multiple: int) -> Microbatch:
    parts = [arrays[index] for index in indices]
    lengths = [len(part.input_ids_L) for part in parts]
    padding = -sum(lengths) % pad_to_multiple if parts else pad_to_multiple
    if padding:
        lengths.append(padding)
        parts.append(_padding(padding))
    return Microbatch(
        sample_indices=indices,
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        input_ids_T=np.concatenate([part.input_ids_L for part in parts]),
        position_ids_T=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        target_ids_T=np.concatenate([part.target_ids_L for part in parts]),
        loss_mask_T=np.concatenate([part.loss_mask_L for part in parts]),
        per_token={"rollout_logprobs": np.concatenate([part.rollout_logprobs_L for part in parts])},
    )


def _padding(tokens: int) -> _SampleArrays:
    zeros_L = np.zeros(tokens, dtype=np.int64)
    return _SampleArrays(zeros_L, zeros_L, np.zeros(tokens, dtype=bool), np.zeros(tokens, dtype=np.float32))


def _attach(microbatch: Microbatch, name: str, values_T: np.ndarray) -> Microbatch:
    assert values_T.shape == microbatch.loss_mask_T.shape, (
        name,
        values_T.shape,
        microbatch.loss_mask_T.shape,
    )
    masked_T = np.where(microbatch.loss_mask_T, values_T, 0.0).astype(np.float32)
    return replace(microbatch, per_token={**microbatch.per_token, name: masked_T})


def _trained_counts(microbatch: Microbatch) -> np.ndarray:
    """[S] How many tokens of each sequence are trained; at least one entry."""
    return np.add.reduceat(microbatch.loss_mask_T, microbatch.cu_seqlens[:-1], dtype=np.int64)


def _spread(microbatch: Microbatch, values: Sequence[np.ndarray]) -> np.ndarray:
    spread_T = np.zeros(len(microbatch.loss_mask_T), dtype=np.float32)
    if microbatch.sample_indices:
        spread_T[microbatch.loss_mask_T] = np.concatenate([values[i] for i in microbatch.sample_indices])
    return spread_T
