"""CPU stand-in for ``sgl_kernel``, whose wheels hold CUDA binaries only.

SGLang's ``torch_native`` attention and ``pytorch`` sampling need one function of it on a machine without AMX.
"""

from __future__ import annotations

import torch
from cpu_standin import missing_functions

__version__ = "0.0.0+cpu"
__getattr__ = missing_functions(__name__)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int | None = None,
) -> None:
    """Write each request's new cache slots into its row of the token table.

    Args:
        req_pool_indices: [B] rows of the table.
        req_to_token: [rows, max_context] the table, changed in place.
        start_offset, end_offset: [B] the columns ``[start, end)`` to fill in each row.
        out_cache_loc: [sum(end - start)] cache slots, request after request.
        batch_size: unused, part of the compiled signature.
    """
    slots = out_cache_loc.to(req_to_token.dtype)
    lengths = end_offset - start_offset
    if bool((lengths == 1).all()):  # decoding: one indexed write for the whole batch
        req_to_token[req_pool_indices, start_offset] = slots
        return
    position = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = slots[position : position + end - start]
        position += end - start
