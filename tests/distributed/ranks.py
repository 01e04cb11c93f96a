"""What the test ranks run: each function returns plain numbers, and the tests judge them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_policies import STEPS, config, packed, spread

from megatron_ztrl.types import TensorSlice

_meetings: Counter[int] = Counter()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One policy under one parallel layout."""

    name: str
    policy: str
    tp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int = 1
    sp: bool = False
    tokens: int = 64
    """Budget of a microbatch; the sequences sum to 240."""
    dtype: str = "float32"
    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def has_whole_gradients(self) -> bool:
        """Whether each rank ends with the gradient of all it holds: the distributed optimizer scatters it."""
        return self.dp == 1 or self.ddp.get("use_distributed_optimizer") is False


def build(case: Case, rank: int, scratch: Path, root: Path) -> Any:
    """This rank's actor for a case. Ranks meet in a file of their own for every actor."""
    from megatron_ztrl.trainer.actor import ActorRank

    # Ranks may sit out a case, so only meetings of the same size are counted alike by all who take part.
    _meetings[case.world_size] += 1
    meeting = scratch / f"meeting-{case.world_size}-{_meetings[case.world_size]}"
    chosen = config(
        root / case.policy,
        tp=case.tp,
        pp=case.pp,
        vp=case.vp,
        dp=case.dp,
        sp=case.sp,
        dtype=case.dtype,
        transformer=case.transformer,
        ddp=case.ddp,
    )
    return ActorRank(chosen, rank, case.world_size, f"file://{meeting}")


def run_parity_cases(rank: int, scratch: Path, root: Path, cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Measures every case on the ranks that it has."""
    return {case.name: measure_parity(case, rank, scratch, root) for case in cases if rank < case.world_size}


def measure_parity(case: Case, rank: int, scratch: Path, root: Path) -> dict[str, Any]:
    """Largest absolute differences from the reference run."""
    reference = torch.load(root / f"{case.policy}.pt", weights_only=False)
    batch = packed(reference, dp=case.dp, tokens=case.tokens, multiple=case.tp)
    actor = build(case, rank, scratch, root)
    slices = actor.parameter_slices()
    result: dict[str, Any] = {"microbatches": len(batch.microbatches[0])}
    result["logprobs"] = _logprob_gap(actor, batch, reference["logprobs"])
    canary = actor.canary_logprobs(list(range(1, 20)))
    result["canary"] = (
        0.0 if canary is None else (torch.tensor(canary) - reference["canary"]).abs().max().item()
    )
    actor.export_hf(root / f"export-{case.name}")
    stats = []
    for step in range(STEPS):
        stats.append(actor.train_step(batch, step))
        if step == 0 and case.has_whole_gradients:
            grads = {name: p.main_grad for name, p in actor._parameters.items()}
            result["grads"] = _slice_gap(slices, grads, reference["grads"])
    result["stats"] = [entry for entry in stats if entry is not None]
    params = {name: actor.parameter(name) for name in actor._parameters}
    result["params"] = _slice_gap(slices, params, reference["params"])
    result["final_logprobs"] = _logprob_gap(actor, batch, reference["final_logprobs"])
    actor.close()
    return result


def measure_resume(
    rank: int, scratch: Path, root: Path, pairs: list[tuple[Case, Case]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Saves under one layout and goes on; loads under another and goes on. Returns both continuations."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for saver, loader in pairs:
        reference = torch.load(root / f"{saver.policy}.pt", weights_only=False)
        directory = root / f"checkpoint-{saver.name}-{loader.name}"
        results[saver.name, loader.name] = {
            "uninterrupted": _train(saver, rank, scratch, root, reference, save_to=directory),
            "resumed": _train(loader, rank, scratch, root, reference, load_from=directory),
        }
    return results


def _train(
    case: Case,
    rank: int,
    scratch: Path,
    root: Path,
    reference: dict[str, Any],
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> dict[str, Any]:
    actor = build(case, rank, scratch, root)
    batch = packed(reference, dp=case.dp, tokens=case.tokens, multiple=case.tp)
    if load_from is not None:
        actor.load_checkpoint(load_from)
    else:
        for step in range(2):
            actor.train_step(batch, step)
        actor.save_checkpoint(save_to)
    stats = [actor.train_step(batch, step) for step in range(2, 5)]
    logprobs = actor.logprobs(batch)
    by_sample = {}
    if logprobs is not None:
        for mb, array_T in zip(batch.microbatches[actor.dp_rank], logprobs, strict=True):
            for index, start, end in zip(mb.sample_indices, mb.cu_seqlens, mb.cu_seqlens[1:], strict=False):
                by_sample[index] = array_T[start:end]
    actor.close()
    return {"stats": [entry for entry in stats if entry is not None], "logprobs": by_sample}


def _logprob_gap(actor: Any, batch: Any, expected: list[np.ndarray]) -> float:
    found = actor.logprobs(batch)
    if found is None:
        return 0.0
    wanted = spread(batch, expected)[actor.dp_rank]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def _slice_gap(
    slices: list[TensorSlice], local: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]
) -> float:
    gaps = [
        local[s.param].narrow(s.dim, s.start, s.length)
        - whole[s.tensor].narrow(s.dim, s.tensor_start, s.length)
        for s in slices
    ]
    return max(gap.abs().max().item() for gap in gaps)
