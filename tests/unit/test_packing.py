"""Packing: alignment by hand, and invariants over random batches."""

import sys

import numpy as np
import pytest

from megatron_ztrl.data.packing import (
    PackedBatch,
    pack,
    split_minibatches,
    spread_trained,
    trained_values,
    with_per_token,
)
from megatron_ztrl.types import NOT_SAMPLED, TrainingSample


def _sample(token_ids: list[int], prompt_tokens: int, reward: float = 1.0) -> TrainingSample:
    response = len(token_ids) - prompt_tokens
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=[False] * prompt_tokens + [True] * response,
        rollout_logprobs=[0.0] * prompt_tokens + [-0.5 - i for i in range(response)],
        weight_versions=[0] * len(token_ids),
        reward=reward,
        group_id=0,
    )


def _random_samples(rng: np.random.Generator, count: int, longest: int) -> list[TrainingSample]:
    samples = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        mask = [False, *(rng.random(length - 1) < 0.7).tolist()]
        logprobs = [-float(x) if m else 0.0 for x, m in zip(rng.random(length), mask, strict=True)]
        ids = rng.integers(1, 1000, length).tolist()
        samples.append(
            TrainingSample(
                token_ids=ids,
                loss_mask=mask,
                rollout_logprobs=logprobs,
                weight_versions=[0] * length,
                reward=0.0,
                group_id=0,
            )
        )
    return samples


def test_arrays_are_aligned_with_the_predicting_position_and_padding_is_a_sequence_of_its_own():
    # The second sample has a tool reply (token 22) between two model tokens.
    tool = TrainingSample(
        token_ids=[20, 21, 22, 23],
        loss_mask=[False, True, False, True],
        rollout_logprobs=[0.0, -1.0, 0.0, -2.0],
        weight_versions=[NOT_SAMPLED, 0, NOT_SAMPLED, 0],
        reward=0.0,
        group_id=0,
    )
    batch = pack(
        [_sample([10, 11, 12], prompt_tokens=2), tool],
        max_tokens_per_microbatch=8,
        data_parallel_size=1,
        pad_to_multiple=4,
    )
    [[mb]] = batch.microbatches
    assert mb.sample_indices == [1, 0]  # longest first
    assert mb.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert mb.cu_seqlens.dtype == np.int32
    assert mb.input_ids_T.tolist() == [20, 21, 22, 23, 10, 11, 12, 0]
    assert mb.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert mb.target_ids_T.tolist() == [21, 22, 23, 0, 11, 12, 0, 0]
    assert mb.loss_mask_T.tolist() == [True, False, True, False, False, True, False, False]
    assert mb.per_token["rollout_logprobs"].tolist() == [-1.0, 0.0, -2.0, 0.0, 0.0, -0.5, 0.0, 0.0]
    assert batch.trained_tokens == 3


def test_a_rank_without_samples_gets_an_empty_microbatch_of_pure_padding():
    batch = pack(
        [_sample([1, 2, 3], 1)], max_tokens_per_microbatch=8, data_parallel_size=2, pad_to_multiple=4
    )
    [full], [empty] = batch.microbatches
    assert full.sample_indices == [0]
    assert full.cu_seqlens.tolist() == [0, 3, 4]
    assert empty.sample_indices == []
    assert empty.cu_seqlens.tolist() == [0, 4]
    assert empty.input_ids_T.tolist() == [0] * 4
    assert empty.position_ids_T.tolist() == [0, 1, 2, 3]
    assert not empty.loss_mask_T.any()
    [[_], [advantages_T]] = spread_trained(batch, [np.array([2.0])] * 9)
    assert advantages_T.tolist() == [0.0] * 4


def test_no_padding_means_no_padding_sequence():
    [[mb]] = pack([_sample([1, 2, 3], 1)], max_tokens_per_microbatch=3, data_parallel_size=1).microbatches
    assert mb.cu_seqlens.tolist() == [0, 3]


@pytest.mark.parametrize("seed", range(30))
def test_every_packing_keeps_the_invariants(seed: int):
    rng = np.random.default_rng(seed)
    ranks, multiple = int(rng.integers(1, 6)), int(rng.choice([1, 2, 8, 16]))
    longest = int(rng.integers(4, 90))
    budget = -(-longest // multiple) * multiple + int(rng.integers(0, 100))
    samples = _random_samples(rng, int(rng.integers(1, 60)), longest)
    batch = pack(
        samples, max_tokens_per_microbatch=budget, data_parallel_size=ranks, pad_to_multiple=multiple
    )
    assert len(batch.microbatches) == ranks
    assert len({len(rank) for rank in batch.microbatches}) == 1
    _check_contents(batch, samples, budget, multiple)
    loads = [
        sum(len(samples[i].token_ids) for mb in rank for i in mb.sample_indices)
        for rank in batch.microbatches
    ]
    assert max(loads) - min(loads) <= max(len(s.token_ids) for s in samples)
    assert batch.trained_tokens == sum(sum(s.loss_mask) for s in samples)


def _check_contents(batch: PackedBatch, samples: list[TrainingSample], budget: int, multiple: int) -> None:
    seen = []
    for mb in (mb for rank in batch.microbatches for mb in rank):
        tokens = len(mb.input_ids_T)
        assert 0 < tokens <= budget
        assert tokens % multiple == 0
        assert mb.cu_seqlens[-1] == tokens
        assert len(mb.cu_seqlens) - 1 - len(mb.sample_indices) in (0, 1)
        lengths = [len(samples[i].token_ids) for i in mb.sample_indices]
        assert lengths == sorted(lengths, reverse=True)
        for index, start, end in zip(mb.sample_indices, mb.cu_seqlens[:-1], mb.cu_seqlens[1:], strict=False):
            sample = samples[index]
            seen.append(index)
            assert mb.input_ids_T[start:end].tolist() == sample.token_ids
            assert mb.target_ids_T[start : end - 1].tolist() == sample.token_ids[1:]
            assert mb.loss_mask_T[start : end - 1].tolist() == sample.loss_mask[1:]
            assert not mb.loss_mask_T[end - 1]
            assert np.allclose(mb.per_token["rollout_logprobs"][start : end - 1], sample.rollout_logprobs[1:])
        assert not mb.loss_mask_T[sum(lengths) :].any()
    assert sorted(seen) == list(range(len(samples)))


def test_samples_fill_the_fullest_microbatch_that_has_room():
    # 6+4 and 5+3+2 fill two microbatches of 10 exactly.
    samples = [_sample(list(range(1, n + 1)), 1) for n in (2, 3, 4, 5, 6)]
    batch = pack(samples, max_tokens_per_microbatch=10, data_parallel_size=1)
    assert [mb.sample_indices for mb in batch.microbatches[0]] == [[4, 2], [3, 1, 0]]


def test_a_sample_over_the_budget_names_the_config_path():
    samples = [_sample(list(range(9)), 1)]
    with pytest.raises(ValueError, match=r"9 tokens does not fit actor.max_tokens_per_microbatch=8"):
        pack(samples, max_tokens_per_microbatch=8, data_parallel_size=1)
    with pytest.raises(ValueError, match="multiple of 4"):  # 9 tokens pad to 12, and 11 holds only 8
        pack(samples, max_tokens_per_microbatch=11, data_parallel_size=1, pad_to_multiple=4)
    with pytest.raises(ValueError, match="no samples to pack"):
        pack([], max_tokens_per_microbatch=8, data_parallel_size=1)


def test_values_of_trained_tokens_go_there_and_come_back():
    samples = [_sample([1, 2, 3], 1), _sample([4, 5, 6, 7], 3)]
    batch = pack(samples, max_tokens_per_microbatch=8, data_parallel_size=1, pad_to_multiple=8)
    values = [np.array([0.5, 0.25]), np.array([-2.0])]
    arrays = spread_trained(batch, values)
    batch = with_per_token(batch, "advantages", arrays)
    [[mb]] = batch.microbatches
    assert mb.sample_indices == [1, 0]
    assert mb.per_token["advantages"].tolist() == [0, 0, -2.0, 0, 0.5, 0.25, 0, 0]
    assert mb.per_token["advantages"].dtype == np.float32
    assert set(mb.per_token) == {"rollout_logprobs", "advantages"}
    assert [part.tolist() for part in trained_values(batch, arrays, 2)] == [[0.5, 0.25], [-2.0]]


@pytest.mark.parametrize("seed", range(10))
def test_trained_values_survive_every_packing(seed: int):
    rng = np.random.default_rng(seed)
    samples = _random_samples(rng, int(rng.integers(1, 40)), 50)
    batch = pack(samples, max_tokens_per_microbatch=64, data_parallel_size=3, pad_to_multiple=4)
    values = [rng.random(sum(sample.loss_mask)).astype(np.float32) for sample in samples]
    found = trained_values(batch, spread_trained(batch, values), len(samples))
    assert [part.tolist() for part in found] == [part.tolist() for part in values]


def test_attached_values_are_zeroed_where_nothing_is_trained():
    batch = pack(
        [_sample([1, 2, 3], 1)], max_tokens_per_microbatch=4, data_parallel_size=1, pad_to_multiple=4
    )
    attached = with_per_token(batch, "old_logprobs", [[np.array([-1.0, -2.0, np.nan, 9.0])]])
    assert attached.microbatches[0][0].per_token["old_logprobs"].tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert "old_logprobs" not in batch.microbatches[0][0].per_token


def test_minibatches_are_a_seeded_partition_of_nearly_equal_sizes():
    parts = split_minibatches(10, 3, np.random.default_rng(4))
    assert sorted(len(p) for p in parts) == [3, 3, 4]
    assert sorted(i for p in parts for i in p) == list(range(10))
    assert parts == split_minibatches(10, 3, np.random.default_rng(4))
    assert parts != split_minibatches(10, 3, np.random.default_rng(5))
    assert sorted(split_minibatches(2, 3, np.random.default_rng(0))) == [
        [0],
        [1],
    ]  # an outage left two rollouts


def test_packing_work_grows_with_the_samples_not_with_samples_times_bins():
    assert _steps_to_pack(2048) < 2.2 * _steps_to_pack(1024)


def _steps_to_pack(count: int) -> int:
    """Lines of Python that are run; two samples fill a bin."""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        steps += 1
        return trace

    samples = [_sample(list(range(8)), prompt_tokens=1)] * count
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        batch = pack(samples, max_tokens_per_microbatch=16, data_parallel_size=1)
    finally:
        sys.settrace(former)
    assert len(batch.microbatches[0]) == count // 2
    return steps
