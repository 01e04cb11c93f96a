"""What the ranks measured, and the bounds it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case
from reference import reference_path

BOUNDS = {"loss": 1e-6, "gradients": 1e-7, "outputs": 1e-6, "parameters": 1e-6, "final_outputs": 1e-6}
"""Largest absolute differences in float32: of the mean loss in any step; of the first gradients, before they are
clipped; of log-probs in nats, or values, before the steps; of parameters and of outputs after the steps."""

BFLOAT16_FACTOR = 4.0
"""Training in bfloat16 may be this much further from float32 than transformers in bfloat16 is: both are noise."""


def bounds(case: Case, root: Path) -> dict[str, float]:
    """What each of ``gaps`` may be at most."""
    if case.dtype == "float32":
        return BOUNDS
    return {
        quantity: BFLOAT16_FACTOR * distance
        for quantity, distance in rounding(root, case.checkpoint, torch.bfloat16, torch.float32).items()
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
