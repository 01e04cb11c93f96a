"""Policy and critic in Megatron are those in transformers, under every layout. Bounds: see ``judge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from judge import BOUNDS, bounds, bounds_on_any_cpu, compares_everything, gaps
from random_policies import LEARNING_RATE, STEPS
from reference import reference_path


@pytest.mark.parametrize("quantity", BOUNDS)
def test_everything_is_as_in_transformers(
    parity: dict[str, Any], case: Case, quantity: str, root: Path
) -> None:
    assert gaps(parity[case.name], root, case)[quantity] <= bounds_on_any_cpu(case, root)[quantity]


def test_canary_logprobs_are_at_temperature_one(parity: dict[str, Any], policy: Case) -> None:
    assert max(rank["gaps"]["float32"]["canary"] for rank in parity[policy.name]) < 3e-6


def test_every_element_of_the_gradient_is_compared(parity: dict[str, Any], case: Case) -> None:
    assert compares_everything(parity[case.name], case)


def test_statistics_equal_the_reference(parity: dict[str, Any], case: Case, root: Path) -> None:
    reference = torch.load(reference_path(root, case.checkpoint), weights_only=False)
    reporting = [rank["stats"] for rank in parity[case.name] if rank["stats"]]
    assert len(reporting) == 1 and len(reporting[0]) == STEPS
    for step, found in enumerate(reporting[0]):
        assert found["grad_norm"] == pytest.approx(reference["grad_norms"][step], rel=1e-5)
        assert found["clip_fraction"] == pytest.approx(reference["clip_fractions"][step], abs=1e-6)
        assert found["learning_rate"] == LEARNING_RATE * (0.5 if step == 0 else 1.0)


def test_gradients_do_not_depend_on_ranks_budget_or_order(parity: dict[str, Any], recut: Case) -> None:
    assert max(rank["invariance"] for rank in parity[recut.name]) <= 1e-7
    found, base = (
        next(rank["stats"] for rank in parity[name] if rank["stats"])[0]["loss"]
        for name in (recut.name, recut.like)
    )
    assert found == pytest.approx(base, abs=1e-7, rel=0)


def test_batch_is_cut_into_several_microbatches_except_where_asked(parity: dict[str, Any]) -> None:
    counts = {name: ranks[0]["microbatches"] for name, ranks in parity.items()}
    assert counts["one-rank-one-microbatch"] == 2  # one of them empty
    assert counts["one-rank"] > counts["dp2"] >= 3


def test_bfloat16_is_about_as_near_to_float32_as_transformers_in_bfloat16(
    parity: dict[str, Any], coarse: Case, root: Path
) -> None:
    found, allowed = gaps(parity[coarse.name], root, coarse), bounds(coarse, root)
    assert {name: found[name] <= bound for name, bound in allowed.items()} == dict.fromkeys(allowed, True)


def test_bfloat16_updates_main_weights_in_float32(parity: dict[str, Any], coarse: Case) -> None:
    for rank in parity[coarse.name]:
        assert rank["main_weights"]["round to the model's"]
        assert rank["main_weights"]["finer share"] > 0.9
