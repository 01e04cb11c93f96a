"""Checks the options that pass through to Megatron and SGLang against the releases that are installed.

The names of the upstream fields are read from the installed source with ``ast``. Importing the packages takes
tens of seconds, and sglang does not import at all without its GPU kernels.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ztrl.config.errors import ConfigError, did_you_mean
from megatron_ztrl.config.schema import Config

_MODEL_SHAPE = "comes from the config.json at model.path"
_DTYPE = "set model.dtype"
_TRAINER = "set by the trainer"

_OWNED_TRANSFORMER: dict[str, str] = {
    "tensor_model_parallel_size": "set actor.tensor_parallel_size",
    "pipeline_model_parallel_size": "set actor.pipeline_parallel_size",
    "virtual_pipeline_model_parallel_size": "set actor.virtual_pipeline_size",
    "sequence_parallel": "set actor.sequence_parallel",
    "context_parallel_size": "set actor.context_parallel_size",
    "transformer_impl": "set model.backend",
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16"), _DTYPE),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
        )
        + ("normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func", "qk_layernorm")
        + ("add_bias_linear", "add_qkv_bias", "rotary_interleaved")
        # Each of these would make another function of the same weights.
        + ("layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm", "qk_l2_norm")
        + ("window_size", "window_attn_skip_freq", "no_rope_freq", "mrope_section", "softmax_scale")
        + ("softmax_type", "attention_output_gate", "glu_linear_offset", "activation_func_clamp_value")
        + ("multi_latent_attention", "experimental_attention_variant", "linear_attention_freq")
        + ("mtp_num_layers", "heterogeneous_block_specs", "is_hybrid_model"),
        _MODEL_SHAPE,
    ),
    **dict.fromkeys(
        ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        + ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
        + ("pipeline_model_parallel_layout",),
        "every pipeline stage has the same number of layers here",
    ),
    **dict.fromkeys(
        ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "tp_comm_overlap"),
        "needs microbatches of one size, and packed ones differ",
    ),
    **dict.fromkeys(
        ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "defer_embedding_wgrad_compute"),
        "would change nothing: log-probs come from hidden states, without Megatron's output layer and loss",
    ),
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"),
        "stays 0: with dropout the trainer's log-probs are not those of the policy that sampled",
    ),
    **dict.fromkeys(
        ("calculate_per_token_loss", "variable_seq_lengths", "finalize_model_grads_func", "grad_scale_func")
        + ("no_sync_func", "grad_sync_func", "param_sync_func", "timers", "init_model_with_meta_device"),
        _TRAINER,
    ),
}
_OWNED_OPTIMIZER: dict[str, str] = {
    "lr": "set actor.learning_rate",
    "weight_decay": "set actor.weight_decay",
    "adam_beta1": "set actor.adam_beta1",
    "adam_beta2": "set actor.adam_beta2",
    "adam_eps": "set actor.adam_eps",
    "clip_grad": "set actor.max_grad_norm",
    **dict.fromkeys(("min_lr", "decoupled_lr", "decoupled_min_lr", "timers"), _TRAINER),
    **dict.fromkeys(("params_dtype", "bf16", "fp16"), _DTYPE),
    **dict.fromkeys(
        ("use_distributed_optimizer", "overlap_param_gather"), "set it in megatron.ddp, for both of them"
    ),
    "store_param_remainders": "checkpoints hold whole main weights, which every setting can load",
    **dict.fromkeys(
        ("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), "follows megatron.transformer.fp8_recipe"
    ),
    **dict.fromkeys(
        ("optimizer", "sgd_momentum", "muon_momentum", "muon_split_qkv", "muon_use_nesterov")
        + ("muon_scale_mode", "muon_fp32_matmul_prec", "muon_num_ns_steps", "muon_tp_mode")
        + ("muon_extra_scale_factor",),
        "the optimizer is AdamW, whose moments a checkpoint holds",
    ),
    **dict.fromkeys(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "only float16 has a loss scale, and model.dtype offers none",
    ),
}
_OWNED_DDP: dict[str, str] = {
    **dict.fromkeys(
        ("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"), "follows megatron.transformer.fp8_param"
    ),
    "average_in_collective": "gradients are summed: the loss is a mean over the global batch already",
    "num_distributed_optimizer_instances": "the optimizer's state is spread over all replicas, once",
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy")
        + ("outer_dp_sharding_strategy", "fsdp_double_buffer", "fsdp_manual_registration")
        + ("preserve_fp32_weights", "keep_fp8_transpose_cache", "suggested_communication_unit_size"),
        "Megatron's FSDP is not used: publishing and checkpoints read whole parameters of a rank",
    ),
}
_OWNED_SERVER: dict[str, str] = {
    "model_path": "set model.path",
    "model": "set model.path",
    "tokenizer_path": "set model.path",
    "dtype": _DTYPE,
    "port": "set engine.port",
    "host": "engines listen where the driver expects them",
    "tp_size": "set engine.tensor_parallel_size",
    "tp": "set engine.tensor_parallel_size",
    "tensor_parallel_size": "set engine.tensor_parallel_size",
    "dp_size": "set engine.count: each engine is one replica",
    "max_running_requests": "set engine.max_running_requests",
    "custom_weight_loader": "the publisher installs its own loader",
    "weight_version": "counted by the publisher",
    "random_seed": "set run.seed",
}


def check_native(config: Config) -> None:
    """Refuses native options that the installed release does not have, or that this project sets itself.

    Raises:
        ConfigError: One line per problem, each starting with the config path.
    """
    problems: list[str] = []
    for path, options, fields, owned in (
        ("megatron.transformer", config.megatron.transformer, transformer_fields, _OWNED_TRANSFORMER),
        ("megatron.optimizer", config.megatron.optimizer, optimizer_fields, _OWNED_OPTIMIZER),
        ("megatron.ddp", config.megatron.ddp, ddp_fields, _OWNED_DDP),
        ("sglang.server_args", config.sglang.server_args, server_fields, _OWNED_SERVER),
    ):
        if options:
            try:
                problems += _check(path, options, fields(), owned)
            except ModuleNotFoundError as error:
                problems.append(f"{path}: cannot be checked: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def transformer_fields() -> set[str]:
    """Fields of Megatron's ``TransformerConfig``, the inherited ones included."""
    core = _package_directory("megatron", "megatron-core") / "core"
    return _annotated(core / "transformer/transformer_config.py", {"TransformerConfig"}) | _annotated(
        core / "model_parallel_config.py", {"ModelParallelConfig"}
    )


def optimizer_fields() -> set[str]:
    """Fields of Megatron's ``OptimizerConfig``."""
    core = _package_directory("megatron", "megatron-core") / "core"
    return _annotated(core / "optimizer/optimizer_config.py", {"OptimizerConfig"})


def ddp_fields() -> set[str]:
    """Fields of Megatron's ``DistributedDataParallelConfig``."""
    core = _package_directory("megatron", "megatron-core") / "core"
    path = core / "distributed/distributed_data_parallel_config.py"
    return _annotated(path, {"DistributedDataParallelConfig"})


def server_fields() -> set[str]:
    """Fields of SGLang's ``ServerArgs``, which is assembled from one namespace class per file."""
    arguments = _package_directory("sglang", "sglang") / "srt/arg_groups/fields"
    names = set[str]().union(*(_annotated(path) for path in sorted(arguments.glob("*.py"))))
    if not names:
        raise ModuleNotFoundError(
            f"no ServerArgs fields in {arguments}; install the pinned release of sglang"
        )
    return names


def _check(path: str, options: Mapping[str, Any], known: set[str], owned: Mapping[str, str]) -> Iterable[str]:
    for name in options:
        if name in owned:
            yield f"{path}.{name}: not set here: {owned[name]}"
        elif name not in known:
            yield f"{path}.{name}: unknown option{did_you_mean(name, known)}"


def _package_directory(package: str, distribution: str) -> Path:
    """Where a top-level package is installed; finding it imports nothing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{distribution} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _annotated(path: Path, classes: set[str] | None = None) -> set[str]:
    """Public annotated names in the bodies of the classes of a source file (None: of all its classes)."""
    if not path.is_file():
        raise ModuleNotFoundError(f"{path} is missing; install the pinned release")
    return {
        statement.target.id
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.ClassDef) and (classes is None or node.name in classes)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not statement.target.id.startswith("_")
    }
