"""Log-probs made chunk by chunk from hidden states are those of the whole logits, gradients too."""

from __future__ import annotations

import pytest
import torch
from launcher import launch
from logprob_ranks import Case, measure

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


@pytest.fixture(scope="module")
def gaps() -> dict[str, dict[str, float]]:
    """By case and result, the largest relative gap on any rank."""
    by_rank = launch(measure, 2, CASES | LARGE | BFLOAT16)
    return {
        name: {result: max(ranks[name][result] for ranks in by_rank) for result in by_rank[0][name]}
        for name in by_rank[0]
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
