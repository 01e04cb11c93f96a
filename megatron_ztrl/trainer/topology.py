"""What can be checked before any process starts: the checkpoint is there and fits the parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.data.packing import token_multiple
from megatron_ztrl.weights.describe import compare, describe_architecture
from megatron_ztrl.weights.hf_mapping import Architecture, LayoutKeys, ParallelLayout, check_layout

ENGINE_RESERVE_TOKENS = 6
"""SGLang refuses a request whose tokens reach so far into the end of the context (``max_req_input_len``)."""


def resolve_checkpoint(path: str, setting: str = "model.path") -> Path:
    """The local directory that ``setting`` names; a hub id is downloaded, or found in the hub's cache.

    Raises:
        ValueError: there is no such directory, and no such hub checkpoint can be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ValueError(f"{setting}: {path} is not a directory, and not a hub id (organisation/name)")
    # Optional at run time: a local checkpoint needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{setting}: no directory {path}, and no such checkpoint on the hub or in its cache"
            f" ({type(error).__name__}); download it first, or give a local directory"
        ) from error


def read_architecture(checkpoint: Path, setting: str = "model.path") -> Architecture:
    """The architecture that ``config.json`` of a checkpoint directory describes.

    Raises:
        ValueError: the file is missing or unreadable, or the architecture is not supported.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{setting}: cannot read {path}: {error}") from error
    try:
        return Architecture.from_hf_config(config)
    except KeyError as error:
        raise ValueError(f"{setting}: {path} has no {error}") from error


def check_same_model(checkpoint: Path, architecture: Architecture) -> None:
    """Refuses another model's checkpoint. Rotary base and norm epsilon are in no tensor: they would change silently.

    Raises:
        ValueError: ``config.json`` of a run's checkpoint (``actor`` or ``critic``) says something else.
    """
    if not (checkpoint / "config.json").is_file():  # saved before checkpoints had one
        return
    stored = describe_architecture(read_architecture(checkpoint))
    fields = compare({"the checkpoint": stored, "the model": describe_architecture(architecture)})
    if wrong := [str(field) for field in fields if not field.agrees]:
        raise ValueError(f"{checkpoint} is not of this model: {'; '.join(wrong)}")


def parallel_layout(world: WorldConfig) -> ParallelLayout:
    """The grid of ranks that ``actor`` or ``critic`` asks for."""
    return ParallelLayout(
        tensor_size=world.tensor_parallel_size,
        pipeline_size=world.pipeline_parallel_size,
        data_size=world.data_parallel_size,
        virtual_size=world.virtual_pipeline_size,
        context_size=world.context_parallel_size,
    )


def critic_checkpoint(config: Config) -> Path:
    """Where the critic's first weights come from."""
    if config.critic.path is None:
        return resolve_checkpoint(config.model.path)
    return resolve_checkpoint(config.critic.path, "critic.path")


def check_topology(config: Config) -> None:
    """Checks that the models can be cut the way ``actor`` and ``critic`` say.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    policy = read_architecture(resolve_checkpoint(config.model.path))
    if policy.head != "language":
        raise ValueError(f"model.path: {config.model.path} is a critic, it has no language-model head")
    _check_context(config, policy)
    check_world("actor", config.actor, policy)
    _check_room("actor", config.actor, config)
    if config.algorithm.advantage != "gae":
        return
    critic = read_architecture(
        critic_checkpoint(config), "critic.path" if config.critic.path else "model.path"
    )
    if critic.vocab_size != policy.vocab_size:
        raise ValueError(
            f"critic.path: a vocabulary of {critic.vocab_size} tokens, where the policy's has"
            f" {policy.vocab_size}: the critic must read the policy's tokens"
        )
    check_world("critic", config.critic, critic)
    _check_room("critic", config.critic, config)


def _check_context(config: Config, policy: Architecture) -> None:
    """Refuses rollouts that would outgrow the engine's context, which refuses to go on with them."""
    longest = _longest_tokens(config)
    limit, reason = most_rollout_tokens(config, policy)
    if longest > limit:
        raise ValueError(
            f"rollout.max_response_tokens: data.max_prompt_tokens + rollout.max_response_tokens = {longest} must be at"
            f" most {limit}: {reason}"
        )


def most_rollout_tokens(config: Config, policy: Architecture) -> tuple[int, str]:
    """Tokens of prompt and response that an engine has room for, and why no more."""
    given = config.sglang.server_args.get("context_length")
    source = (
        "max_position_embeddings in config.json" if given is None else "sglang.server_args.context_length"
    )
    context = given or policy.max_positions
    reason = f"the engine's context is {context} tokens ({source}), and it keeps {ENGINE_RESERVE_TOKENS} for itself"
    return context - ENGINE_RESERVE_TOKENS, reason


def _longest_tokens(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _check_room(section: str, world: WorldConfig, config: Config) -> None:
    """Refuses microbatches that the longest rollout does not fit, some day in the middle of the run."""
    longest = _longest_tokens(config)
    multiple = token_multiple(world, config.megatron.transformer)
    padded = -(-longest // multiple) * multiple
    if world.max_tokens_per_microbatch < padded:
        raise ValueError(
            f"{section}.max_tokens_per_microbatch: {world.max_tokens_per_microbatch} does not hold the longest"
            f" sequence, data.max_prompt_tokens + rollout.max_response_tokens = {longest}, padded to a multiple of"
            f" {multiple}:"
            f" set it to {padded} or more"
        )


def check_world(section: str, world: WorldConfig, architecture: Architecture) -> None:
    """Checks that a model can be cut the way its section says.

    Raises:
        ValueError: one line with the config path and the fix.
    """
    keys = LayoutKeys(
        tensor=f"{section}.tensor_parallel_size",
        pipeline=f"{section}.pipeline_parallel_size",
        virtual=f"{section}.virtual_pipeline_size",
    )
    check_layout(architecture, parallel_layout(world), keys)
    if world.sequence_parallel and world.tensor_parallel_size == 1:
        raise ValueError(f"{section}.sequence_parallel: needs {section}.tensor_parallel_size > 1")
