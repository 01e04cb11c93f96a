"""Activation memory: the planner's prediction against the measured peak, on small models on this machine's CPU.

Measured is the peak of live tensor bytes over one training step (forward, loss, backward) of the real Megatron
model, above the weights and gradient buffers that are there before: a dispatch mode counts every storage from the
operator that returns it until it is freed. Kernels' internal workspaces and collectives' buffers are not seen.
With more than one rank each row is the rank that is named.

    python benchmarks/activation_memory.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

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
from megatron_ztrl.trainer.planner.activations import stage_activations
from megatron_ztrl.types import TrainingSample
from megatron_ztrl.weights.hf_mapping import Architecture

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ATTENTION = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
EVEN, UNEVEN = (0.25, 0.25, 0.25, 0.25), (0.45, 0.3, 0.15, 0.1)
"""Lengths of the sequences of a microbatch, as shares of it."""
TRAINED_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model under one layout."""

    name: str
    layers: int = 4
    hidden: int = 256
    vocab: int = 1024
    tied: bool = False
    dtype: str = "bfloat16"
    tokens: int = 1024
    microbatches: int = 1
    lengths: tuple[float, ...] = EVEN
    tp: int = 1
    pp: int = 1
    vp: int = 1
    transformer: dict[str, Any] = field(default_factory=dict)

    def architecture(self) -> Architecture:
        """Qwen2's form."""
        return Architecture.from_hf_config(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "num_hidden_layers": self.layers,
                "hidden_size": self.hidden,
                "intermediate_size": self.hidden * 11 // 4,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "vocab_size": self.vocab,
                "tie_word_embeddings": self.tied,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 4096,
            }
        )

    def config(self) -> Config:
        """A run of it; only the model's part matters."""
        return Config(
            run=RunConfig(directory="unused"),
            model=ModelConfig(path="unused", dtype=self.dtype),  # type: ignore[arg-type]
            data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
            train=TrainConfig(num_steps=1),
            actor=ActorConfig(
                tensor_parallel_size=self.tp,
                pipeline_parallel_size=self.pp,
                virtual_pipeline_size=self.vp,
                sequence_parallel=self.tp > 1,
                max_tokens_per_microbatch=self.tokens,
            ),
            megatron=MegatronConfig(transformer=self.transformer),
        )


CASES = [
    Case(name="float32", dtype="float32"),
    Case(name="bfloat16"),
    Case(name="bfloat16, 4 microbatches", microbatches=4),
    Case(name="sequences of all lengths", lengths=UNEVEN),
    Case(name="more layers", layers=8),
    Case(name="wider", hidden=512, tokens=512),
    Case(name="large vocabulary", vocab=32768),
    Case(name="large vocabulary, tied", vocab=32768, tied=True),
    Case(name="recompute core_attn", transformer=ATTENTION, layers=8),
    Case(name="recompute core_attn, mlp", transformer=MLP, layers=8),
    Case(name="recompute full", transformer=FULL, layers=8),
    Case(name="TP 2, sequence parallel", tp=2),
    Case(name="TP 2, large vocabulary", tp=2, vocab=32768),
    Case(name="PP 2, 4 microbatches", pp=2, microbatches=4),
    Case(name="PP 2 interleaved, 4 microbatches", pp=2, vp=2, microbatches=4),
    Case(name="PP 2, recompute full", pp=2, microbatches=4, transformer=FULL, layers=8),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = measure_all(CASES)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def measure_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every case and stage, in two processes that meet for those that need two."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.start_processes(_run, args=(directory, cases), nprocs=2, start_method="spawn")
        by_rank = [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(2)]
    rows = []
    for case in cases:
        ranks = range(2) if case.pp > 1 else range(1)
        for rank in ranks:
            predicted = stage_activations(
                case.config(),
                case.config().actor,
                case.architecture(),
                "local",
                stage=rank,
                microbatches=case.microbatches,
                trained_share=TRAINED_SHARE,
            )
            rows.append(
                {"case": case.name, "rank": rank}
                | asdict(predicted)
                | {"predicted_bytes": predicted.peak_bytes, "measured_bytes": by_rank[rank][case.name]}
            )
    return rows


def _run(rank: int, directory: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    peaks = {}
    for index, case in enumerate(cases):
        if rank < case.tp * case.pp:
            peaks[case.name] = measure_peak(case, rank, f"file://{directory}/meeting{index}")
    (Path(directory) / f"{rank}.json").write_text(json.dumps(peaks))


def measure_peak(case: Case, rank: int, init_method: str) -> int:
    """Peak bytes above weights and gradient buffers, in the second of two passes."""
    from megatron_ztrl.trainer.cpu_compat import cuda_calls

    cuda_calls.install()
    from megatron_ztrl.trainer import setup
    from megatron_ztrl.trainer.model import build_chunks, wrap_chunks
    from megatron_ztrl.trainer.planner.measure import LiveBytes
    from megatron_ztrl.trainer.step import DeviceMicrobatch, LossSettings, accumulate_gradients
    from megatron_ztrl.trainer.topology import parallel_layout

    config, architecture = case.config(), case.architecture()
    setup.init_distributed(parallel_layout(config.actor), rank, init_method, 0)
    transformer = setup.transformer_config(config, config.actor, architecture, "local")
    chunks = build_chunks(transformer, architecture, "local", case.tokens)
    models = wrap_chunks(chunks, transformer, setup.ddp_config(config))
    buffers = [b for model in models for b in model.buffers]
    for buffer in buffers:
        buffer.param_data.normal_(std=0.02)
    batch = _batch(case)
    microbatches = [DeviceMicrobatch.of(mb, "local", torch.device("cpu")) for mb in batch.microbatches[0]]
    settings = LossSettings(
        vocab_size=case.vocab, temperature=1.0, clip_low=0.2, clip_high=0.2, kl_coefficient=0.0
    )
    live = LiveBytes([tensor for b in buffers for tensor in (b.param_data, b.grad_data)])
    for _ in range(2):
        live.peak_bytes = live.now_bytes
        with live:
            accumulate_gradients(models, microbatches, batch.trained_tokens, settings)
    setup.destroy_distributed()
    return live.peak_bytes


def _batch(case: Case) -> PackedBatch:
    """Full microbatches; the last part of every sequence is trained."""
    random = np.random.default_rng(0)
    lengths = [round(case.tokens * share) for share in case.lengths[:-1]]
    lengths.append(case.tokens - sum(lengths))
    samples = [
        TrainingSample(
            token_ids=random.integers(0, case.vocab, length).tolist(),
            loss_mask=[position >= length * (1 - TRAINED_SHARE) for position in range(length)],
            rollout_logprobs=[0.0] * length,
            weight_versions=[0] * length,
            reward=0.0,
            group_id=0,
        )
        for _ in range(case.microbatches)
        for length in lengths
    ]
    batch = pack(samples, max_tokens_per_microbatch=case.tokens, data_parallel_size=1)
    zeros = [[np.zeros(case.tokens, dtype=np.float32) for _ in rank] for rank in batch.microbatches]
    for name in ("old_logprobs", "advantages"):
        batch = with_per_token(batch, name, zeros)
    return batch


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Activation memory of a training step (MiB)")
    for name in ("case", "rank", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        predicted, measured = row["predicted_bytes"], row["measured_bytes"]
        table.add_row(
            row["case"],
            str(row["rank"]),
            f"{predicted / 2**20:.1f}",
            f"{measured / 2**20:.1f}",
            f"{predicted / measured - 1:+.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
