"""Small random Hugging Face policies, a batch, and what plain transformers + torch make of them.

The reference shares no code with the trainer: one sequence at a time, full logits, torch's AdamW.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ztrl.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
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

POLICIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}
VOCAB_SIZE = 151
"""Odd, so that every tensor-parallel layout must pad the vocabulary."""
STEPS = 3
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 2e-3, 2, 0.1, 0.05
ADAM_EPS = 1e-4
"""Large: the update is then a smooth function of the gradient, and parameters can be compared closely."""
CLIP_LOW, CLIP_HIGH, TEMPERATURE = 0.2, 0.28, 0.8


def config(
    path: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    vp: int = 1,
    dp: int = 1,
    sp: bool = False,
    dtype: str = "float32",
    transformer: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
) -> Config:
    """A configuration for a small policy on CPU ranks."""
    return Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path=str(path), dtype=dtype),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=STEPS),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        actor=ActorConfig(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            virtual_pipeline_size=vp,
            data_parallel_size=dp,
            sequence_parallel=sp,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP_STEPS,
            weight_decay=WEIGHT_DECAY,
            adam_eps=ADAM_EPS,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        megatron=MegatronConfig(transformer=transformer or {}, ddp=ddp or {}),
    )


def save_policy(name: str, directory: Path) -> Any:
    """Writes a random fp32 checkpoint and returns the model."""
    import transformers

    family, options = POLICIES[name]
    torch.manual_seed(0)
    model_config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **options,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(model_config).float()
    with (
        torch.no_grad()
    ):  # the library's initial biases and norms are all 0 and 1: mistakes there would not show
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in parameter_name:
                parameter.mul_(4.0)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"model": "a tokenizer file"}')
    return model


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
                reward=0.0,
                group_id=index,
            )
        )
    return made


def packed(reference: dict[str, Any], *, dp: int, tokens: int, multiple: int) -> PackedBatch:
    """The samples and an empty microbatch, with the reference's old log-probs and advantages."""
    batch = pack(samples(), max_tokens_per_microbatch=tokens, data_parallel_size=dp, pad_to_multiple=multiple)
    nothing_T = np.zeros(multiple, dtype=np.int64)
    empty = Microbatch(
        sample_indices=[],
        cu_seqlens=np.array([0, multiple], dtype=np.int32),
        input_ids_T=nothing_T,
        position_ids_T=np.arange(multiple),
        target_ids_T=nothing_T,
        loss_mask_T=nothing_T.astype(bool),
    )
    # What a rank gets that has fewer microbatches than another.
    batch = replace(batch, microbatches=[[*rank, empty] for rank in batch.microbatches])
    for name in ("old_logprobs", "advantages"):
        batch = with_per_token(batch, name, spread(batch, reference[name]))
    return batch


def spread(batch: PackedBatch, values: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Lays per-sample arrays out like the batch: entry t of a sample belongs to its token t + 1."""
    ranks = []
    for rank in batch.microbatches:
        arrays = []
        for mb in rank:
            array_T = np.zeros(mb.input_ids_T.size, dtype=np.float32)
            for index, start in zip(mb.sample_indices, mb.cu_seqlens, strict=False):
                array_T[start : start + values[index].size] = values[index]
            arrays.append(np.where(mb.loss_mask_T, array_T, 0.0).astype(np.float32))
        ranks.append(arrays)
    return ranks


def reference_logprobs(model: Any, temperature: float = TEMPERATURE) -> list[torch.Tensor]:
    """For each sample, [L - 1] log-probs of its tokens after the first."""
    result = []
    for sample in samples():
        ids = torch.tensor(sample.token_ids)
        logits = model(ids[None]).logits[0, :-1].float() / temperature
        result.append(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return result


def reference_run(model: Any) -> dict[str, Any]:
    """Log-probs, clipped gradients of the first step, and parameters after ``STEPS`` steps."""
    random = np.random.default_rng(2)
    masks = [torch.tensor(sample.loss_mask[1:]) for sample in samples()]
    with torch.no_grad():
        start = [logp.numpy() for logp in reference_logprobs(model)]
        canary = torch.tensor(range(1, 20))
        canary_logp = model(canary[None]).logits[0, :-1].log_softmax(-1).gather(-1, canary[1:, None])[:, 0]
    old = [logp + random.normal(0, 0.3, logp.size).astype(np.float32) for logp in start]
    advantages = [random.normal(0, 1, logp.size).astype(np.float32) for logp in start]
    trained = sum(int(mask.sum()) for mask in masks)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=ADAM_EPS,
    )
    result: dict[str, Any] = {
        "logprobs": start,
        "canary": canary_logp,
        "old_logprobs": old,
        "advantages": advantages,
    }
    result |= {"losses": [], "grad_norms": [], "clip_fractions": []}
    for step in range(STEPS):
        total, clipped = torch.zeros(()), 0
        for logp, mask, old_logp, advantage in zip(
            reference_logprobs(model), masks, old, advantages, strict=True
        ):
            ratio = (logp - torch.tensor(old_logp)).exp()
            gain = ratio * torch.tensor(advantage)
            bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * torch.tensor(advantage)
            total = total - torch.minimum(gain, bounded)[mask].sum()
            clipped += int((bounded < gain)[mask].sum())
        optimizer.zero_grad()
        (total / trained).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if step == 0:
            result["grads"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.step()
        result["losses"].append(total.item() / trained)
        result["grad_norms"].append(norm.item())
        result["clip_fractions"].append(clipped / trained)
    result["params"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        result["final_logprobs"] = [logp.numpy() for logp in reference_logprobs(model)]
    return result
