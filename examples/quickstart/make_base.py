"""Makes the base policy of the quickstart, a Qwen2 of 0.37M parameters: `python make_base.py` writes base/.

The result is committed, so nobody needs to run this; it takes a few minutes on one CPU thread.
Most of the run reads solutions with Python, so that the policy learns to copy numbers into calls and out of
replies; the last quarter reads mostly guesses, so that the finished base can call Python but rarely does.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import EOS, build_tokenizer, sample_document
from measure_policy import print_measurement
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

IGNORED = -100  # target of the positions that are not trained
DOCUMENTS_PER_STEP = 24
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
DECAY_SHARE = 0.4
CODE_PHASE_SHARE = 0.75
CODE_SHARES = (0.9, 0.2)
"""Share of documents with Python in the first phase and in the second."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Two layers and eight heads: with four heads, copying into the second call depends on the seed."""
    config = Qwen2Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def sample_sequences(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, code_share: float
) -> list[tuple[list[int], list[int]]]:
    """Returns (prompt ids, response ids with end-of-text) of one step's documents, shortest first."""
    documents = [sample_document(rng, code_share) for _ in range(DOCUMENTS_PER_STEP)]
    prompts = tokenizer([d.prompt for d in documents], add_special_tokens=False).input_ids
    responses = tokenizer([d.response + EOS for d in documents], add_special_tokens=False).input_ids
    return sorted(zip(prompts, responses, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))


def bucket_by_length(sequences: list[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Splits sorted sequences where the longest would exceed the shortest by more than a quarter."""
    buckets: list[list[tuple[list[int], list[int]]]] = []
    shortest = 0
    for prompt, response in sequences:
        length = len(prompt) + len(response)
        if not buckets or length > 1.25 * shortest + 2:
            buckets.append([])
            shortest = length
        buckets[-1].append((prompt, response))
    return buckets


def summed_loss(model: Qwen2ForCausalLM, bucket: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Negative log-likelihood of all response tokens of a bucket, in nats."""
    longest = max(len(prompt) + len(response) for prompt, response in bucket)
    input_ids = torch.zeros(len(bucket), longest, dtype=torch.long)
    targets = torch.full_like(input_ids, IGNORED)
    for row, (prompt, response) in enumerate(bucket):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        targets[row, len(prompt) : end] = torch.tensor(response)
    logits = model(input_ids=input_ids).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, constant, linear decay over the last ``DECAY_SHARE`` of the run."""
    remaining = 1 - step / num_steps
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, max(0.02, remaining / DECAY_SHARE))


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_steps: int, seed: int) -> None:
    """Pre-trains the model on fresh documents."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=num_steps)
        for step in range(num_steps):
            code_share = CODE_SHARES[step >= CODE_PHASE_SHARE * num_steps]
            sequences = sample_sequences(rng, tokenizer, code_share)
            trained_tokens = sum(len(response) for _, response in sequences)
            loss_value = 0.0
            for bucket in bucket_by_length(sequences):
                loss = summed_loss(model, bucket) / trained_tokens
                loss.backward()
                loss_value += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"loss {loss_value:.3f} nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the matrices are too small to share
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model, tokenizer, arguments.steps, arguments.seed)
    model.eval()
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print_measurement(model, tokenizer, Console())


if __name__ == "__main__":
    main()
