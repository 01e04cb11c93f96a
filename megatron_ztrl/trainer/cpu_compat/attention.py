"""Causal attention over packed sequences in plain torch, for the local layer spec.

Shape suffixes: see ``megatron_ztrl.trainer``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

MAX_PADDING_SHARE = 0.1
"""A block takes shorter sequences in until this share of it would be padding. Calls cost less than much padding."""


@dataclass(frozen=True)
class Block:
    """Sequences that attend in one batched call, padded to the longest of them."""

    batch: int
    length: int
    tokens: Tensor | slice
    """Packed positions of the block's N tokens; a slice, which needs no copy, where they are neighbours."""
    cells_N: Tensor | None
    """[N] Where they lie in the flattened [B * L] block; None if there is no padding."""


@dataclass(frozen=True)
class Share:
    """A context-parallel rank's share of the tokens. See ``ContextPart``."""

    order: Tensor
    """Where each token of the sequences is in what all ranks have, one after the other."""
    mine_T: Tensor
    """Where each of this rank's tokens is in the sequences."""


@dataclass
class BlockedSeqParams(PackedSeqParams):
    """Packed-sequence parameters with the blocks worked out once, for all layers of a forward pass."""

    blocks: list[Block] = field(default_factory=list)
    share: Share | None = None
    """None where this rank has all tokens."""


def plan_blocks(cu_seqlens: Sequence[int], device: torch.device) -> list[Block]:
    """Groups sequences of similar length, so that a few large calls replace one small call per sequence.

    Args:
        cu_seqlens: [S + 1] Start of each sequence in the packed tokens, and the end of the last.
    """
    spans = [(start, end - start) for start, end in pairwise(cu_seqlens) if end > start]
    spans.sort(key=lambda span: -span[1])
    groups: list[list[tuple[int, int]]] = []
    used = 0
    for span in spans:
        if groups and used + span[1] >= (1 - MAX_PADDING_SHARE) * groups[-1][0][1] * (len(groups[-1]) + 1):
            groups[-1].append(span)
            used += span[1]
        else:
            groups.append([span])
            used = span[1]
    return [_block(group, device) for group in groups]


def _block(spans: list[tuple[int, int]], device: torch.device) -> Block:
    length, total = spans[0][1], sum(span[1] for span in spans)
    is_full = total == len(spans) * length
    if is_full and all(a + length == b for (a, _), (b, _) in pairwise(spans)):
        return Block(len(spans), length, slice(spans[0][0], spans[0][0] + total), None)
    starts_B, lengths_B = torch.tensor(spans, device=device).unbind(1)
    offsets_L = torch.arange(length, device=device)
    real_BL = offsets_L < lengths_B[:, None]
    tokens_N = (starts_B[:, None] + offsets_L)[real_BL]
    return Block(len(spans), length, tokens_N, None if is_full else real_BL.flatten().nonzero()[:, 0])


def _fill(block: Block, rows_N: Tensor) -> Tensor:
    """[N, ...] -> [B * L, ...] padded with zeros."""
    if block.cells_N is None:
        return rows_N
    cells = rows_N.new_zeros(block.batch * block.length, *rows_N.shape[1:])
    return cells.index_copy_(0, block.cells_N, rows_N)


def _drain(block: Block, cells: Tensor) -> Tensor:
    """The reverse of :func:`_fill`."""
    return cells if block.cells_N is None else cells.index_select(0, block.cells_N)


class _ToBlocks(torch.autograd.Function):
    """[T, ...] packed -> [B * L, ...] for each block. Every token is in one block, so nothing is ever added."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, blocks: list[Block]) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.tokens = blocks, x_T.shape[0]
        return tuple(_fill(block, x_T[block.tokens]) for block in blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_T = grads[0].new_empty(ctx.tokens, *grads[0].shape[1:])
        for block, grad in zip(ctx.blocks, grads, strict=True):
            grad_T[block.tokens] = _drain(block, grad)
        return grad_T, None


class _FromBlocks(torch.autograd.Function):
    """The reverse of :class:`_ToBlocks`."""

    @staticmethod
    def forward(ctx: Any, tokens: int, blocks: list[Block], *outputs: Tensor) -> Tensor:
        ctx.blocks = blocks
        out_T = outputs[0].new_empty(tokens, *outputs[0].shape[1:])
        for block, cells in zip(blocks, outputs, strict=True):
            out_T[block.tokens] = _drain(block, cells)
        return out_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_fill(block, grad_T[block.tokens]) for block in ctx.blocks)


def _gathered(x_T: Tensor, share: Share) -> Tensor:
    """All context-parallel ranks' tokens in the order of the sequences; sums their gradients in backward."""
    x = gather_from_sequence_parallel_region(x_T, group=parallel_state.get_context_parallel_group())
    return x.index_select(0, share.order)


class PackedSDPAttention(MegatronModule):
    """``core_attention`` with ``scaled_dot_product_attention``, block by block; no dropout.

    Under context parallelism every rank gathers all keys and values, and computes more rows than the ones it keeps:
    right, and slow. Transformer Engine has attention that is fast then.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: BlockedSeqParams,
        **__: Any,
    ) -> Tensor:
        """Attends inside each sequence.

        Args:
            query: [T, A, D]
            key: [T, A_kv, D] where ``A_kv`` divides ``A``.
            value: [T, A_kv, D]

        Returns:
            [T, A, D]
        """
        blocks, share = packed_seq_params.blocks, packed_seq_params.share
        if share is not None:
            query = query.new_zeros(len(share.order), *query.shape[1:]).index_copy(0, share.mine_T, query)
            key, value = _gathered(key, share), _gathered(value, share)
        inputs = zip(blocks, *(_ToBlocks.apply(x, blocks) for x in (query, key, value)), strict=True)
        out = _FromBlocks.apply(query.shape[0], blocks, *(self._attend(*part) for part in inputs))
        return out if share is None else out.index_select(0, share.mine_T)

    def _attend(self, block: Block, *inputs: Tensor) -> Tensor:
        # Padding lies behind the real tokens, where causal attention never looks.
        q, k, v = (x.view(block.batch, block.length, *x.shape[1:]).transpose(1, 2) for x in inputs)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """There is no state to save."""
        return {}
