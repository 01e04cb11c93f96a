"""Small random Hugging Face checkpoints, a configuration for them, and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from small_qwen2 import unsettle

from megatron_ztrl.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    CriticConfig,
    DataConfig,
    DatasetConfig,
    MegatronConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.packing import Microbatch, PackedBatch, pack, with_per_token
from megatron_ztrl.types import TrainingSample

Role = Literal["actor", "critic"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A random checkpoint."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of the family's transformers config."""
    role: Role = "actor"
    """Who trains it; a critic has a value head."""
    new_head: bool = False
    """The critic is saved as a language model, so its head begins at 0."""
    weighted: bool = False
    """The policy's loss has importance weights."""


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
DEEP = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
CHECKPOINTS = {
    "qwen2": Checkpoint(family="Qwen2", options=UNTIED),
    "qwen2-tied": Checkpoint(family="Qwen2", options=TIED),
    "qwen2-weighted": Checkpoint(family="Qwen2", options=UNTIED, weighted=True),
    "llama": Checkpoint(family="Llama", options=UNTIED),
    "llama-tied": Checkpoint(family="Llama", options=TIED),
    "qwen3-tied": Checkpoint(family="Qwen3", options=TIED | {"head_dim": 32}),
    "qwen2-deep": Checkpoint(family="Qwen2", options=UNTIED | DEEP),
    "qwen3-deep-tied": Checkpoint(family="Qwen3", options=TIED | DEEP | {"head_dim": 16}),
    "qwen2-critic": Checkpoint(family="Qwen2", options=UNTIED, role="critic"),
    "qwen3-critic": Checkpoint(family="Qwen3", options=TIED | {"head_dim": 32}, role="critic"),
    "llama-critic": Checkpoint(family="Llama", options=UNTIED, role="critic"),
    "new-critic": Checkpoint(family="Qwen2", options=TIED, role="critic", new_head=True),
}
VOCAB_SIZE = 151
"""Odd, so that every tensor-parallel layout must pad the vocabulary."""
STEPS = 3
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 5e-4, 2, 0.1, 0.05
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-4
"""Large: the update is then a smooth function of the gradient, and parameters can be compared closely."""
CLIP_LOW, CLIP_HIGH, TEMPERATURE, VALUE_CLIP = 0.2, 0.28, 0.8, 0.2


def config(
    path: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vp: int = 1,
    dp: int = 1,
    cp: int = 1,
    sp: bool = False,
    dtype: str = "float32",
    transformer: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
) -> Config:
    """A configuration for a small policy, or a critic laid out like it, on CPU ranks."""
    world: dict[str, Any] = {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "virtual_pipeline_size": vp,
        "data_parallel_size": dp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_eps": ADAM_EPS,
        "max_grad_norm": MAX_GRAD_NORM,
    }
    return Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path=str(path), dtype=dtype),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=STEPS),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        actor=ActorConfig(**world),
        critic=CriticConfig(**world, value_clip=VALUE_CLIP),
        megatron=MegatronConfig(transformer=transformer or {}, ddp=ddp or {}),
    )


def save_checkpoint(name: str, directory: Path) -> Any:
    """Writes a random fp32 checkpoint and returns the model that training starts from."""
    import transformers

    checkpoint = CHECKPOINTS[name]
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{checkpoint.family}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=256,
        **({"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2} | checkpoint.options),
    )
    model = getattr(transformers, f"{checkpoint.family}ForCausalLM")(model_config).float()
    _randomise(model)
    if checkpoint.role == "critic":
        model_config.num_labels = 1
        critic = getattr(transformers, f"{checkpoint.family}ForTokenClassification")(model_config).float()
        critic.model.load_state_dict(model.model.state_dict())
        with torch.no_grad():
            for parameter in critic.score.parameters():
                parameter.zero_() if checkpoint.new_head else parameter.normal_(0, 0.03)
        (model if checkpoint.new_head else critic).save_pretrained(directory)
        model = critic
    else:
        model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"model": "a tokenizer file"}')
    return model.eval()


@torch.no_grad()
def _randomise(model: Any) -> None:
    unsettle(model, 0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # outputs and gradients near 1, where absolute bounds mean something
            parameter.mul_(3.0 if "embed" in name else 2.0)


def samples() -> list[TrainingSample]:
    """Twelve sequences of 3 to 40 tokens, some lengths twice; one is not trained at all."""
    random = np.random.default_rng(1)
    lengths = [3, 40, 17, 17, 9, 28, 28, 28, 11, 33, 5, 21]
    made = []
    for index, length in enumerate(lengths):
        mask = (random.random(length) < 0.7) & (np.arange(length) > 0) & (index != 4)
        made.append(
            TrainingSample(
                token_ids=random.integers(0, VOCAB_SIZE, length).tolist(),
                loss_mask=mask.tolist(),
                rollout_logprobs=[0.0] * length,
                weight_versions=[0] * length,
                reward=0.0,
                group_id=index,
            )
        )
    return made


def packed(
    targets: dict[str, list[np.ndarray]],
    *,
    dp: int,
    tokens: int,
    multiple: int,
    order: Sequence[int] | None = None,
) -> PackedBatch:
    """The samples and an empty microbatch, with per-sample targets of the loss.

    Args:
        targets: As ``reference.make_targets`` makes them.
        dp: Data-parallel ranks.
        tokens: Budget of a microbatch.
        multiple: Microbatches are padded to it.
        order: In which the samples are packed; None is as they come.
    """
    everything = samples()
    order = range(len(everything)) if order is None else order
    batch = pack(
        [everything[index] for index in order],
        max_tokens_per_microbatch=tokens,
        data_parallel_size=dp,
        pad_to_multiple=multiple,
    )
    nothing_T = np.zeros(multiple, dtype=np.int64)
    empty = Microbatch(
        sample_indices=[],
        cu_seqlens=np.array([0, multiple], dtype=np.int32),
        input_ids_T=nothing_T,
        position_ids_T=np.arange(multiple),
        target_ids_T=nothing_T,
        loss_mask_T=nothing_T.astype(bool),
    )
    ranks = [
        # The empty one is what a rank gets that has fewer microbatches than another.
        [*(replace(mb, sample_indices=[order[i] for i in mb.sample_indices]) for mb in rank), empty]
        for rank in batch.microbatches
    ]
    batch = replace(batch, microbatches=ranks)
    for name, values in targets.items():
        batch = with_per_token(batch, name, spread(batch, values))
    return batch


def spread(batch: PackedBatch, values: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Lays per-sample arrays out like the batch: entry t of a sample belongs to its token t + 1."""
    ranks = []
    for rank in batch.microbatches:
        arrays = []
        for mb in rank:
            array_T = np.zeros(mb.input_ids_T.size)
            for index, start in zip(mb.sample_indices, mb.cu_seqlens, strict=False):
                array_T[start : start + values[index].size] = values[index]
            arrays.append(np.where(mb.loss_mask_T, array_T, 0.0))
        ranks.append(arrays)
    return ranks
