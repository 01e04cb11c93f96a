"""A resumed run goes on as if it had not been interrupted, though training went on while it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ztrl.trainer.integrity import find_damage


def test_resumed_run_equals_the_uninterrupted_one(
    checkpoints: list[dict[str, Any]], pair: tuple[str, str]
) -> None:
    """``_continue`` holds the writing back until three more steps have changed every weight."""
    tolerance = 0.0 if pair[0] == pair[1] else 1e-6
    runs = [ranks["-to-".join(pair)] for ranks in checkpoints]
    assert not any(run["uninterrupted"]["written_early"] for run in runs)
    expected, found = (
        [entry for run in runs for entry in run[which]["stats"]] for which in ("uninterrupted", "resumed")
    )
    assert len(expected) == len(found) == 3
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=tolerance, rel=0)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], abs=3 * tolerance, rel=0)
    expected_outputs, found_outputs = (
        {index: output for run in runs for index, output in run[which]["outputs"].items()}
        for which in ("uninterrupted", "resumed")
    )
    assert expected_outputs.keys() == found_outputs.keys() and len(found_outputs) == 12
    gap = max(float(np.abs(expected_outputs[i] - found_outputs[i]).max()) for i in found_outputs)
    assert gap <= 5 * tolerance


def test_every_file_of_a_checkpoint_has_a_record(
    checkpoints: list[dict[str, Any]], pair: tuple[str, str], root: Path
) -> None:
    records = {}
    for ranks in checkpoints:
        records |= ranks["-to-".join(pair)]["uninterrupted"]["records"]
    directory = root / f"checkpoint-{'-'.join(pair)}"
    assert {path.name for path in directory.iterdir()} == set(records)
    assert find_damage(directory, records) is None


def test_a_failed_write_is_raised_where_training_goes_on(
    checkpoints: list[dict[str, Any]], root: Path
) -> None:
    for rank, results in enumerate(checkpoints):
        file = root / "failed" / f"__{rank}_0.distcp"
        assert results["failed write"] == f"{file} could not be written: no space left on device"
