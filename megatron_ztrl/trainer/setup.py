"""Turns a ``Config`` into Megatron's process groups, configurations, model and optimizer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer import fp8_weights
from megatron_ztrl.trainer.backend import platform_options, process_group_backend
from megatron_ztrl.trainer.cpu_compat.allocator import keep_freed_memory
from megatron_ztrl.trainer.native_values import native_values
from megatron_ztrl.weights.hf_mapping import Architecture, Backend, ParallelLayout

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank waits this long for its peers; the slowest legitimate wait is a checkpoint write by one of them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def init_distributed(layout: ParallelLayout, rank: int, init_method: str, seed: int) -> None:
    """Joins the world of this policy and makes Megatron's groups in it.

    Raises:
        torch.distributed.DistStoreError: the other ranks did not come.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
        keep_freed_memory()
    dist.init_process_group(
        process_group_backend(),
        init_method=init_method,
        rank=rank,
        world_size=layout.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        layout.tensor_size,
        layout.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_size if layout.virtual_size > 1 else None,
        context_parallel_size=layout.context_size,
    )
    place = layout.place(rank)
    assert place.tensor_rank == parallel_state.get_tensor_model_parallel_rank()
    assert place.pipeline_rank == parallel_state.get_pipeline_model_parallel_rank()
    assert place.data_rank == parallel_state.get_data_parallel_rank()
    assert place.context_rank == parallel_state.get_context_parallel_rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def transformer_config(
    config: Config, world: WorldConfig, architecture: Architecture, backend: Backend
) -> TransformerConfig:
    """Shape from the checkpoint, layout from ``world``, the rest from ``megatron.transformer``.

    Raises:
        ValueError: Megatron refuses what ``megatron.transformer`` asks for.
    """
    dtype = DTYPES[config.model.dtype]
    options: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_groups,
        "kv_channels": architecture.head_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_epsilon,
        "qk_layernorm": architecture.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": world.tensor_parallel_size,
        "pipeline_model_parallel_size": world.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": (
            world.virtual_pipeline_size if world.virtual_pipeline_size > 1 else None
        ),
        "context_parallel_size": world.context_parallel_size,
        "sequence_parallel": world.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # As Megatron-LM chooses them. Batched calls mix up what two interleaved stages send each other.
        "overlap_p2p_comm": world.virtual_pipeline_size > 1,
        "batch_p2p_comm": world.virtual_pipeline_size == 1,
        "bf16": dtype is torch.bfloat16,
        # Microbatches are packed to different lengths, which the pipeline must communicate. Megatron couples
        # that to this dispatcher even for dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Gradients are summed over data-parallel ranks: the loss is divided by the batch's trained tokens
        # before the backward pass, so neither the schedule nor DDP may average.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _finalize_without_scaling,
    }
    native = native_values("megatron.transformer", TransformerConfig, config.megatron.transformer)
    try:
        return TransformerConfig(**(options | platform_options(backend) | native))
    except (ValueError, AssertionError) as error:
        if not native:  # then it is not the user's
            raise
        reason = " ".join(str(error).split()) or "it says no more"
        raise ValueError(
            f"megatron.transformer: Megatron refuses {config.megatron.transformer}: {reason}"
        ) from error


def _finalize_without_scaling(
    model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any
) -> None:
    """Reduces gradients; ``num_tokens`` would divide them a second time."""
    finalize_model_grads(model, None, **kwargs)


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Data parallelism with the distributed optimizer.

    Raises:
        ValueError: it cannot be combined with weights in FP8.
    """
    options = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, "check_for_nan_in_grad": True}
    options |= fp8_weights.ddp_options(config)
    chosen = DistributedDataParallelConfig(**(options | config.megatron.ddp))
    fp8_weights.check_ddp(config, chosen)
    return chosen


def optimizer_config(
    config: Config, world: WorldConfig, ddp: DistributedDataParallelConfig
) -> OptimizerConfig:
    """AdamW from ``world``, the rest from ``megatron.optimizer``."""
    options: dict[str, Any] = {
        "optimizer": "adam",
        "lr": world.learning_rate,
        "min_lr": world.learning_rate,
        "weight_decay": world.weight_decay,
        "adam_beta1": world.adam_beta1,
        "adam_beta2": world.adam_beta2,
        "adam_eps": world.adam_eps,
        "clip_grad": world.max_grad_norm,
        "bf16": config.model.dtype == "bfloat16",
        "params_dtype": DTYPES[config.model.dtype],
        "use_distributed_optimizer": ddp.use_distributed_optimizer,
        "overlap_param_gather": ddp.overlap_param_gather,
        # Half a main weight in a checkpoint would be taken for a whole one under other settings.
        "store_param_remainders": False,
    } | fp8_weights.optimizer_options(config)
    native = native_values("megatron.optimizer", OptimizerConfig, config.megatron.optimizer)
    return OptimizerConfig(**(options | native))


def build_optimizer(
    config: Config,
    world: WorldConfig,
    models: list[DistributedDataParallel],
    ddp: DistributedDataParallelConfig,
) -> MegatronOptimizer:
    """AdamW whose states are spread over the data-parallel ranks."""
    return get_megatron_optimizer(optimizer_config(config, world, ddp), models)


def destroy_distributed() -> None:
    """Leaves all process groups, so that the process may join another world."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
