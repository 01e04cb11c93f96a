"""Log-probabilities and entropies from logits that are cut along the vocabulary.

Shape suffixes: see ``megatron_ztrl.trainer``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, first: int, valid: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        top_N = logits_NV[:, :valid].amax(-1)
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - top_N[:, None]
        mine_N = (targets_N >= first) & (targets_N < first + valid)
        local_N = torch.where(mine_N, targets_N - first, 0)
        target_N = shifted_NV.gather(1, local_N[:, None])[:, 0] * mine_N
        probs_NV = shifted_NV.exp()
        probs_NV[:, valid:] = 0.0
        sums_3N = torch.stack((target_N, probs_NV.sum(-1), torch.linalg.vecdot(probs_NV, shifted_NV)))
        dist.all_reduce(sums_3N, group=group)
        target_N, total_N, weighted_N = sums_3N.unbind(0)
        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        probs_NV.div_(total_N[:, None])
        ctx.save_for_backward(probs_NV, local_N, mine_N)
        ctx.mark_non_differentiable(entropy_N)
        return target_N - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        probs_NV, local_N, mine_N = ctx.saved_tensors
        grad_NV = probs_NV * -grad_N[:, None]
        grad_NV.scatter_add_(1, local_N[:, None], (grad_N * mine_N)[:, None])
        return grad_NV, None, None, None, None


def vocab_parallel_logprobs(
    logits_NV: Tensor, targets_N: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy of each distribution, in nats.

    Two small all-reduces over the tensor-parallel group; the logits themselves never travel.

    Args:
        logits_NV: [N, V] float32, this rank's part of the vocabulary; it may end in padding.
        targets_N: [N] Token ids in ``[0, vocab_size)``.
        vocab_size: Entries of the whole vocabulary that are no padding.
        group: The tensor-parallel ranks, in the order of their parts.

    Returns:
        ([N] log-probs, differentiable; [N] entropies, detached).
    """
    first = dist.get_rank(group) * logits_NV.shape[1]
    valid = min(logits_NV.shape[1], vocab_size - first)
    assert valid > 0, "a tensor-parallel rank holds nothing but vocabulary padding"
    return _VocabParallelLogProbs.apply(logits_NV.float(), targets_N, first, valid, group)
