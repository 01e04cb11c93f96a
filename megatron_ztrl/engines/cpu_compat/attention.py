"""SGLang's ``torch_native`` attention, with all requests of a step computed together.

The stock backend loops over the requests, which takes most of a step of a small model on a CPU. This plugin
(entry point group ``sglang.srt.plugins``, found through ``standins/*.dist-info``) registers a subclass under
the same name.

Shapes: ``B`` requests, ``T`` new tokens of all, ``N`` new tokens of the longest, ``L`` longest sequence,
``H`` query heads, ``K`` KV heads, ``G = H / K``, ``D`` head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ztrl.engines.cpu_compat.mirror import Mirror, Step, take

if TYPE_CHECKING:
    import torch

MAX_NEW_TOKENS = 256
"""A longer prompt goes through the stock loop: there the work is in the products, not in the loop."""
MAX_SCORES = 1 << 19
"""Scores of one head that are computed together, padding included."""
MIRRORED_SHARE = 4
"""The mirror of running requests takes at most this part of the memory of SGLang's own cache: one in so many."""


def register() -> None:
    """Entry point: runs in every server process, so SGLang's heavy modules stay out until the backend is
    built.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(_create)


def _create(runner: Any) -> Any:
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    mirror = Mirror(runner.max_total_num_tokens // MIRRORED_SHARE)

    class BatchedTorchNativeBackend(TorchNativeAttnBackend):
        """Plain causal self-attention: ``attend``, or ``Mirror`` for decoding; the rest goes to the stock routines."""

        _plan: list[Block] | None = None
        _step: Step | None = None

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            self._plan = self._step = None  # the layers of one forward pass share it
            if not forward_batch.forward_mode.is_decode():
                mirror.forget(forward_batch.req_pool_indices.tolist())

        def _run_sdpa_forward_decode(self, *tensors: Any, **options: Any) -> torch.Tensor:
            query, output, k_cache, v_cache, req_to_token, rows, seq_lens, encoder_lens = tensors
            if encoder_lens is not None or options["sliding_window_size"] is not None:
                return super()._run_sdpa_forward_decode(*tensors, **options)
            # The mirror computes in the type of its operands, which must then be an exact one.
            if self._plan is None and self._step is None and k_cache.dtype == query.dtype == torch.float32:
                self._step = mirror.arrange(req_to_token, rows, seq_lens)
            if self._step is not None:
                mirror.attend(self._step, query, output, k_cache, v_cache, options["scaling"])
                return output
            if self._plan is None:
                self._plan = plan(req_to_token, rows, seq_lens, torch.ones_like(seq_lens))
            attend(self._plan, query, output, k_cache, v_cache, options["scaling"])
            return output

        def _run_sdpa_forward_extend(self, *tensors: Any, **options: Any) -> torch.Tensor:
            query, output, k_cache, v_cache, req_to_token, rows, seq_lens, _, new_lens, encoder_lens = tensors
            plain = encoder_lens is None and options["sliding_window_size"] is None and options["causal"]
            if not plain or int(new_lens.max()) > MAX_NEW_TOKENS:
                return super()._run_sdpa_forward_extend(*tensors, **options)
            if self._plan is None:
                self._plan = plan(req_to_token, rows, seq_lens, new_lens)
            attend(self._plan, query, output, k_cache, v_cache, options["scaling"])
            return output

    return BatchedTorchNativeBackend(runner)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Requests of similar shape, padded to the longest; what all layers of one forward pass share."""

    token_BN: torch.Tensor
    """Each request's new tokens among all; 0 where it has fewer than ``N``."""
    slot_BL: torch.Tensor
    """Cache slot of every position; 0 past the end of a sequence."""
    mask_B1NL: torch.Tensor
    """Which positions a new token sees."""
    real: torch.Tensor
    """Entries of the flattened ``token_BN`` that are no padding, [tokens of the block]."""
    real_token: torch.Tensor
    """The tokens there."""


def plan(
    req_to_token: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, new_lens: torch.Tensor
) -> list[Block]:
    """Arrange the requests of a forward pass for ``attend``.

    Args:
        req_to_token: [rows, >= L] cache slot of every position.
        rows: [B] the requests' rows of that table.
        seq_lens: [B] new tokens included.
        new_lens: [B]
    """
    import torch

    starts = new_lens.cumsum(0) - new_lens
    blocks = []
    for requests, new_max, longest in _blocks(seq_lens.tolist(), new_lens.tolist()):
        block = torch.tensor(requests)
        new_N, all_L = torch.arange(new_max), torch.arange(longest)
        new_B, seq_B = new_lens[block], seq_lens[block]
        is_token_BN = new_N < new_B[:, None]
        token_BN = torch.where(is_token_BN, starts[block][:, None] + new_N, 0)
        # The table's rows are not cleared: past a sequence's end they name slots of other requests.
        slot_BL = torch.where(all_L < seq_B[:, None], req_to_token[rows[block], :longest], 0)
        mask_BNL = all_L <= ((seq_B - new_B)[:, None] + new_N)[:, :, None]
        real = is_token_BN.flatten().nonzero().flatten()
        blocks.append(
            Block(
                token_BN=token_BN,
                slot_BL=slot_BL,
                mask_B1NL=mask_BNL[:, None],
                real=real,
                real_token=token_BN.flatten()[real],
            )
        )
    return blocks


def attend(
    blocks: list[Block],
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scaling: float | None,
) -> None:
    """Causal attention of each request's new tokens to its cached sequence, which ends with them.

    Args:
        blocks: Of ``plan``.
        query: [T, H, D] request after request.
        output: [T, H, D] written in place.
        k_cache, v_cache: [slots, K, D]
        scaling: of the scores; None is ``D ** -0.5``.
    """
    from torch.nn.functional import scaled_dot_product_attention

    kv_heads = k_cache.shape[1]
    for block in blocks:
        new_max = block.token_BN.shape[1]
        key_BKLD = take(k_cache, block.slot_BL).transpose(1, 2).to(query.dtype)
        value_BKLD = take(v_cache, block.slot_BL).transpose(1, 2).to(query.dtype)
        # The G query heads of one KV head become G * N query positions, so no key is repeated.
        query_BKGND = take(query, block.token_BN).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        mask = block.mask_B1NL[:, :, None].expand(-1, 1, query_BKGND.shape[2], -1, -1).flatten(2, 3)
        out = scaled_dot_product_attention(
            query_BKGND.flatten(2, 3), key_BKLD, value_BKLD, attn_mask=mask, scale=scaling
        )
        out_BNHD = out.unflatten(2, (-1, new_max)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        output.index_copy_(0, block.real_token, out_BNHD.flatten(0, 1).index_select(0, block.real))


def _blocks(seq_lens: list[int], new_lens: list[int]) -> Iterator[tuple[list[int], int, int]]:
    """Split requests into blocks of similar shape; yields positions, most new tokens, longest sequence."""
    block: list[int] = []
    new_max = longest = 0
    for position in sorted(range(len(seq_lens)), key=lambda i: (new_lens[i], seq_lens[i])):
        grown_new, grown_longest = max(new_max, new_lens[position]), max(longest, seq_lens[position])
        if block and (len(block) + 1) * grown_new * grown_longest > MAX_SCORES:
            yield block, new_max, longest
            block, grown_new, grown_longest = [], new_lens[position], seq_lens[position]
        block.append(position)
        new_max, longest = grown_new, grown_longest
    if block:
        yield block, new_max, longest
