"""Log-probs made chunk by chunk from hidden states are those of the whole logits, gradients too."""

from __future__ import annotations

import pytest
import torch
from launcher import launch
from logprob_ranks import HIDDEN_SIZE, PADDED_SIZE, Case, measure

CASES = {
    "two-ranks": Case(),
    "one-rank": Case(ranks=1),
    "one-chunk": Case(max_chunk_bytes=1 << 20),
    "temperature-one": Case(temperature=1.0),
    "no-rows": Case(rows=0),
    "one-row": Case(rows=1),
}
LARGE = {"large-logits": Case(logit_scale=50.0), "large-logits-one-rank": Case(logit_scale=50.0, ranks=1)}
BFLOAT16 = {"bfloat16": Case(dtype=torch.bfloat16)}


MANY_ROWS = {"many-rows": Case(rows=60, ranks=1, max_chunk_bytes=60 * 64 * 4)}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, tuple[dict[str, float], int]]]:
    """By rank and case, the relative gap of each result, and the elements of the largest tensor."""
    return launch(measure, 2, CASES | LARGE | BFLOAT16 | MANY_ROWS)


@pytest.fixture(scope="module")
def gaps(measured: list[dict[str, tuple[dict[str, float], int]]]) -> dict[str, dict[str, float]]:
    """By case and result, the largest gap on any rank."""
    return {
        case: {result: max(ranks[case][0][result] for ranks in measured) for result in found}
        for case, (found, _) in measured[0].items()
    }


@pytest.mark.parametrize("name", CASES)
def test_chunked_results_equal_a_float64_softmax(gaps: dict[str, dict[str, float]], name: str) -> None:
    assert max(gaps[name].values()) < 2e-6, gaps[name]


@pytest.mark.parametrize("name", LARGE)
def test_logits_whose_exp_would_overflow_cost_only_their_own_rounding(
    gaps: dict[str, dict[str, float]], name: str
) -> None:
    assert max(gaps[name].values()) < 1e-4, gaps[name]  # a float32 of 800 is exact to 3e-5


def test_bfloat16_loses_no_more_than_the_rounding_of_its_logits(gaps: dict[str, dict[str, float]]) -> None:
    assert max(gaps["bfloat16"].values()) < 2e-2, gaps["bfloat16"]


def test_no_tensor_is_larger_than_the_weights_however_many_rows_there_are(
    measured: list[dict[str, tuple[dict[str, float], int]]],
) -> None:
    _, largest = measured[0]["many-rows"]
    assert largest == PADDED_SIZE * HIDDEN_SIZE  # the weight's gradient; all logits would be 60 * PADDED_SIZE
