"""What is looked at before and after the weights move."""

import torch

from megatron_ztrl.types import TensorSlice
from megatron_ztrl.weights.verify import find_invalid

SLICES = [
    TensorSlice(param="w", tensor="first", dim=0, start=0, tensor_start=8, length=2),
    TensorSlice(param="w", tensor="second", dim=0, start=2, tensor_start=0, length=3),
]


def test_values_that_are_not_finite_are_counted_and_named_by_tensor_and_rank():
    weight = torch.ones(6, 4)
    assert find_invalid(SLICES, {"w": weight}.__getitem__, 3) is None
    weight[5, 0] = float("nan")  # padding, which nobody sends
    assert find_invalid(SLICES, {"w": weight}.__getitem__, 3) is None
    weight[2, 1], weight[4, 3] = float("inf"), float("nan")
    problem = find_invalid(SLICES, {"w": weight}.__getitem__, 3)
    assert problem == "second: 2 of 12 values on trainer rank 3 are not finite"


def test_finite_values_whose_sum_is_not_are_no_problem():
    assert find_invalid(SLICES, {"w": torch.full((5, 4), 3e38)}.__getitem__, 0) is None
