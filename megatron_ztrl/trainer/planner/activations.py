"""Activation memory of one pipeline stage, from shapes alone.

A layer is a list of the tensors that its backward pass needs. The list for the ``local`` layers is checked against
measured peaks by ``benchmarks/activation_memory.py``; the one for Transformer Engine follows its modules, and
``tests/gpu`` checks it. Under FP8 Transformer Engine keeps some inputs in 8 bits, so this is an upper bound there.

In the formulas: h hidden size, q, k query and key columns, f feed-forward columns, V vocabulary, t tensor-parallel
size, s = t under sequence parallelism and else 1, b bytes of a number, all per token unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ztrl.config.schema import Config, WorldConfig
from megatron_ztrl.trainer.logprobs import MAX_CHUNK_BYTES
from megatron_ztrl.trainer.topology import parallel_layout
from megatron_ztrl.weights.hf_mapping import Architecture, Backend

FLOAT32_BYTES = 4
_HEAD_COPIES = 3
"""Float32 chunks of logits that exist at once: logits, their exponentials, the product for the entropy."""


@dataclass(frozen=True, kw_only=True)
class StageActivations:
    """Of the rank and moment with the most."""

    per_microbatch_bytes: int
    """What the backward pass of one microbatch needs of this stage; of one model chunk when interleaved."""
    in_flight: int
    """Microbatches (or chunks of them) whose backward pass is still to come."""
    head_bytes: int
    """Final norm, the trained rows, the logits of one vocabulary chunk, the gradient of the head's weights."""
    working_bytes: int
    """Gradients of activations and of one weight inside a layer, a recomputed layer, gathered inputs."""
    working: str
    """How ``per_microbatch_bytes`` comes about."""

    @property
    def peak_bytes(self) -> int:
        return self.per_microbatch_bytes * self.in_flight + max(self.head_bytes, self.working_bytes)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The numbers that the formulas are made of."""

    h: int
    q: float
    k: float
    f: float
    vocab: float
    heads: float
    head_size: int
    t: int
    s: int
    b: int
    backend: Backend
    tokens: int

    @classmethod
    def of(cls, config: Config, world: WorldConfig, architecture: Architecture, backend: Backend) -> _Shape:
        a, t = architecture, world.tensor_parallel_size
        return cls(
            h=a.hidden_size,
            q=a.num_heads * a.head_size / t,
            k=a.num_kv_groups * a.head_size / t,
            f=a.ffn_size / t,
            vocab=a.padded_vocab_size(t) / t,
            heads=a.num_heads / t,
            head_size=a.head_size,
            t=t,
            s=t if world.sequence_parallel else 1,
            b=2 if config.model.dtype == "bfloat16" else FLOAT32_BYTES,
            backend=backend,
            tokens=-(-world.max_tokens_per_microbatch // world.context_parallel_size),
        )

    def norm_bytes(self) -> float:
        """Input and output; the local norm keeps its input and the normalised rows in float32."""
        kept = (2 * FLOAT32_BYTES + self.b) if self.backend == "local" else 2 * self.b
        return kept * self.h / self.s

    def attention_bytes(self) -> float:
        """Rotated queries and keys, the fused projection that the values are a view of, the output, the sums.

        Where the attention pads sequences to one length it copies the values, and the projection goes: then this
        is a little more than it takes.
        """
        bytes_ = self.b * (self.kept_inputs() + self.q) + FLOAT32_BYTES * self.heads
        if self.backend == "local":  # the output again, back in packed order; the rotary tables of each layer
            bytes_ += self.b * (self.q + 4 * self.head_size)
        return bytes_

    def kept_inputs(self) -> float:
        """Columns of queries, keys and values, before and after the rotation of the first two."""
        return 2 * self.q + 3 * self.k

    def mlp_bytes(self) -> float:
        """Gate and up, their product; without a fused kernel also the activation and a copy of up."""
        return self.b * self.f * (3 if self.backend == "te" else 5)


def layer_bytes_per_token(shape: _Shape, recomputed: frozenset[str]) -> float:
    """What one layer keeps. ``recomputed`` names modules as ``recompute_modules`` does."""
    norms = 2 * shape.norm_bytes()
    if "layernorm" in recomputed:
        norms -= 2 * shape.b * shape.h / shape.s
    attention = shape.attention_bytes()
    if "core_attn" in recomputed and shape.backend == "local":
        # Kept are its packed inputs, not the padded copies, and the output that the projection reads.
        attention = shape.b * (shape.kept_inputs() + shape.q + 4 * shape.head_size)
    return norms + attention + (0.0 if "mlp" in recomputed else shape.mlp_bytes())


def stage_activations(
    config: Config,
    world: WorldConfig,
    architecture: Architecture,
    backend: Backend,
    *,
    stage: int,
    microbatches: int,
    trained_share: float = 1.0,
) -> StageActivations:
    """Peak of one pipeline stage in a training step.

    Args:
        config: ``model.dtype`` and ``megatron.transformer``'s recompute options.
        world: Layout, and tokens of a microbatch.
        architecture: Of the model; a value head has no vocabulary.
        backend: Whose layers.
        stage: Pipeline rank.
        microbatches: Of a data-parallel replica in one optimizer step.
        trained_share: Part of the tokens whose log-probs are computed; 1 is the worst case.
    """
    shape = _Shape.of(config, world, architecture, backend)
    layout = parallel_layout(world)
    options = config.megatron.transformer
    full = options.get("recompute_granularity") == "full"
    modules: frozenset[str] = frozenset()
    if options.get("recompute_granularity") == "selective":
        modules = frozenset(options.get("recompute_modules") or ["core_attn"])
    layers = architecture.num_layers // (layout.pipeline_size * layout.virtual_size)
    layer = layer_bytes_per_token(shape, modules)
    row = shape.b * shape.h / shape.s
    per_token = layers * layer
    kept = f"{layers} layers × {layer:,.0f} B (norms, attention, MLP)"
    if full:
        group = _recomputed_group(options, layers)
        per_token = layers / group * row
        kept = f"{layers / group:g} layer inputs × {row:,.0f} B (the rest is recomputed)"
    elif layout.pipeline_size > 1:
        per_token += row  # what came from the stage before, or goes to the one after it
    working = _working_bytes(shape)
    if full:
        working += group * layer * shape.tokens
    elif "mlp" in modules:
        working += shape.mlp_bytes() * shape.tokens
    is_last = stage == layout.pipeline_size - 1
    head, held = 0.0, 0.0
    if is_last:
        head, held = _head_bytes(shape, architecture, trained_share)
        if not (architecture.tied_embeddings and stage == 0):
            held = 0.0
    return StageActivations(
        per_microbatch_bytes=round(per_token * shape.tokens),
        in_flight=in_flight_microbatches(
            layout.pipeline_size, layout.virtual_size, stage=stage, microbatches=microbatches
        ),
        head_bytes=round(head),
        working_bytes=round(working + held),
        working=f"{shape.tokens:,} tokens × {kept}",
    )


def in_flight_microbatches(pipeline_size: int, virtual_size: int, *, stage: int, microbatches: int) -> int:
    """Forward passes whose backward pass is still to come, at the most: Megatron's warm-up, and the current one.

    One forward, one backward: a stage runs ahead by the stages behind it (arXiv:2104.04473, section 2.2).
    Interleaved: by twice that, and by a round of the pipeline for every chunk but one.
    """
    behind = pipeline_size - stage - 1
    if virtual_size > 1:
        return min(2 * behind + (virtual_size - 1) * pipeline_size + 1, microbatches * virtual_size)
    return min(behind + 1, microbatches)


def _recomputed_group(options: dict[str, object], layers: int) -> int:
    """Layers between two kept activations (``recompute_method: uniform``)."""
    if options.get("recompute_method") != "uniform":
        raise ValueError(
            "megatron.transformer.recompute_method: the memory planner knows full recomputation with 'uniform' only"
        )
    group = options.get("recompute_num_layers") or 1
    assert isinstance(group, int)
    return min(group, layers)


def _working_bytes(shape: _Shape) -> float:
    """While the gradient goes through the widest part of a layer, its MLP."""
    gradients = shape.tokens * shape.b * (shape.h / shape.s + 2 * shape.f)
    weight = shape.b * shape.h * 2 * shape.f
    gathered = shape.tokens * shape.b * shape.h if shape.s > 1 else 0.0
    return gradients + weight + gathered


def _head_bytes(shape: _Shape, architecture: Architecture, trained_share: float) -> tuple[float, float]:
    """(all of the head, the gradient of its weight alone, which waits for the embedding's when they are tied)."""
    rows = shape.tokens * trained_share
    hidden = shape.tokens * shape.norm_bytes()
    if shape.s > 1:
        hidden += shape.tokens * shape.b * shape.h  # gathered
    if architecture.head == "value":
        return hidden + 2 * rows * shape.b * shape.h, 0.0
    logits = min(rows * shape.vocab * FLOAT32_BYTES, MAX_CHUNK_BYTES)
    weight = shape.b * shape.vocab * shape.h
    forward = _HEAD_COPIES * logits
    backward = logits * (1 + shape.b / FLOAT32_BYTES) + weight + rows * shape.h * (FLOAT32_BYTES + shape.b)
    return hidden + rows * shape.b * shape.h + max(forward, backward), weight
