"""What the ranks of ``test_logprobs`` run: chunked log-probs against a plain float64 softmax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB_SIZE, PADDED_SIZE, HIDDEN_SIZE = 301, 304, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; the chunks hold 64 entries of the vocabulary where there are rows to fill them."""

    ranks: int = 2
    rows: int = 20
    temperature: float = 0.7
    dtype: torch.dtype = torch.float32
    max_chunk_bytes: int = 20 * 64 * 4
    logit_scale: float = 1.0


def measure(rank: int, scratch: Path, cases: dict[str, Case]) -> dict[str, tuple[dict[str, float], int]]:
    """For each case the largest difference of each result from the plain path, relative to its largest value.

    With it, the elements of the largest tensor that came up on the way.
    """
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'meeting'}", rank=rank, world_size=2)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    groups = {1: alone, 2: dist.group.WORLD}
    return {name: _measure(case, groups[case.ranks]) for name, case in cases.items()}


def _measure(case: Case, group: Any) -> tuple[dict[str, float], int]:
    from megatron_ztrl.trainer.logprobs import linear_logprobs

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, HIDDEN_SIZE, generator=random).to(case.dtype)
    weight = (torch.randn(PADDED_SIZE, HIDDEN_SIZE, generator=random) * case.logit_scale).to(case.dtype)
    weight[VOCAB_SIZE:] = 100.0  # padding that must not count
    targets = torch.randint(VOCAB_SIZE, (case.rows,), generator=random)
    targets[:2] = torch.tensor([0, VOCAB_SIZE - 1])[: case.rows]
    grad = torch.randn(case.rows, generator=random)
    expected = _plain(hidden, weight, targets, grad, case.temperature)

    size = PADDED_SIZE // case.ranks
    mine = slice(dist.get_rank(group) * size, (dist.get_rank(group) + 1) * size)
    hidden, part = hidden.requires_grad_(), weight[mine].clone().requires_grad_()
    with _LargestTensor() as largest:
        logprobs, entropies = linear_logprobs(
            hidden,
            part,
            targets,
            vocab_size=VOCAB_SIZE,
            temperature=case.temperature,
            group=group,
            max_chunk_bytes=case.max_chunk_bytes,
        )
        logprobs.backward(grad)
    assert not entropies.requires_grad and part.grad.dtype == hidden.grad.dtype == case.dtype
    found = [logprobs.detach(), entropies, hidden.grad, part.grad]
    expected[3] = expected[3][mine]
    names = ["logprobs", "entropies", "grad_hidden", "grad_weight"]
    gaps = {name: _gap(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    return gaps, largest.elements


class _LargestTensor(TorchDispatchMode):
    """Sees the result of every operation, those of the backward pass too."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def _plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
    temperature: float,
) -> list[torch.Tensor]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (hidden @ weight[:VOCAB_SIZE].T / temperature).log_softmax(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    chosen.backward(grad.double())
    entropies = -(logp.exp() * logp).sum(-1)
    return [chosen.detach(), entropies.detach(), hidden.grad, weight.grad]


def _gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    if expected.numel() == 0 or not expected.any():
        return float(found.abs().sum())
    return float((found - expected).abs().max() / expected.abs().max())
