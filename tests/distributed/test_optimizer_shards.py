"""Runs of a flattened tensor as rectangles of the tensor."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_ztrl.trainer.cpu_compat import cuda_calls

cuda_calls.install()

from megatron_ztrl.trainer.optimizer_shards import rectangles  # noqa: E402


def test_a_run_is_the_end_of_a_row_whole_rows_and_the_beginning_of_one() -> None:
    assert list(rectangles((4, 5), 3, 17)) == [((0, 1), (3, 5)), ((1, 3), (0, 5)), ((3, 4), (0, 2))]
    assert list(rectangles((4, 5), 6, 9)) == [((1, 2), (1, 4))]
    assert list(rectangles((4, 5), 5, 15)) == [((1, 3), (0, 5))]
    assert list(rectangles((7,), 2, 6)) == [((2, 6),)]


@pytest.mark.parametrize("shape", [(6,), (4, 5), (1, 7), (5, 1), (2, 3, 4)], ids=str)
def test_every_run_of_small_tensors_is_cut_into_its_elements_in_order(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in itertools.combinations(range(numbers.size + 1), 2):
        cut = list(rectangles(shape, start, stop))
        elements = [numbers[tuple(slice(a, b) for a, b in rectangle)].flatten() for rectangle in cut]
        assert np.concatenate(elements).tolist() == list(range(start, stop))
        assert len(cut) <= 2 * len(shape) - 1
