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
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

MAX_PADDING_SHARE = 0.25
"""A block takes shorter sequences in until this share of it would be padding."""


@dataclass(frozen=True)
class Block:
    """Sequences that attend in one batched call, padded to the longest of them."""

    batch: int
    length: int
    tokens_N: Tensor
    """[N] Packed positions of the block's tokens."""
    cells_N: Tensor
    """[N] Where they lie in the flattened [B * L] block."""


@dataclass
class BlockedSeqParams(PackedSeqParams):
    """Packed-sequence parameters with the blocks worked out once, for all layers of a forward pass."""

    blocks: list[Block] = field(default_factory=list)


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
    starts_B, lengths_B = torch.tensor(spans, device=device).unbind(1)
    length = spans[0][1]
    offsets_L = torch.arange(length, device=device)
    real_BL = offsets_L < lengths_B[:, None]
    tokens_N = (starts_B[:, None] + offsets_L)[real_BL]
    return Block(len(spans), length, tokens_N, real_BL.flatten().nonzero()[:, 0])


class _ToBlock(torch.autograd.Function):
    """[T, ...] packed -> [B * L, ...] padded with zeros. Both ways are plain copies: no row occurs twice."""

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, block: Block) -> Tensor:
        ctx.block, ctx.tokens = block, x_T.shape[0]
        out = x_T.new_zeros(block.batch * block.length, *x_T.shape[1:])
        return out.index_copy_(0, block.cells_N, x_T.index_select(0, block.tokens_N))

    @staticmethod
    def backward(ctx: Any, grad_BL: Tensor) -> tuple[Tensor, None]:
        grad_T = grad_BL.new_zeros(ctx.tokens, *grad_BL.shape[1:])
        return grad_T.index_copy_(0, ctx.block.tokens_N, grad_BL.index_select(0, ctx.block.cells_N)), None


class _FromBlocks(torch.autograd.Function):
    """The reverse of :class:`_ToBlock`, for all blocks of a microbatch together."""

    @staticmethod
    def forward(ctx: Any, tokens: int, blocks: list[Block], *outputs: Tensor) -> Tensor:
        ctx.blocks = blocks
        out = outputs[0].new_zeros(tokens, *outputs[0].shape[1:])
        for block, rows in zip(blocks, outputs, strict=True):
            out.index_copy_(0, block.tokens_N, rows.index_select(0, block.cells_N))
        return out

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None]
        for block in ctx.blocks:
            grad = grad_T.new_zeros(block.batch * block.length, *grad_T.shape[1:])
            grads.append(grad.index_copy_(0, block.cells_N, grad_T.index_select(0, block.tokens_N)))
        return tuple(grads)


class PackedSDPAttention(MegatronModule):
    """``core_attention`` with ``scaled_dot_product_attention``, block by block; no dropout."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1 and config.attention_dropout == 0.0
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
        blocks = packed_seq_params.blocks
        return _FromBlocks.apply(
            query.shape[0], blocks, *(self._attend(query, key, value, block) for block in blocks)
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Tensor:
        # Padding lies behind the real tokens, where causal attention never looks.
        q, k, v = (
            _ToBlock.apply(x, block).view(block.batch, block.length, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(block.batch * block.length, *query.shape[1:])

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """There is no state to save."""
        return {}
