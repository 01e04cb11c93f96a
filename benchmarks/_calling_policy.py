"""Random Qwen2 weights that call the Python tool again and again, and whose log-probs depend on all they have read.

Scripted tokens have an embedding dimension each. Layer 0's MLP turns a scripted token into the one that follows
it; layer 1's attention makes any other token be followed by the first of the script, or by the end. The rest of
the random weights is small, so that the script survives it, and large enough that wrong weights or wrong KV show.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2ForCausalLM

from megatron_ztrl.data.tokenizer import PolicyTokenizer

BASE = Path(__file__).parents[1] / "examples" / "quickstart" / "base"
"""Shape and tokenizer of the benchmark's policy."""
SCRIPT = ("``", "`", " ", "```", "python", "\n", "print", "(", "7", ")")
"""In that tokenizer. It begins by closing a block, so that one that has gone astray ends; " " is then cut."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

EMBEDDING = 0.75
"""Of a scripted token in its dimension: its log-prob is about -0.1."""
CONTEXT = 0.05
"""Share of attention and MLP that stays random."""
DEFAULT = 3.0
"""In embeddings: what pulls towards the first token of the script."""
END = 0.6
"""Of that: what pulls towards the end of the sequence."""
FIRING = 6.0
"""Gate and up projection of a scripted token's neuron."""


def save_calling_policy(directory: Path) -> Qwen2ForCausalLM:
    """Write a checkpoint with its tokenizer, in the shape of the quickstart's; returns the model."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(BASE, initializer_range=0.08)
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    tokenizer = PolicyTokenizer(BASE)
    script = [token for piece in SCRIPT for token in tokenizer.encode(piece)]
    assert len(script) == len(SCRIPT), "every piece is one token"
    call_the_tool(model, script)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(BASE / name, directory)
    return model


@torch.no_grad()
def call_the_tool(model: Qwen2ForCausalLM, script: Sequence[int]) -> Qwen2ForCausalLM:
    """Make a random model with two layers and tied embeddings speak ``script``; returns it.

    Args:
        model: Changed in place.
        script: Token ids, all different; the first is what follows any token that is not scripted, and the last.
    """
    first, second = model.model.layers
    for layer in (first, second):
        layer.self_attn.o_proj.weight *= CONTEXT
        layer.mlp.down_proj.weight *= CONTEXT
    for norm in (first.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(1.0)

    embedding = model.model.embed_tokens.weight
    tokens = [*script, model.config.eos_token_id]
    embedding[:, : len(tokens)] = 0.0
    for dimension, token in enumerate(tokens):
        embedding[token] = 0.0
        embedding[token, dimension] = EMBEDDING

    default = torch.zeros(model.config.hidden_size)
    default[0], default[len(script)] = DEFAULT * EMBEDDING, END * DEFAULT * EMBEDDING
    # A value that is the same at all positions passes through attention unchanged.
    second.self_attn.v_proj.weight[0] = 0.0
    second.self_attn.v_proj.bias[0] = 1.0
    second.self_attn.o_proj.weight[:, 0] = default

    width = model.config.hidden_size**0.5  # norm of what the MLP reads
    for dimension in range(len(script) - 1):
        for projection in (first.mlp.gate_proj, first.mlp.up_proj):
            projection.weight[dimension] = 0.0
            projection.weight[dimension, dimension] = FIRING / width
        written = -default
        written[dimension] -= EMBEDDING
        written[dimension + 1] += 2 * EMBEDDING
        first.mlp.down_proj.weight[:, dimension] = written / FIRING**2
    return model
