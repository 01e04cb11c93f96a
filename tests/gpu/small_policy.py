"""A random Qwen2 with the quickstart's tokenizer, a batch for it, and one actor rank that holds it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_qwen2 import make_qwen2

from megatron_ztrl.config.schema import (
    ActorConfig,
    Config,
    DataConfig,
    DatasetConfig,
    MegatronConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.packing import PackedBatch, pack, with_per_token
from megatron_ztrl.types import TrainingSample

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
VOCAB_SIZE = 320
TOKENS = 2048
"""Of a microbatch, and a multiple of what every FP8 recipe needs."""


def save_policy(directory: Path, **changes: Any) -> None:
    """Four layers; heads of 64, and matrices whose sides are multiples of 128; ``changes`` of the model's options."""
    shapes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.04,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    model = make_qwen2(noise=0.1, **(shapes | changes))
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / "base" / name, directory)


def samples() -> list[TrainingSample]:
    """Twenty sequences of 33 to 700 tokens; the last two thirds of each are trained."""
    random = np.random.default_rng(1)
    made = []
    for index, length in enumerate(random.integers(33, 700, 20).tolist()):
        made.append(
            TrainingSample(
                token_ids=random.integers(2, VOCAB_SIZE, length).tolist(),
                loss_mask=[position > length // 3 for position in range(length)],
                rollout_logprobs=[0.0] * length,
                weight_versions=[0] * length,
                reward=0.0,
                group_id=index,
            )
        )
    return made


def batch(pad_to_multiple: int = 32) -> PackedBatch:
    """The samples, packed."""
    return pack(
        samples(), max_tokens_per_microbatch=TOKENS, data_parallel_size=1, pad_to_multiple=pad_to_multiple
    )


def with_targets(packed: PackedBatch, old: list[np.ndarray]) -> PackedBatch:
    """The batch with old log-probs and advantages for a training step."""
    random = np.random.default_rng(2)
    advantages = [[random.normal(0, 1, mb.input_ids_T.size) for mb in rank] for rank in packed.microbatches]
    return with_per_token(with_per_token(packed, "old_logprobs", [old]), "advantages", advantages)


def actor_rank(
    checkpoint: Path,
    rank: int,
    world_size: int,
    meeting: str,
    dtype: str = "bfloat16",
    transformer: dict[str, Any] | None = None,
    **layout: Any,
) -> Any:
    """One rank of the policy."""
    from megatron_ztrl.trainer.actor import ActorRank

    config = Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path=str(checkpoint), dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        actor=ActorConfig(max_tokens_per_microbatch=TOKENS, learning_rate=1e-4, **layout),
        megatron=MegatronConfig(transformer=transformer or {}),
    )
    return ActorRank(config, rank, world_size, meeting)


@contextmanager
def actor(checkpoint: Path, dtype: str = "bfloat16", **transformer: Any) -> Iterator[Any]:
    """The only rank of a world, which it leaves at the end."""
    with tempfile.TemporaryDirectory() as directory:
        rank = actor_rank(checkpoint, 0, 1, f"file://{directory}/meeting", dtype, transformer)
        try:
            yield rank
        finally:
            rank.close()


def trained(packed: PackedBatch, logprobs: list[np.ndarray]) -> np.ndarray:
    """[N] The log-probs of all trained tokens, by sample and position."""
    by_sample: dict[int, np.ndarray] = {}
    for mb, logp_T in zip(packed.microbatches[0], logprobs, strict=True):
        for index, start, end in zip(mb.sample_indices, mb.cu_seqlens, mb.cu_seqlens[1:], strict=False):
            by_sample[index] = logp_T[start:end][mb.loss_mask_T[start:end]]
    return np.concatenate([by_sample[index] for index in sorted(by_sample)])


@torch.no_grad()
def reference(checkpoint: Path, dtype: torch.dtype, device: str = "cuda") -> np.ndarray:
    """[N] The same log-probs by transformers, one sequence at a time."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    found = []
    for sample in samples():
        ids = torch.tensor(sample.token_ids, device=device)
        logits = model(ids[None]).logits[0, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].cpu().numpy()
        found.append(logp[np.array(sample.loss_mask[1:])])
    return np.concatenate(found)
