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
        quantity: max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
        for quantity, pairs in {
            "loss": [(coarse["losses"], fine["losses"])],
            "gradients": [(coarse["gradients"][name], fine["gradients"][name]) for name in fine["gradients"]],
            "outputs": list(zip(coarse["outputs"], fine["outputs"], strict=True)),
            "parameters": [
                (coarse["parameters"][name], fine["parameters"][name]) for name in fine["parameters"]
            ],
            "final_outputs": list(zip(coarse["final_outputs"], fine["final_outputs"], strict=True)),
        }.items()
    }


def _run(root: Path, checkpoint: str, dtype: torch.dtype) -> dict[str, Any]:
    return torch.load(reference_path(root, checkpoint, dtype), weights_only=False)
