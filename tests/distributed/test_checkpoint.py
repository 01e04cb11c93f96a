"""A resumed run goes on as if it had not been interrupted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def test_resumed_run_equals_the_uninterrupted_one(
    resume: list[dict[Any, Any]], pair: tuple[str, str]
) -> None:
    tolerance = 0.0 if pair[0] == pair[1] else 1e-6
    runs = [ranks[pair] for ranks in resume]
    expected, found = (
        [entry for run in runs for entry in run[which]["stats"]] for which in ("uninterrupted", "resumed")
    )
    assert len(expected) == len(found) == 3
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=tolerance, rel=0)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], abs=3 * tolerance, rel=0)
    expected_logp, found_logp = (
        {index: logp for run in runs for index, logp in run[which]["logprobs"].items()}
        for which in ("uninterrupted", "resumed")
    )
    assert expected_logp.keys() == found_logp.keys() and len(found_logp) == 12
    gap = max(float(np.abs(expected_logp[i] - found_logp[i]).max()) for i in found_logp)
    assert gap <= 5 * tolerance
