"""How the parameters of one Megatron rank correspond to Hugging Face tensors: one table for every direction.

The loader, the HF export and the weight publisher all read the list of ``TensorSlice`` that
:func:`megatron_slices` makes. It is arithmetic on shapes: no tensor, no Megatron, no process group, so any
process can work out what any rank holds.

To add a family with the Llama block layout, add a row to ``ARCHITECTURES``. A block that has other
parameters also needs rows in ``LAYER_TABLE``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ztrl.types import TensorSlice

Backend = Literal["te", "local"]
Rule = Literal["whole", "qkv", "gated", "columns"]
Head = Literal["language", "value"]

ARCHITECTURES: dict[str, dict[str, bool]] = {
    "Qwen2": {"qkv_bias": True, "qk_norm": False},
    "Qwen3": {"qkv_bias": False, "qk_norm": True},
    "Llama": {"qkv_bias": False, "qk_norm": False},
}
"""Supported families, and what distinguishes their blocks."""

HEADS: dict[str, Head] = {"ForCausalLM": "language", "ForTokenClassification": "value"}
"""What follows the family in ``architectures[0]`` of config.json."""

VALUE_HEAD = "score."
"""Prefix of the value head's HF tensors."""

LAYER_TABLE: tuple[tuple[str, Rule, tuple[str, ...]], ...] = (
    ("input_layernorm.weight", "whole", ("input_layernorm.weight",)),
    ("self_attention.linear_qkv.weight", "qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    ("self_attention.linear_qkv.bias", "qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    ("self_attention.q_layernorm.weight", "whole", ("self_attn.q_norm.weight",)),
    ("self_attention.k_layernorm.weight", "whole", ("self_attn.k_norm.weight",)),
    ("self_attention.linear_proj.weight", "columns", ("self_attn.o_proj.weight",)),
    ("pre_mlp_layernorm.weight", "whole", ("post_attention_layernorm.weight",)),
    ("mlp.linear_fc1.weight", "gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    ("mlp.linear_fc2.weight", "columns", ("mlp.down_proj.weight",)),
)
"""Parameter of a Megatron layer (local spec), how tensor parallelism cuts it, the HF tensors inside it."""

TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Transformer Engine fuses these norms into the linear layer that follows."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What training needs to know of a checkpoint's config.json."""

    family: str
    head: Head
    """``value`` is one output per position in place of the vocabulary's: a critic."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_groups: int
    head_size: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_epsilon: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Llama 3.1's frequency scaling; None where the checkpoint has plain rotary embeddings."""
    max_positions: int

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Reads the parsed config.json.

        Raises:
            ValueError: the architecture, or an option of it, is not supported.
        """
        name = (config.get("architectures") or ["(none)"])[0]
        known = {
            family + ending: (family, head) for ending, head in HEADS.items() for family in ARCHITECTURES
        }
        if name not in known:
            raise ValueError(
                f"config.json: architecture {name} is not supported; choose one of {list(known)}"
            )
        family, head = known[name]
        for key, supported in (
            ("use_sliding_window", (False, None)),
            ("attention_bias", (False, None)),
            ("mlp_bias", (False, None)),
            ("hidden_act", ("silu",)),
        ):
            if config.get(key, supported[0]) not in supported:
                raise ValueError(f"config.json: {key}={config[key]!r} is not supported by the {name} mapping")
        rope_theta, rope_scaling_factor = _read_rope(config)
        heads = config["num_attention_heads"]
        return cls(
            family=family,
            head=head,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_groups=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_epsilon=config["rms_norm_eps"],
            rope_theta=rope_theta,
            rope_scaling_factor=rope_scaling_factor,
            max_positions=config["max_position_embeddings"],
            **ARCHITECTURES[family],
        )

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rows in Megatron, where every tensor-parallel rank holds equally many."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size


def _read_rope(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Base period, and the scaling factor or None. transformers 5 nests both in ``rope_parameters``."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    # Megatron fixes these three constants of Llama 3.1; another value would give silently wrong positions.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(rope.get(key) != value for key, value in fixed.items()):
        raise ValueError(
            f"config.json: rotary scaling {rope} is not supported; only plain and Llama 3.1 scaling are"
        )
    return theta, float(rope["factor"])


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where one rank stands in the model-parallel grid."""

    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context_rank: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Megatron's grid of ranks; tensor-parallel ranks are adjacent, then context, data and pipeline."""

    tensor_size: int = 1
    pipeline_size: int = 1
    data_size: int = 1
    virtual_size: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_size: int = 1
    """Ranks that share the tokens of every sequence; their weights are alike."""

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.replicas * self.pipeline_size

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, over which the optimizer's state is spread."""
        return self.context_size * self.data_size

    def place(self, rank: int) -> RankPlace:
        """The place of a global rank."""
        rest, tensor_rank = divmod(rank, self.tensor_size)
        rest, context_rank = divmod(rest, self.context_size)
        pipeline_rank, data_rank = divmod(rest, self.data_size)
        return RankPlace(
            tensor_rank=tensor_rank,
            pipeline_rank=pipeline_rank,
            data_rank=data_rank,
            context_rank=context_rank,
        )

    def first_layer(self, num_layers: int, pipeline_rank: int, chunk: int) -> int:
        """Global index of the first layer in a chunk."""
        per_chunk = num_layers // (self.pipeline_size * self.virtual_size)
        return (chunk * self.pipeline_size + pipeline_rank) * per_chunk


@dataclass(frozen=True, kw_only=True)
class LayoutKeys:
    """What the user calls the sizes of a layout."""

    tensor: str
    pipeline: str
    virtual: str


def check_layout(architecture: Architecture, layout: ParallelLayout, keys: LayoutKeys) -> None:
    """Checks that a model can be cut like this.

    Raises:
        ValueError: one line that begins with the key that does not fit.
    """
    for what, size in (
        ("attention heads", architecture.num_heads),
        ("key-value groups", architecture.num_kv_groups),
        ("feed-forward columns", architecture.ffn_size),
    ):
        if size % layout.tensor_size:
            raise ValueError(f"{keys.tensor}: {layout.tensor_size} does not divide the model's {size} {what}")
    stages = layout.pipeline_size * layout.virtual_size
    if architecture.num_layers % stages:
        raise ValueError(
            f"{keys.pipeline}: {stages} pipeline stages (virtual ones included) do not divide the model's"
            f" {architecture.num_layers} layers"
        )
    if layout.virtual_size > 1 and layout.pipeline_size == 1:
        raise ValueError(f"{keys.virtual}: needs {keys.pipeline} > 1")


def megatron_slices(
    architecture: Architecture, layout: ParallelLayout, rank: int, *, backend: Backend
) -> list[TensorSlice]:
    """Everything that one global rank holds, in the order of its parameters.

    ``TensorSlice.param`` is the name in ``named_parameters()`` of the unwrapped model, after ``"<chunk>."``
    when a stage has several chunks. Rows that pad the vocabulary are in no slice.
    """
    place = layout.place(rank)
    slices: list[TensorSlice] = []
    for chunk in range(layout.virtual_size):
        prefix = f"{chunk}." if layout.virtual_size > 1 else ""
        is_first = place.pipeline_rank == 0 and chunk == 0
        is_last = place.pipeline_rank == layout.pipeline_size - 1 and chunk == layout.virtual_size - 1
        if is_first:
            param = f"{prefix}embedding.word_embeddings.weight"
            slices += _vocabulary(param, "model.embed_tokens.weight", architecture, layout, place)
        first_layer = layout.first_layer(architecture.num_layers, place.pipeline_rank, chunk)
        for local in range(architecture.num_layers // (layout.pipeline_size * layout.virtual_size)):
            base = f"{prefix}decoder.layers.{local}."
            slices += _layer(
                base, f"model.layers.{first_layer + local}.", architecture, layout, place, backend
            )
        if is_last:
            norm = f"{prefix}decoder.final_layernorm.weight"
            slices.append(_slice(norm, "model.norm.weight", 0, 0, 0, architecture.hidden_size))
            if architecture.head == "value":
                slices += [
                    _slice(f"{prefix}output_layer.{name}", f"{VALUE_HEAD}{name}", 0, 0, 0, 1)
                    for name in ("weight", "bias")
                ]
            # A stage that holds the embedding as well uses that very parameter as its output layer when tied.
            elif not (architecture.tied_embeddings and is_first):
                tensor = "model.embed_tokens.weight" if architecture.tied_embeddings else "lm_head.weight"
                slices += _vocabulary(f"{prefix}output_layer.weight", tensor, architecture, layout, place)
    return slices


def hf_tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the HF checkpoint, in checkpoint order."""
    a = architecture
    q_rows, kv_rows = a.num_heads * a.head_size, a.num_kv_groups * a.head_size
    block = {
        "input_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (q_rows, a.hidden_size),
        "self_attn.k_proj.weight": (kv_rows, a.hidden_size),
        "self_attn.v_proj.weight": (kv_rows, a.hidden_size),
        "self_attn.q_proj.bias": (q_rows,),
        "self_attn.k_proj.bias": (kv_rows,),
        "self_attn.v_proj.bias": (kv_rows,),
        "self_attn.q_norm.weight": (a.head_size,),
        "self_attn.k_norm.weight": (a.head_size,),
        "self_attn.o_proj.weight": (a.hidden_size, q_rows),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "mlp.gate_proj.weight": (a.ffn_size, a.hidden_size),
        "mlp.up_proj.weight": (a.ffn_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.ffn_size),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        for _, _, tensors in _layer_rows(a):
            shapes.update({f"model.layers.{layer}.{name}": block[name] for name in tensors})
    shapes["model.norm.weight"] = (a.hidden_size,)
    if a.head == "value":
        shapes |= {f"{VALUE_HEAD}weight": (1, a.hidden_size), f"{VALUE_HEAD}bias": (1,)}
    elif not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def _layer_rows(architecture: Architecture) -> Iterator[tuple[str, Rule, tuple[str, ...]]]:
    for row in LAYER_TABLE:
        if row[0].endswith("linear_qkv.bias") and not architecture.qkv_bias:
            continue
        if row[0].endswith(("q_layernorm.weight", "k_layernorm.weight")) and not architecture.qk_norm:
            continue
        yield row


def _layer(
    base: str,
    hf_base: str,
    architecture: Architecture,
    layout: ParallelLayout,
    place: RankPlace,
    backend: Backend,
) -> Iterator[TensorSlice]:
    a, size, rank = architecture, layout.tensor_size, place.tensor_rank
    for row_param, rule, tensors in _layer_rows(a):
        param = base + (TE_NAMES.get(row_param, row_param) if backend == "te" else row_param)
        names = [hf_base + tensor for tensor in tensors]
        if rule == "whole":
            length = a.head_size if "self_attention" in row_param else a.hidden_size
            yield _slice(param, names[0], 0, 0, 0, length)
        elif rule == "columns":
            width = (a.num_heads * a.head_size if "self_attention" in row_param else a.ffn_size) // size
            yield _slice(param, names[0], 1, 0, rank * width, width)
        elif rule == "gated":
            rows = a.ffn_size // size
            for half, name in enumerate(names):
                yield _slice(param, name, 0, half * rows, rank * rows, rows)
        else:
            yield from _fused_qkv(param, names, a, size, rank)


def _fused_qkv(
    param: str, names: list[str], architecture: Architecture, size: int, rank: int
) -> Iterator[TensorSlice]:
    """Megatron interleaves by query group: the group's queries, then its key, then its value."""
    a = architecture
    groups = a.num_kv_groups // size
    rows = (a.num_heads // a.num_kv_groups * a.head_size, a.head_size, a.head_size)
    start = 0
    for group in range(rank * groups, (rank + 1) * groups):
        for name, length in zip(names, rows, strict=True):
            yield _slice(param, name, 0, start, group * length, length)
            start += length


def _vocabulary(
    param: str, tensor: str, architecture: Architecture, layout: ParallelLayout, place: RankPlace
) -> Iterator[TensorSlice]:
    rows = architecture.padded_vocab_size(layout.tensor_size) // layout.tensor_size
    first = place.tensor_rank * rows
    length = min(rows, architecture.vocab_size - first)
    if length > 0:
        yield _slice(param, tensor, 0, 0, first, length)


def _slice(param: str, tensor: str, dim: int, start: int, tensor_start: int, length: int) -> TensorSlice:
    return TensorSlice(
        param=param, tensor=tensor, dim=dim, start=start, tensor_start=tensor_start, length=length
    )
