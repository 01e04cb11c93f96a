"""The one place that decides between Transformer Engine and local layers, and between GPU and CPU."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
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


def choose_backend(requested: Literal["auto", "te", "local"]) -> Backend:
    """``auto`` is Transformer Engine where there is a GPU.

    Raises:
        ValueError: Transformer Engine is wanted but cannot run here.
    """
    if requested == "local" or (requested == "auto" and not torch.cuda.is_available()):
        return "local"
    if not torch.cuda.is_available():
        raise ValueError("model.backend: te needs a CUDA device; use local (or auto)")
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
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": backend == "te",
    }
    if not torch.cuda.is_available():
        options |= {
            "use_cpu_initialization": True,
            # gloo has no batched point-to-point calls. An output freed while gloo still reads it corrupts the
            # gradients of an interleaved schedule without an error.
            "batch_p2p_comm": False,
            "deallocate_pipeline_outputs": False,
        }
    return options


def block_spec(config: TransformerConfig, backend: Backend, virtual_stage: int | None) -> Any:
    """The layers of one model chunk, as ``GPTModel`` wants them described."""
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
