"""What config.json, HF tensors and a Megatron checkpoint each say of a model, side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ztrl.weights.hf_mapping import VALUE_HEAD, Architecture

Description = dict[str, Any]
"""Values by field name. What a source cannot tell is absent: tensors do not show the rotary embedding's base."""

_BLOCK = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class Field:
    """One property of the model."""

    name: str
    values: dict[str, Any]
    """By source; only those that tell."""

    @property
    def agrees(self) -> bool:
        """Whether all sources say the same."""
        return len(set(self.values.values())) == 1

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{shown(value)} in {src}" for src, value in self.values.items())


def compare(columns: Mapping[str, Description]) -> list[Field]:
    """Every field that any source tells of."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        Field(
            name=name, values={source: column[name] for source, column in columns.items() if name in column}
        )
        for name in names
    ]


def shown(value: Any) -> str:
    """A value as the table prints it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def describe_architecture(architecture: Architecture) -> Description:
    """What a config.json says."""
    a = architecture
    description = {
        "family": a.family,
        "head": a.head,
        "layers": a.num_layers,
        "hidden size": a.hidden_size,
        "feed-forward size": a.ffn_size,
        "query rows": a.num_heads * a.head_size,
        "key rows": a.num_kv_groups * a.head_size,
        "attention heads": a.num_heads,
        "key-value groups": a.num_kv_groups,
        "head size": a.head_size,
        "QKV bias": a.qkv_bias,
        "QK norm": a.qk_norm,
        "norm epsilon": a.norm_epsilon,
        "rope theta": a.rope_theta,
        "rope scaling": a.rope_scaling_factor,
        "max positions": a.max_positions,
        "vocabulary": a.vocab_size,
    }
    if a.head == "language":
        description["tied embeddings"] = a.tied_embeddings
    return description


def describe_hf_tensors(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> Description:
    """What the tensors of an HF checkpoint show."""
    layers = [name for name in shapes if re.fullmatch(r"model\.layers\.\d+\.input_layernorm\.weight", name)]
    attention = "model.layers.0.self_attn."
    description: Description = {
        "head": "value" if f"{VALUE_HEAD}weight" in shapes else "language",
        "layers": len(layers),
        "QKV bias": f"{attention}q_proj.bias" in shapes,
        "QK norm": f"{attention}q_norm.weight" in shapes,
    }
    for field, name, dim in (
        ("hidden size", "model.norm.weight", 0),
        ("feed-forward size", "model.layers.0.mlp.down_proj.weight", 1),
        ("query rows", f"{attention}q_proj.weight", 0),
        ("key rows", f"{attention}k_proj.weight", 0),
        ("head size", f"{attention}q_norm.weight", 0),
        ("vocabulary", "model.embed_tokens.weight", 0),
    ):
        if len(shapes.get(name, ())) > dim:
            description[field] = shapes[name][dim]
    # With tied embeddings an output layer may lie in the file as a second copy of them.
    if description["head"] == "language" and not (
        "lm_head.weight" in shapes and architecture.tied_embeddings
    ):
        description["tied embeddings"] = "lm_head.weight" not in shapes
    return description


def describe_dist_checkpoint(shapes: Mapping[str, tuple[int, ...]]) -> Description:
    """What the global tensors of a Megatron checkpoint show.

    Raises:
        ValueError: they are not those of a language model whose layers are stacked.
    """
    try:
        layers, hidden_size, query_rows = shapes[f"{_BLOCK}self_attention.linear_proj.weight"]
        _, qkv_rows, _ = shapes[f"{_BLOCK}self_attention.linear_qkv.weight"]
        _, _, ffn_size = shapes[f"{_BLOCK}mlp.linear_fc2.weight"]
        rows, _ = shapes["embedding.word_embeddings.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"this checkpoint is not of a dense model with its layers stacked, as Megatron 0.16 saves it ({error})"
        ) from error
    output = shapes.get("output_layer.weight")
    is_critic = output is not None and output[0] == 1
    description: Description = {
        "head": "value" if is_critic else "language",
        "layers": layers,
        "hidden size": hidden_size,
        "feed-forward size": ffn_size,
        "query rows": query_rows,
        "key rows": (qkv_rows - query_rows) // 2,
        "QKV bias": f"{_BLOCK}self_attention.linear_qkv.bias" in shapes,
        "QK norm": f"{_BLOCK}self_attention.q_layernorm.weight" in shapes,
        "padded vocabulary": rows,
    }
    if description["QK norm"]:
        description["head size"] = shapes[f"{_BLOCK}self_attention.q_layernorm.weight"][1]
    if not is_critic:
        description["tied embeddings"] = output is None
    return description
