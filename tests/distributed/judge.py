"""What the ranks measured, and the bounds it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import BFLOAT16_CASES, Case
from reference import reference_path

BOUNDS = {"loss": 1e-6, "gradients": 1e-7, "outputs": 1e-6, "parameters": 1e-6, "final_outputs": 1e-6}
"""Largest absolute differences in float32: of the mean loss in any step; of the first gradients, before they are
clipped; of log-probs in nats, or values, before the steps; of parameters and of outputs after the steps."""

SPACINGS = 4
"""What the tests bear in units in the last place of the largest number compared, where that is more than its bound: of
log-probs between -4 and -8 it is 1.9e-6. Both sides round, each up to two such units away from float64, and which way
is for the kernels that BLAS takes on a CPU to say; the table of ``make parity`` is of one CPU, and keeps to ``BOUNDS``.
"""

BFLOAT16_FACTOR = 2.0
"""Training in bfloat16 may be this much further from float32 than transformers in bfloat16 is at worst."""


def bounds(case: Case, root: Path) -> dict[str, float]:
    """What each of ``gaps`` may be at most.

    In bfloat16 that is a multiple of the worst that rounding does to transformers. Of one checkpoint it would be
    a matter of luck: a token that rounding takes across the edge of the clip gains or loses its gradient.
    """
    if case.dtype == "float32":
        return BOUNDS
    distances = [rounding(root, other.checkpoint, torch.bfloat16, torch.float32) for other in BFLOAT16_CASES]
    return {quantity: BFLOAT16_FACTOR * max(row[quantity] for row in distances) for quantity in BOUNDS}


def bounds_on_any_cpu(case: Case, root: Path) -> dict[str, float]:
    """``BOUNDS``, but nowhere less than ``SPACINGS`` units in the last place in float32."""
    run = _run(root, case.checkpoint, torch.float32)
    largest = {
        quantity: max(np.abs(array).max() for array in _arrays(run, quantity)).astype(np.float32)
        for quantity in BOUNDS
    }
    return {
        quantity: max(bound, SPACINGS * float(np.spacing(largest[quantity])))
        for quantity, bound in BOUNDS.items()
    }


def gaps(
    ranks: list[dict[str, Any]], root: Path, case: Case, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Largest differences between what the ranks of a case measured and transformers in ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    losses = _run(root, case.checkpoint, dtype)["losses"]
    found = next(rank["stats"] for rank in ranks if rank["stats"])
    loss = max(abs(step["loss"] - expected) for step, expected in zip(found, losses, strict=True))
    worst = {
        quantity: max(rank["gaps"][name][quantity] for rank in ranks)
        for quantity in BOUNDS
        if quantity != "loss"
    }
    return {"loss": loss} | worst


def compares_everything(ranks: list[dict[str, Any]], case: Case) -> bool:
    """Whether every element of the gradients was compared.

    The distributed optimizer leaves each replica a part of the sum, an all-reduce the whole.
    """
    shards = case.dp * case.cp if case.ddp.get("use_distributed_optimizer", True) else 1
    return shards * sum(rank["compared"] for rank in ranks) == sum(rank["elements"] for rank in ranks)


def rounding(root: Path, checkpoint: str, dtype: torch.dtype, finer: torch.dtype) -> dict[str, float]:
    """The same differences between transformers in ``dtype`` and in a finer type."""
    coarse, fine = (_run(root, checkpoint, wanted) for wanted in (dtype, finer))
    return {
        quantity: max(
            float(np.abs(a - b).max())
            for a, b in zip(_arrays(coarse, quantity), _arrays(fine, quantity), strict=True)
        )
        for quantity in BOUNDS
    }


def _arrays(run: dict[str, Any], quantity: str) -> list[np.ndarray]:
    found = run["losses" if quantity == "loss" else quantity]
    return [np.asarray(array) for array in (found.values() if isinstance(found, dict) else found)]


def _run(root: Path, checkpoint: str, dtype: torch.dtype) -> dict[str, Any]:
    return torch.load(reference_path(root, checkpoint, dtype), weights_only=False)
