"""Log-probabilities and entropies straight from hidden states: the logits never exist as a whole.

The vocabulary is cut twice: into parts, one for each tensor-parallel rank, and each part into chunks. Forward
keeps four numbers of a row and chunk, backward computes the chunk's logits again. Cutting the vocabulary rather
than the rows reads every weight once per pass and makes a weight's gradient in one product.

Shape suffixes: see ``megatron_ztrl.trainer``; ``C`` is the entries of one chunk, ``K`` the chunks of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_CHUNK_BYTES = 64 << 20
"""Of one chunk's float32 logits, of which about two copies exist at a time. Small beside the gradient of a large
vocabulary's weights, and large enough that matrix products take most of the time."""
CHUNK_MULTIPLE = 64
"""Tensor cores want aligned rows."""


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target, and the entropy of each distribution, in nats.

    Two small all-reduces over the tensor-parallel group in forward, and one of the hidden states' gradient in
    backward; logits never travel. They are products in the weights' precision, and float32 from there on.

    Args:
        hidden_NH: [N, H], alike on all ranks of the group.
        weight_VH: [V, H] This rank's part of the vocabulary; it may end in padding.
        targets_N: [N] Token ids in ``[0, vocab_size)``.
        vocab_size: Entries of the whole vocabulary that are no padding.
        temperature: Divides the logits.
        group: The tensor-parallel ranks, in the order of their parts.
        max_chunk_bytes: Memory for the float32 logits of a chunk.

    Returns:
        ([N] log-probs, differentiable in the hidden states and the weights; [N] entropies, detached).
    """
    first = dist.get_rank(group) * weight_VH.shape[0]
    valid = min(weight_VH.shape[0], vocab_size - first)
    assert valid > 0, "a tensor-parallel rank holds nothing but vocabulary padding"
    entries = max_chunk_bytes // (4 * max(1, targets_N.shape[0])) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    starts = range(0, valid, max(CHUNK_MULTIPLE, entries))
    chunks = [slice(start, min(start + starts.step, valid)) for start in starts]
    return _LinearLogProbs.apply(hidden_NH, weight_VH, targets_N - first, chunks, temperature, group)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        local_N: Tensor,
        chunks: list[slice],
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        target_N = torch.zeros_like(local_N, dtype=torch.float32)
        statistics = []
        for chunk, logits_NC in _logits(hidden_NH, weight_VH, chunks, temperature):
            mine_N, index_N1 = _targets_in(chunk, local_N)
            target_N += logits_NC.gather(1, index_N1)[:, 0] * mine_N
            top_N = logits_NC.amax(-1)
            logits_NC -= top_N[:, None]
            exp_NC = logits_NC.exp()
            statistics.append(torch.stack((top_N, exp_NC.sum(-1), torch.linalg.vecdot(exp_NC, logits_NC))))
        top_KN, total_KN, weighted_KN = torch.stack(statistics, dim=1)
        top_N = top_KN.amax(0)
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
        # From "relative to the chunk's largest logit" to "relative to the largest of all".
        shift_KN = top_KN - top_N
        weighted_KN += shift_KN * total_KN
        scale_KN = shift_KN.exp()
        sums_3N = torch.stack((target_N, (scale_KN * total_KN).sum(0), (scale_KN * weighted_KN).sum(0)))
        dist.all_reduce(sums_3N, group=group)
        target_N, total_N, weighted_N = sums_3N
        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, top_N + log_total_N)
        ctx.chunks, ctx.temperature, ctx.group = chunks, temperature, group
        ctx.mark_non_differentiable(entropy_N)
        return target_N - top_N - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, local_N, normaliser_N = ctx.saved_tensors
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.chunks[-1].stop :] = 0.0
        grad_N = grad_N / ctx.temperature
        for chunk, logits_NC in _logits(hidden_NH, weight_VH, ctx.chunks, ctx.temperature):
            mine_N, index_N1 = _targets_in(chunk, local_N)
            probs_NC = logits_NC.sub_(normaliser_N[:, None]).exp_()
            grad_NC = probs_NC.mul_(-grad_N[:, None]).scatter_add_(1, index_N1, (grad_N * mine_N)[:, None])
            grad_NC = grad_NC.to(weight_VH.dtype)
            torch.mm(grad_NC.T, hidden_NH, out=grad_weight_VH[chunk])
            grad_hidden_NH += grad_NC @ weight_VH[chunk]
        dist.all_reduce(grad_hidden_NH, group=ctx.group)
        return grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH, None, None, None, None


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, chunks: list[slice], temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk with its [N, C] float32 logits, which the caller may overwrite."""
    for chunk in chunks:
        logits_NC = (hidden_NH @ weight_VH[chunk].T).float()
        yield chunk, logits_NC if temperature == 1.0 else logits_NC.div_(temperature)


def _targets_in(chunk: slice, local_N: Tensor) -> tuple[Tensor, Tensor]:
    """([N] whether the target lies in the chunk; [N, 1] where, or any valid place)."""
    mine_N = (local_N >= chunk.start) & (local_N < chunk.stop)
    return mine_N, torch.where(mine_N, local_N - chunk.start, 0)[:, None]
