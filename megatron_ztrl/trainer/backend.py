"""The one place that decides between Transformer Engine and local layers, between GPU and CPU, and on FP8."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ztrl.trainer.cpu_compat.attention import PackedSDPAttention
from megatron_ztrl.trainer.cpu_compat.norm import RMSNorm
from megatron_ztrl.weights.hf_mapping import Backend


def choose_backend(
    requested: Literal["auto", "te", "local"], dtype: Literal["float32", "bfloat16"]
) -> Backend:
    """``auto`` is Transformer Engine where there is a GPU and it can compute: in bfloat16.

    Raises:
        ValueError: Transformer Engine is wanted but cannot run here.
    """
    can_run = torch.cuda.is_available() and dtype == "bfloat16"
    if requested == "local" or (requested == "auto" and not can_run):
        return "local"
    if not torch.cuda.is_available():
        raise ValueError("model.backend: te needs a CUDA device; use local (or auto)")
    if not can_run:
        raise ValueError(
            "model.backend: Transformer Engine attends to packed sequences in bfloat16 only; set model.dtype to"
            " bfloat16, or use local (or auto)"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError("model.backend: transformer_engine is not installed; install it, or use local")
    return "te"


def process_group_backend() -> str:
    """NCCL between GPUs, gloo between CPU processes."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def device() -> torch.device:
    """Where this rank's tensors live."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def platform_options(backend: Backend) -> dict[str, Any]:
    """``TransformerConfig`` fields that follow from the backend and the device, not from the model."""
    options: dict[str, Any] = {
        # These fusions need apex or CUDA kernels of their own; Transformer Engine brings its own.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": backend == "te",
        # Compiled: the backward pass of the gated MLP then keeps three numbers of a column, and not five.
        "bias_activation_fusion": backend == "te",
    }
    if not torch.cuda.is_available():
        options |= {
            "use_cpu_initialization": True,
            "batch_p2p_comm": False,  # gloo has no batched point-to-point calls
        }
    return options


def check_support(config: TransformerConfig, backend: Backend, capability: tuple[int, int] | None) -> None:
    """Refuses what the layers, or the device, cannot do.

    Args:
        config: As it will be used, native options included.
        backend: Whose layers.
        capability: CUDA compute capability of the device; None is a CPU.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    options = "megatron.transformer"
    _check_pipeline(config, capability)
    if config.fp4:
        raise ValueError(f"{options}.fp4: not supported; fp8 is")
    if config.expert_model_parallel_size > 1 or config.num_moe_experts:
        raise ValueError(f"{options}: no supported architecture has experts to spread over ranks")
    if not config.fp8:
        return
    if capability is None:
        raise ValueError(f"{options}.fp8: needs an NVIDIA GPU; this rank computes on the CPU")
    if backend != "te":
        raise ValueError(f"{options}.fp8: the local layers do not compute in FP8; set model.backend to te")
    if not config.bf16:
        raise ValueError(f"{options}.fp8: keeps its weights in bfloat16; set model.dtype to bfloat16")
    recipe = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))
    needed, generation = _FP8_NEEDS.get(recipe, _FP8_NEEDS["delayed"])
    if capability < needed:
        found = ".".join(map(str, capability))
        raise ValueError(
            f"{options}.fp8_recipe: {recipe} needs {generation} (compute capability {needed[0]}.{needed[1]}) or"
            f" later; this GPU has {found}"
        )
    _check_fp8_shapes(config, fp8_alignment(config))


def _check_pipeline(config: TransformerConfig, capability: tuple[int, int] | None) -> None:
    """Refuses point-to-point calls that give wrong gradients without an error."""
    if config.deallocate_pipeline_outputs and capability is None:
        raise ValueError(
            "megatron.transformer.deallocate_pipeline_outputs: gloo may still read what this would free; leave it out"
        )
    interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if interleaved and config.batch_p2p_comm and config.pipeline_model_parallel_size == 2:
        raise ValueError(
            "megatron.transformer.batch_p2p_comm: two interleaved stages send each other several tensors at once,"
            " which a batch of calls mixes up; leave it out"
        )


_FP8_NEEDS: dict[str, tuple[tuple[int, int], str]] = {
    "delayed": ((8, 9), "Ada"),
    "tensorwise": ((8, 9), "Ada"),
    "blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}
"""Least compute capability by recipe."""


def fp8_alignment(config: TransformerConfig) -> int:
    """What both sides of every FP8 matrix must be a multiple of; 1 without FP8. ``data.packing`` sees to the tokens."""
    return get_fp8_align_size(config.fp8_recipe) if config.fp8 else 1


def _check_fp8_shapes(config: TransformerConfig, multiple: int) -> None:
    size = config.tensor_model_parallel_size
    head_rows = config.kv_channels
    for what, rows in (
        ("hidden_size", config.hidden_size),
        ("feed-forward columns", config.ffn_hidden_size // size),
        ("query columns", config.num_attention_heads * head_rows // size),
        (
            "query, key and value columns",
            (config.num_attention_heads + 2 * config.num_query_groups) * head_rows // size,
        ),
    ):
        if rows % multiple:
            raise ValueError(
                f"megatron.transformer.fp8: a rank's {rows} {what} are no multiple of {multiple}, which FP8 needs;"
                " lower actor.tensor_parallel_size, or leave fp8 out"
            )


def block_spec(config: TransformerConfig, backend: Backend, virtual_stage: int | None) -> Any:
    """The layers of one model chunk, as ``GPTModel`` wants them described.

    Raises:
        ValueError: the configuration asks for what they, or this device, cannot do.
    """
    check_support(config, backend, torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    assert isinstance(layer, ModuleSpec)
    # The local attention refuses packed sequences and the local norm refuses sequence parallelism.
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedSDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
