"""Weights that Transformer Engine keeps in FP8 (``megatron.transformer.fp8_param``), read and written as numbers.

A slice of a quantised weight is no view of it, so slices are loaded into, and published from, ordinary tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_ztrl.config.schema import Config


def plain(weight: Tensor) -> Tensor:
    """The numbers of a weight: itself without its gradient, or a copy if it is quantised."""
    return dequantize_fp8_tensor(weight.detach()) if is_float8tensor(weight) else weight.detach()


def staging(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to fill in place of the parameters: ordinary tensors in host memory where they are quantised."""
    return {
        name: torch.empty(weight.shape, dtype=weight.dtype) if is_float8tensor(weight) else weight
        for name, weight in parameters.items()
    }


@torch.no_grad()
def take_over(parameters: Mapping[str, Tensor], staged: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Quantises what was filled in.

    The optimizer begins with main weights from an attribute in which Transformer Engine keeps the random weights that
    it made; it must hold what was loaded.
    """
    for name, weight in parameters.items():
        if not is_float8tensor(weight):
            continue
        weight.copy_(staged[name].to(weight.device))
        if trainable:
            weight._high_precision_init_val = staged[name]  # type: ignore[attr-defined]
        else:
            weight.clear_high_precision_init_val()  # type: ignore[attr-defined]


def ddp_options(config: Config) -> dict[str, Any]:
    """What data parallelism must know of them: it gathers them in FP8."""
    if not config.megatron.transformer.get("fp8_param"):
        return {}
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": _is_mxfp8(config)}


def optimizer_options(config: Config) -> dict[str, Any]:
    """What the optimizer must know of them: how it quantises its main weights."""
    if not config.megatron.transformer.get("fp8_param"):
        return {}
    return {"fp8_recipe": _recipe(config), "reuse_grad_buf_for_mxfp8_param_ag": _is_mxfp8(config)}


def check_ddp(config: Config, ddp: DistributedDataParallelConfig) -> None:
    """Refuses data parallelism that cannot gather weights in FP8.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    if not ddp.fp8_param_gather:
        return
    if not ddp.use_distributed_optimizer:
        raise ValueError(
            "megatron.ddp.use_distributed_optimizer: megatron.transformer.fp8_param needs it; set it to true"
        )
    if ddp.overlap_param_gather and _is_mxfp8(config):
        raise ValueError(
            "megatron.ddp.overlap_param_gather: not with fp8_param and fp8_recipe: mxfp8, whose weights are gathered"
            " through the gradients' buffer; leave it out"
        )


def _recipe(config: Config) -> str:
    return config.megatron.transformer.get("fp8_recipe") or "delayed"


def _is_mxfp8(config: Config) -> bool:
    return _recipe(config) == "mxfp8"
