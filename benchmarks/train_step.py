"""Speed of one training step against Hugging Face transformers with torch's AdamW: real tokens per second.

One process, one thread, float32, the same random Qwen2 model (7M parameters), samples, clipped policy loss, gradient
clipping and learning rate. Lengths are log-normal with a long tail, as of rollouts with a tool; prompts and tool
replies are not trained. Three ways to take the step:

* ours: `ActorRank.train_step` on packed microbatches;
* unpadded: transformers, one sequence at a time, logits at the trained positions only (`logits_to_keep`). Packing by
  `position_ids` is no alternative with `sdpa`: it attends over the whole pack under a dense mask;
* padded: transformers, the same number of sequences in a microbatch as ours, padded to the longest of them, logits
  from the first trained position on.

Every round runs each of them once, and the best round of each counts. Time is CPU time of the process, which has one
thread that computes: on an idle machine the same as wall time, on a busy one nearer to it than a clock.

    python benchmarks/train_step.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.schema import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.packing import PackedBatch, pack, spread_trained, with_per_token
from megatron_ztrl.trainer.actor import ActorRank
from megatron_ztrl.types import TrainingSample

VOCAB_SIZE = 4096
MEDIAN_TOKENS, LONGEST_TOKENS, SIGMA = 120, 1024, 0.9
CLIP_LOW, CLIP_HIGH, MAX_GRAD_NORM = 0.2, 0.28, 1.0
LEARNING_RATE, ADAM_BETAS, ADAM_EPS = 1e-4, (0.9, 0.95), 1e-8
TARGETS = {"unpadded": 1.0, "padded": 2.0}
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sequence with what the loss needs; entry t of the last three speaks of token t + 1."""

    ids: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=32, help="sequences of one step")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--microbatch-tokens", type=int, default=2048, help="of our packed microbatches")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    figures = measure(options.samples, options.rounds, options.microbatch_tokens)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if figures["met"] else 1


def measure(sample_count: int, rounds: int, microbatch_tokens: int) -> dict[str, Any]:
    """Runs all three; returns their figures."""
    random = np.random.default_rng(0)
    samples = draw_samples(sample_count, random)
    packed = pack(samples, max_tokens_per_microbatch=microbatch_tokens, data_parallel_size=1)
    with tempfile.TemporaryDirectory() as directory:
        parameters = save_model(Path(directory))
        actor = ActorRank(_config(directory, microbatch_tokens), 0, 1, f"file://{directory}/meeting")
        batch, examples = attach_targets(samples, packed, actor, random)
        per_microbatch = -(-sample_count // len(packed.microbatches[0]))
        ways = {
            "ours": partial(_our_step, actor, batch),
            "unpadded": _HuggingFace(directory, examples, batch.trained_tokens, 1),
            "padded": _HuggingFace(directory, examples, batch.trained_tokens, per_microbatch),
        }
        seconds, losses = take_steps(ways, rounds)
        actor.close()
    lengths = [len(sample.token_ids) for sample in samples]
    speed = {name: sum(lengths) / min(taken) for name, taken in seconds.items()}
    gap = max(abs(a - b) for row in losses.values() for a, b in zip(losses["ours"], row, strict=True))
    ratios = {name: speed["ours"] / speed[name] for name in TARGETS}
    return {
        "parameters": parameters,
        "sequences": sample_count,
        "tokens": sum(lengths),
        "trained_tokens": batch.trained_tokens,
        "median_tokens": float(np.median(lengths)),
        "longest_tokens": max(lengths),
        "our_microbatches": len(packed.microbatches[0]),
        "sequences_per_padded_microbatch": per_microbatch,
        "tokens_per_second": speed,
        "cpu_seconds": seconds,
        "losses": losses,
        "largest_loss_difference": gap,
        "ratios": ratios,
        "met": gap < LOSS_TOLERANCE and all(ratios[name] >= target for name, target in TARGETS.items()),
    }


def take_steps(
    ways: dict[str, Callable[[int], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns the CPU seconds of the counted rounds, and the losses of all, by way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            losses[name].append(way(step))
            if step > 0:
                seconds[name].append(time.process_time() - started)
    return seconds, losses


def draw_samples(count: int, random: np.random.Generator) -> list[TrainingSample]:
    """A prompt of up to 64 tokens, then 60 tokens of the policy and 20 of the tool in turn."""
    samples = []
    for index in range(count):
        drawn = MEDIAN_TOKENS * random.lognormal(0.0, SIGMA)
        length = LONGEST_TOKENS if index == 0 else int(np.clip(drawn, 16, LONGEST_TOKENS))
        prompt = min(64, length // 3)
        places = np.arange(length) - prompt
        mask = (places >= 0) & (places % 80 < 60)
        samples.append(
            TrainingSample(
                token_ids=random.integers(VOCAB_SIZE, size=length).tolist(),
                loss_mask=mask.tolist(),
                rollout_logprobs=[0.0] * length,
                weight_versions=[0] * length,
                reward=0.0,
                group_id=index,
            )
        )
    return [samples[index] for index in random.permutation(count)]


def attach_targets(
    samples: list[TrainingSample], packed: PackedBatch, actor: ActorRank, random: np.random.Generator
) -> tuple[PackedBatch, list[Example]]:
    """The same old log-probs (near the policy's, so that some are clipped) and advantages for all ways."""
    logprobs = actor.logprobs(packed)
    assert logprobs is not None
    noisy = [array_T + random.normal(0, 0.2, array_T.size).astype(np.float32) for array_T in logprobs]
    batch = with_per_token(packed, "old_logprobs", [noisy])
    advantages = [np.full(sum(sample.loss_mask), random.normal(), dtype=np.float32) for sample in samples]
    batch = with_per_token(batch, "advantages", spread_trained(batch, advantages))
    examples: dict[int, Example] = {}
    for mb in batch.microbatches[0]:
        for index, start, end in zip(mb.sample_indices, mb.cu_seqlens, mb.cu_seqlens[1:], strict=False):
            examples[index] = Example(
                ids=torch.tensor(mb.input_ids_T[start:end]),
                mask=torch.tensor(mb.loss_mask_T[start : end - 1]),
                old_logprobs=torch.tensor(mb.per_token["old_logprobs"][start : end - 1]),
                advantages=torch.tensor(mb.per_token["advantages"][start : end - 1]),
            )
    return batch, [examples[index] for index in range(len(samples))]


def save_model(directory: Path) -> int:
    """Writes a random checkpoint. Returns its number of parameters."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=832,
            max_position_embeddings=LONGEST_TOKENS,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def _config(directory: str, microbatch_tokens: int) -> Config:
    return Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path=directory, dtype="float32"),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        actor=ActorConfig(
            max_tokens_per_microbatch=microbatch_tokens,
            learning_rate=LEARNING_RATE,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            adam_eps=ADAM_EPS,
            max_grad_norm=MAX_GRAD_NORM,
        ),
    )


def _our_step(actor: ActorRank, batch: PackedBatch, step: int) -> float:
    statistics = actor.train_step(batch, step)
    assert statistics is not None
    return statistics["loss"]


class _HuggingFace:
    """A model and an optimizer; a call takes one step on padded microbatches."""

    def __init__(
        self, directory: str, examples: list[Example], trained_tokens: int, per_microbatch: int
    ) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0
        )
        self._trained_tokens = trained_tokens
        parts = range(0, len(examples), per_microbatch)
        self._microbatches = [examples[start : start + per_microbatch] for start in parts]

    def __call__(self, step: int) -> float:
        self._optimizer.zero_grad()
        total = 0.0
        for examples in self._microbatches:
            loss = self._loss(examples) / self._trained_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        return total

    def _loss(self, examples: list[Example]) -> torch.Tensor:
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ids, mask = pad([e.ids for e in examples]), pad([e.mask for e in examples])
        # One sequence needs no padding and no attention mask.
        real = None if len(examples) == 1 else pad([torch.ones_like(e.ids) for e in examples])
        places = mask[0].nonzero()[:, 0] if real is None else torch.arange(_first(mask), mask.shape[1])
        logits = self._model(ids, attention_mask=real, use_cache=False, logits_to_keep=places).logits
        logp = logits.log_softmax(-1).gather(-1, ids[:, places + 1, None])[..., 0]
        mask = mask[:, places]
        logp = logp[mask]
        old_logp = pad([e.old_logprobs for e in examples])[:, places][mask]
        advantages = pad([e.advantages for e in examples])[:, places][mask]
        ratio = (logp - old_logp).exp()
        bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        return -torch.minimum(ratio * advantages, bounded * advantages).sum()


def _first(mask: torch.Tensor) -> int:
    return int(mask.any(0).nonzero()[0])


def print_table(figures: dict[str, Any]) -> None:
    print(
        f"{figures['parameters']:,} parameters; a step of {figures['sequences']} sequences, "
        f"{figures['tokens']:,} tokens (median {figures['median_tokens']:.0f}, "
        f"longest {figures['longest_tokens']}), {figures['trained_tokens']:,} trained; padded in microbatches "
        f"of {figures['sequences_per_padded_microbatch']}"
    )
    table = Table("way", "tokens/s", "CPU s: best (worst)", "ours / it", "target", "met")
    for name, speed in figures["tokens_per_second"].items():
        taken = figures["cpu_seconds"][name]
        row = [name, f"{speed:,.0f}", f"{min(taken):.2f} ({max(taken):.2f})"]
        if name in TARGETS:
            ratio, target = figures["ratios"][name], TARGETS[name]
            row += [f"{ratio:.2f}x", f">= {target:.1f}x", "yes" if ratio >= target else "NO"]
        table.add_row(*row)
    Console().print(table)
    print(
        f"losses agree to {figures['largest_loss_difference']:.1e} over {len(figures['losses']['ours'])} steps "
        f"(allowed: {LOSS_TOLERANCE:.0e})"
    )


if __name__ == "__main__":
    sys.exit(main())
