"""Which checkpoints are trained under which layouts: the launches of the tests, and of ``make parity``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from random_policies import CHECKPOINTS, Role

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20_000}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
ALL_REDUCE = {"use_distributed_optimizer": False}
REVERSED = tuple(reversed(range(12)))
SHUFFLED = (7, 2, 11, 0, 5, 9, 4, 1, 10, 3, 8, 6)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint under one parallel layout."""

    name: str
    checkpoint: str
    tp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int = 1
    cp: int = 1
    sp: bool = False
    tokens: int = 64
    """Budget of a microbatch; the sequences sum to 240."""
    order: tuple[int, ...] | None = None
    """In which the samples are packed."""
    dtype: str = "float32"
    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    like: str | None = None
    """A case on one rank, earlier in the launches, whose gradients these must be."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def role(self) -> Role:
        return CHECKPOINTS[self.checkpoint].role


TWO_RANK_CASES = [
    Case(name="one-rank", checkpoint="qwen2"),
    Case(name="one-rank-one-microbatch", checkpoint="qwen2", tokens=1000, like="one-rank"),
    Case(name="one-rank-recompute", checkpoint="qwen2", transformer=FULL_RECOMPUTE),
    Case(name="tp2", checkpoint="qwen2", tp=2),
    Case(name="tp2-sp", checkpoint="qwen2", tp=2, sp=True),
    Case(name="pp2", checkpoint="qwen2", pp=2),
    Case(name="pp2-interleaved", checkpoint="qwen2", pp=2, vp=2),
    Case(name="dp2", checkpoint="qwen2", dp=2, like="one-rank"),
    Case(name="dp2-shuffled", checkpoint="qwen2", dp=2, tokens=100, order=SHUFFLED, like="one-rank"),
    Case(name="dp2-overlap", checkpoint="qwen2", dp=2, ddp=OVERLAP, like="one-rank"),
    Case(name="tied-tp2-sp", checkpoint="qwen2-tied", tp=2, sp=True),
    Case(name="tied-pp2", checkpoint="qwen2-tied", pp=2),
    Case(name="tied-dp2", checkpoint="qwen2-tied", dp=2),
    Case(name="cp2", checkpoint="qwen2", cp=2),
    Case(name="weighted-tp2-sp", checkpoint="qwen2-weighted", tp=2, sp=True),
    Case(name="llama-tied-pp2", checkpoint="llama-tied", pp=2),
    Case(name="qwen3-tied-tp2-sp", checkpoint="qwen3-tied", tp=2, sp=True),
]
FOUR_RANK_CASES = [
    Case(name="tp2-pp2", checkpoint="qwen2", tp=2, pp=2),
    Case(name="tp2-sp-pp2-tied", checkpoint="qwen2-tied", tp=2, pp=2, sp=True),
    Case(name="tp2-sp-dp2", checkpoint="qwen2", tp=2, dp=2, sp=True),
    Case(name="dp4", checkpoint="qwen2", dp=4, like="one-rank"),
    Case(name="llama-tied-pp2-dp2", checkpoint="llama-tied", pp=2, dp=2),
    Case(name="tp2-sp-cp2", checkpoint="qwen3-tied", tp=2, sp=True, cp=2),
    Case(name="cp2-pp2-interleaved", checkpoint="qwen2-tied", cp=2, pp=2, vp=2),
]
TWO_RANK_CRITICS = [
    Case(name="critic", checkpoint="qwen2-critic"),
    Case(name="critic-tp2-sp", checkpoint="qwen2-critic", tp=2, sp=True),
    Case(name="critic-pp2", checkpoint="qwen3-critic", pp=2),
    Case(name="critic-dp2-overlap", checkpoint="qwen3-critic", dp=2, ddp=OVERLAP),
    Case(name="critic-new-tp2", checkpoint="new-critic", tp=2),
    Case(name="critic-cp2", checkpoint="qwen2-critic", cp=2),
]
FOUR_RANK_CRITICS = [
    Case(name="critic-tp2-sp-pp2-interleaved", checkpoint="qwen2-critic", tp=2, sp=True, pp=2, vp=2),
]  # fmt: skip
BFLOAT16_CASES = [
    Case(name="bfloat16-tp2-sp", checkpoint="qwen2-tied", tp=2, sp=True, dtype="bfloat16"),
    Case(name="bfloat16-dp2-overlap", checkpoint="qwen2", dp=2, ddp=OVERLAP, dtype="bfloat16"),
    Case(name="bfloat16-critic-pp2", checkpoint="qwen3-critic", pp=2, dtype="bfloat16"),
]

TWO_RANK_CASES_OF_THE_TABLE = [
    Case(name="one-rank-reversed", checkpoint="qwen2", order=REVERSED, like="one-rank"),
    Case(name="tp2-sp-recompute", checkpoint="qwen2", tp=2, sp=True, transformer=SELECTIVE_RECOMPUTE),
    Case(name="dp2-all-reduce", checkpoint="qwen2", dp=2, ddp=ALL_REDUCE, like="one-rank"),
    Case(name="llama-tp2", checkpoint="llama", tp=2),
    Case(name="qwen3-tied-pp2", checkpoint="qwen3-tied", pp=2),
    Case(name="critic-llama-tp2", checkpoint="llama-critic", tp=2),
]
"""In ``make parity`` only, which has more time than ``make test``."""

EIGHT_RANK_CASES = [
    Case(name="tp2-pp2-dp2", checkpoint="qwen2", tp=2, pp=2, dp=2, ddp=OVERLAP),
    Case(name="tp2-sp-pp2-interleaved-dp2", checkpoint="qwen2-tied", tp=2, sp=True, pp=2, vp=2, dp=2,
         ddp=OVERLAP),
    Case(name="tp2-sp-pp4", checkpoint="qwen3-deep-tied", tp=2, sp=True, pp=4, transformer=FULL_RECOMPUTE),
    Case(name="tp4-sp-dp2", checkpoint="qwen3-deep-tied", tp=4, sp=True, dp=2),
    Case(name="pp4-interleaved-dp2", checkpoint="qwen2-deep", pp=4, vp=2, dp=2),
    Case(name="pp8", checkpoint="qwen2-deep", pp=8),
    Case(name="dp8-shuffled", checkpoint="llama", dp=8, order=SHUFFLED, ddp=OVERLAP),
    Case(name="tp2-sp-pp2-interleaved-dp2-recompute", checkpoint="qwen3-deep-tied", tp=2, sp=True, pp=2,
         vp=2, dp=2, transformer=SELECTIVE_RECOMPUTE),
    Case(name="tp2-sp-cp2-dp2", checkpoint="qwen2", tp=2, sp=True, cp=2, dp=2, ddp=OVERLAP),
    Case(name="cp4-pp2", checkpoint="llama-tied", cp=4, pp=2, transformer=FULL_RECOMPUTE),
    Case(name="critic-tp2-sp-pp2-dp2", checkpoint="qwen2-critic", tp=2, sp=True, pp=2, dp=2, ddp=OVERLAP),
]  # fmt: skip
