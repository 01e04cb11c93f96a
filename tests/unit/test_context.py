"""Context-parallel ranks share a packed microbatch as Transformer Engine wants it, and lose no token."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ztrl.trainer.context import PADDING, ContextPart


def parts(lengths: list[int], size: int, multiple: int = 1) -> list[ContextPart]:
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    return [ContextPart.of(cu_seqlens, size=size, rank=rank, multiple=multiple) for rank in range(size)]


def test_a_rank_gets_a_piece_from_the_front_and_one_from_the_back_of_every_sequence() -> None:
    # The example in Transformer Engine's description of its attention: sequences of 8 and 4 over 2 ranks.
    first, second = parts([8, 4], size=2)
    assert first.source_T.tolist() == [0, 1, 6, 7, 8, 11]
    assert second.source_T.tolist() == [2, 3, 4, 5, 9, 10]
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12]


def test_sequences_are_padded_to_equal_pieces() -> None:
    # 5 -> 8 and 2 -> 4: pieces of 2 and of 1.
    first, second = parts([5, 2], size=2)
    assert first.cu_seqlens.tolist() == [0, 8, 12]
    assert first.source_T.tolist() == [0, 1, PADDING, PADDING, 5, PADDING]
    assert second.source_T.tolist() == [2, 3, 4, PADDING, 6, PADDING]


LENGTHS = [[1], [16], [40, 17, 17, 3], [7, 1, 1, 29, 64, 5, 2]]


@pytest.mark.parametrize("multiple", [1, 2, 16, 24])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_token_is_on_one_rank_and_ranks_have_equally_many(
    lengths: list[int], size: int, multiple: int
) -> None:
    shared = parts(lengths, size, multiple)
    tokens = np.concatenate([part.source_T for part in shared])
    assert sorted(tokens[tokens != PADDING].tolist()) == list(range(sum(lengths)))
    assert len({part.source_T.size for part in shared}) == 1
    assert shared[0].source_T.size % multiple == 0
    padded_S = np.diff(shared[0].cu_seqlens)
    assert (padded_S % (2 * size) == 0).all() and (padded_S >= lengths).all()
    # No more padding than each sequence needs, but for the last one, which fills up all ranks.
    assert (padded_S[:-1] - lengths[:-1] < 2 * size).all()
    assert padded_S[-1] - lengths[-1] < 2 * size + np.lcm(2 * size, size * multiple)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_parts_of_all_ranks_can_be_put_in_order_again(lengths: list[int], size: int) -> None:
    shared = parts(lengths, size)
    together = np.concatenate([part.source_T for part in shared])[shared[0].order_P]
    expected, at = [], 0
    for length, padded in zip(lengths, np.diff(shared[0].cu_seqlens), strict=True):
        expected += [*range(at, at + length), *[PADDING] * (padded - length)]
        at += length
    assert together.tolist() == expected
    for part in shared:
        assert together[part.placed_T].tolist() == part.source_T.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_causal_work_is_nearly_equal_on_all_ranks(size: int) -> None:
    # A token at place t of its sequence looks at t + 1 tokens.
    lengths = [800, 240, 64]
    place = np.concatenate([np.arange(length) for length in lengths])
    work = [int((place[part.source_T[part.source_T != PADDING]] + 1).sum()) for part in parts(lengths, size)]
    assert max(work) == min(work) == sum(n * (n + 1) // 2 for n in lengths) // size
