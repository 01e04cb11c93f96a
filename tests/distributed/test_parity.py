"""The policy in Megatron is the policy in transformers, under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_policies import LEARNING_RATE, STEPS
from ranks import Case


def test_logprobs_equal_the_reference(parity: dict[str, Any], case: Case) -> None:
    assert max(rank["logprobs"] for rank in parity[case.name]) < 3e-6


def test_canary_logprobs_equal_the_reference_at_temperature_one(parity: dict[str, Any], case: Case) -> None:
    assert max(rank["canary"] for rank in parity[case.name]) < 3e-6


def test_clipped_gradients_equal_the_reference(parity: dict[str, Any], case: Case) -> None:
    if not case.has_whole_gradients:
        pytest.skip(
            "each rank keeps a part of the reduced gradient; the parameters after the step are compared"
        )
    assert max(rank["grads"] for rank in parity[case.name]) < 1e-7


def test_three_steps_lead_to_the_parameters_of_the_reference(parity: dict[str, Any], case: Case) -> None:
    assert max(rank["params"] for rank in parity[case.name]) < 2e-6
    assert max(rank["final_logprobs"] for rank in parity[case.name]) < 1e-5


def test_statistics_equal_the_reference(parity: dict[str, Any], case: Case, root: Any) -> None:
    reference = torch.load(root / f"{case.policy}.pt", weights_only=False)
    reporting = [rank["stats"] for rank in parity[case.name] if rank["stats"]]
    assert len(reporting) == 1 and len(reporting[0]) == STEPS
    for step, found in enumerate(reporting[0]):
        assert found["loss"] == pytest.approx(reference["losses"][step], abs=1e-6)
        assert found["grad_norm"] == pytest.approx(reference["grad_norms"][step], rel=1e-5)
        assert found["clip_fraction"] == pytest.approx(reference["clip_fractions"][step], abs=1e-6)
        assert found["learning_rate"] == LEARNING_RATE * (0.5 if step == 0 else 1.0)


def test_batch_is_cut_into_several_microbatches_except_where_asked(parity: dict[str, Any]) -> None:
    counts = {name: ranks[0]["microbatches"] for name, ranks in parity.items()}
    assert counts["one-rank-one-microbatch"] == 2  # one of them empty
    assert counts["one-rank"] > counts["dp2"] >= 3


def test_bfloat16_stays_near_the_reference(parity: dict[str, Any], root: Any) -> None:
    reference = torch.load(root / "qwen2-tied.pt", weights_only=False)
    ranks = parity["bfloat16-tp2-sp"]
    assert max(rank["logprobs"] for rank in ranks) < 0.2
    found = next(rank["stats"] for rank in ranks if rank["stats"])
    assert [stats["loss"] for stats in found] == pytest.approx(reference["losses"], abs=0.02)
    assert found[0]["grad_norm"] == pytest.approx(reference["grad_norms"][0], rel=0.1)
