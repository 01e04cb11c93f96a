"""Which Hugging Face tensors fill the parameters of one SGLang tensor-parallel rank.

SGLang fuses query, key and value into ``qkv_proj`` (all queries of the rank, then its keys, then its values)
and gate and up into ``gate_up_proj``. The vocabulary is padded to a multiple of 64 and then split evenly, so
the last ranks may hold fewer real rows, or none; padding is in no slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_ztrl.types import TensorSlice

ARCHITECTURES: dict[str, dict[str, bool]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
}
"""Supported values of ``architectures[0]`` in config.json, and what distinguishes their blocks."""

VOCABULARY_MULTIPLE = 64
"""``VocabParallelEmbedding`` of SGLang pads to it."""


def engine_slices(hf_config: Mapping[str, Any], tensor_parallel_size: int, rank: int) -> list[TensorSlice]:
    """Describe everything that engine rank ``rank`` holds.

    Args:
        hf_config: the parsed config.json.
        tensor_parallel_size: of the engine.
        rank: tensor-parallel rank.

    Raises:
        ValueError: unsupported architecture, or heads that do not divide among the ranks.
    """
    name = (hf_config.get("architectures") or ["(none)"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"config.json: architecture {name} is not supported; choose one of {list(ARCHITECTURES)}"
        )
    _check_divisible(hf_config, tensor_parallel_size)
    hidden = hf_config["hidden_size"]
    slices = _vocabulary("model.embed_tokens.weight", hf_config["vocab_size"], tensor_parallel_size, rank)
    for layer in range(hf_config["num_hidden_layers"]):
        slices += _layer(f"model.layers.{layer}.", hf_config, ARCHITECTURES[name], tensor_parallel_size, rank)
    slices.append(_whole("model.norm.weight", hidden))
    if not hf_config.get("tie_word_embeddings", False):
        slices += _vocabulary("lm_head.weight", hf_config["vocab_size"], tensor_parallel_size, rank)
    return slices


def _check_divisible(config: Mapping[str, Any], size: int) -> None:
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    if kv_heads % size:
        raise ValueError(
            f"engine.tensor_parallel_size: the {kv_heads} KV heads do not divide among {size} ranks, and"
            f" replicated KV heads are not supported; choose a divisor of {kv_heads} and more engines instead"
        )
    for key in ("num_attention_heads", "intermediate_size"):
        if config[key] % size:
            raise ValueError(
                f"engine.tensor_parallel_size: {key} {config[key]} does not divide among {size} ranks"
            )


def _layer(
    base: str, config: Mapping[str, Any], traits: Mapping[str, bool], size: int, rank: int
) -> Iterator[TensorSlice]:
    hidden, heads, ffn = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // heads
    q_rows = heads * width // size
    kv_rows = (config.get("num_key_value_heads") or heads) * width // size
    ffn_rows = ffn // size

    def stacked(param: str, parts: list[tuple[str, int]]) -> Iterator[TensorSlice]:
        start = 0
        for tensor, rows in parts:
            yield _slice(base + param, base + tensor, 0, start, rank * rows, rows)
            start += rows

    for kind in ("weight", "bias") if traits["qkv_bias"] else ("weight",):
        parts = [(f"self_attn.{x}_proj.{kind}", q_rows if x == "q" else kv_rows) for x in "qkv"]
        yield from stacked(f"self_attn.qkv_proj.{kind}", parts)
    if traits["qk_norm"]:
        yield _whole(base + "self_attn.q_norm.weight", width)
        yield _whole(base + "self_attn.k_norm.weight", width)
    yield from stacked(
        "mlp.gate_up_proj.weight", [(f"mlp.{x}_proj.weight", ffn_rows) for x in ("gate", "up")]
    )
    for name, columns in (("self_attn.o_proj.weight", q_rows), ("mlp.down_proj.weight", ffn_rows)):
        yield _slice(base + name, base + name, 1, 0, rank * columns, columns)
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield _whole(base + name, hidden)


def _vocabulary(name: str, vocab_size: int, size: int, rank: int) -> list[TensorSlice]:
    rows = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // size
    first = rank * rows
    length = min(rows, vocab_size - first)
    return [_slice(name, name, 0, 0, first, length)] if length > 0 else []


def _whole(name: str, length: int) -> TensorSlice:
    return _slice(name, name, 0, 0, 0, length)


def _slice(param: str, tensor: str, dim: int, start: int, tensor_start: int, length: int) -> TensorSlice:
    return TensorSlice(
        param=param, tensor=tensor, dim=dim, start=start, tensor_start=tensor_start, length=length
    )
