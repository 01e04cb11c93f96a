"""How far an FP8 policy's log-probs would be from its bfloat16 ones, by kind of layer, emulated on the CPU.

Emulated is what a blockwise recipe does to the operands of a matrix product: e4m3 with a float32 scale for every
1 x 128 activations and every 128 x 128 weights, products accumulated in float32, results in bfloat16. Everything
else stays as the bfloat16 model has it. The tokens are the policy's own: it continues prompts at temperature 1.
The first row is what bfloat16 itself loses against float32, to compare with.

    python benchmarks/fp8_error.py [--model DIR] [--prompts FILE.jsonl] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_ztrl.weights.verify import canary_tokens

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
BLOCK = 128
KINDS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
    "lm_head": ("lm_head",),
}
LAYERS = ("qkv", "proj", "fc1", "fc2")
CASES: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in KINDS},
    "all layers": LAYERS,
    "all layers and lm_head": (*LAYERS, "lm_head"),
}
"""What is quantised. Transformer Engine quantises the layers and leaves the head in bfloat16."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=QUICKSTART / "base", help="Hugging Face checkpoint")
    parser.add_argument("--prompts", type=Path, default=QUICKSTART / "data" / "eval.jsonl")
    parser.add_argument("--key", default="problem", help="where a row of the file has its prompt")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="the most that each continuation has")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [json.loads(line)[options.key] for line in options.prompts.read_text().splitlines() if line]
    exact = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    sequences = sample(policy, tokenizer, prompts[: options.sequences], options.tokens)
    rows = measure(policy, exact, sequences) | measure_canary(policy)
    print_table(rows, options.model.name, sum(len(ids) - start for ids, start in sequences))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure(policy: Any, exact: Any, sequences: list[tuple[Tensor, int]]) -> dict[str, dict[str, float]]:
    """Mean and largest absolute difference from the bfloat16 log-probs, in nats, by what is quantised."""
    reference = logprobs(policy, sequences)
    rows = {"spread": difference(logprobs(exact, sequences), reference)}
    for name, kinds in CASES.items():
        with emulated_fp8(policy, kinds):
            rows[name] = difference(logprobs(policy, sequences), reference)
    return rows


@torch.no_grad()
def measure_canary(policy: Any) -> dict[str, dict[str, float]]:
    """The same over the canary of a publish: with its layers in FP8 and, to compare, with each weight shuffled."""
    canary = [(torch.tensor(canary_tokens(policy.config.vocab_size)), 1)]
    reference = logprobs(policy, canary)
    with emulated_fp8(policy, LAYERS):
        rows = {"canary, all layers": difference(logprobs(policy, canary), reference)}
    layers = {name for kind in LAYERS for name in KINDS[kind]}
    for name, module in policy.named_modules():
        if name.rpartition(".")[2] in layers:
            values = module.weight.flatten()
            module.weight.copy_(values[torch.randperm(len(values))].view_as(module.weight))
    return rows | {"canary, shuffled": difference(logprobs(policy, canary), reference)}


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[tuple[Tensor, int]]:
    """([L] prompt and continuation, where the continuation starts) of each prompt."""
    sequences = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, top_k=0
        )
        sequences.append((found[0], ids.shape[1]))
    return sequences


@torch.no_grad()
def logprobs(model: Any, sequences: list[tuple[Tensor, int]]) -> Tensor:
    """[N] Log-probs of all sampled tokens."""
    found = []
    for ids_L, start in sequences:
        logits_LV = model(ids_L[None]).logits[0, start - 1 : -1].float()
        found.append(logits_LV.log_softmax(-1).gather(-1, ids_L[start:, None])[:, 0])
    return torch.cat(found)


def difference(found_N: Tensor, reference_N: Tensor) -> dict[str, float]:
    gap_N = (found_N - reference_N).abs()
    return {"mean": gap_N.mean().item(), "max": gap_N.max().item()}


@contextmanager
def emulated_fp8(model: nn.Module, kinds: tuple[str, ...]) -> Iterator[None]:
    """Quantises both operands of the linear layers of these kinds."""
    names = {name for kind in kinds for name in KINDS[kind]}
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    assert layers and all(isinstance(layer, nn.Linear) for layer in layers)
    for layer in layers:
        layer.forward = _quantised_forward(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _quantised_forward(layer: Any) -> Any:
    weight = quantise(layer.weight.detach().float(), (BLOCK, BLOCK))

    def forward(x: Tensor) -> Tensor:
        rows = quantise(x.detach().float().flatten(0, -2), (1, BLOCK)).view(x.shape)
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(rows, weight, bias).to(x.dtype)

    return forward


def quantise(x: Tensor, block: tuple[int, int]) -> Tensor:
    """To e4m3 and back, with one float32 scale for every block.

    Args:
        x: [M, N] float32; blocks at its ends may be smaller.
        block: Rows and columns that share a scale.
    """
    rows, columns = x.shape
    padded = F.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    largest = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    restored = (tiles / scale).to(torch.float8_e4m3fn).float() * scale
    return restored.view(padded.shape)[:rows, :columns]


def print_table(rows: dict[str, dict[str, float]], model: str, tokens: int) -> None:
    table = Table(title=f"|log-prob - bfloat16's| in nats, {model}, {tokens:,} sampled tokens")
    table.add_column("quantised")
    for name in ("mean", "max"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        shown = "nothing (float32)" if name == "spread" else name
        table.add_row(shown, f"{row['mean']:.5f}", f"{row['max']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
