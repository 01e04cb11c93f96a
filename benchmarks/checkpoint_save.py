"""How long saving a checkpoint keeps an actor from training, and how long the files take.

Data-parallel CPU ranks hold one random Qwen2 in bfloat16 with the distributed optimizer. Each save is timed in two
parts: until training may go on (everything has been copied; what follows happens in a thread), and until every byte
is on the disk and has its checksum.

    python benchmarks/checkpoint_save.py [--data-parallel N] [--layers N] [--saves N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

HIDDEN_SIZE, VOCAB_SIZE = 512, 16384


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-parallel", type=int, default=2, metavar="N", help="ranks (2)")
    parser.add_argument(
        "--layers", type=int, default=8, metavar="N", help="of 512 columns (8: 40M parameters)"
    )
    parser.add_argument("--saves", type=int, default=3, metavar="N", help="the quickest counts (3)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.data_parallel, options.layers, options.saves)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(data_parallel: int, layers: int, saves: int) -> dict[str, Any]:
    """Runs the ranks; returns the figures of the save that blocked them least."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        parameters = save_model(Path(directory), layers)
        multiprocessing.start_processes(
            run_rank, args=(data_parallel, directory, saves), nprocs=data_parallel, start_method="spawn"
        )
        ranks = [json.loads((Path(directory) / f"rank{i}.json").read_text()) for i in range(data_parallel)]
    rows = [
        {
            "blocked_seconds": max(rank[index]["blocked_seconds"] for rank in ranks),
            "total_seconds": max(rank[index]["total_seconds"] for rank in ranks),
            "bytes_by_rank": [rank[index]["bytes"] for rank in ranks],
        }
        for index in range(saves)
    ]
    best = min(rows, key=lambda row: row["blocked_seconds"])
    total_bytes = sum(best["bytes_by_rank"])
    return {
        "parameters": parameters,
        "data_parallel": data_parallel,
        **best,
        "blocked_mb_per_second": total_bytes / best["blocked_seconds"] / 1e6,
        "total_mb_per_second": total_bytes / best["total_seconds"] / 1e6,
    }


def save_model(directory: Path, layers: int) -> int:
    """Writes a random Qwen2; returns how many parameters it has."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=HIDDEN_SIZE * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    ).bfloat16()
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def run_rank(rank: int, data_parallel: int, directory: str, saves: int) -> None:
    """Saves several times, and writes what each took to ``rank<N>.json``."""
    from megatron_ztrl.config.schema import (
        ActorConfig,
        Config,
        DataConfig,
        DatasetConfig,
        ModelConfig,
        RunConfig,
        TrainConfig,
    )
    from megatron_ztrl.trainer.actor import ActorRank

    config = Config(
        run=RunConfig(directory="unused"),
        model=ModelConfig(path=directory, dtype="bfloat16"),
        data=DataConfig(train=DatasetConfig(name="unused", path="unused")),
        train=TrainConfig(num_steps=1),
        actor=ActorConfig(data_parallel_size=data_parallel),
    )
    actor = ActorRank(config, rank, data_parallel, f"file://{directory}/meeting")
    rows = []
    for index in range(saves):
        torch.distributed.barrier()
        started_seconds = time.perf_counter()
        actor.save_checkpoint(Path(directory) / f"checkpoint{index}")
        blocked_seconds = time.perf_counter() - started_seconds
        records = actor.finish_checkpoint()
        total_seconds = time.perf_counter() - started_seconds
        rows.append(
            {
                "blocked_seconds": blocked_seconds,
                "total_seconds": total_seconds,
                "bytes": sum(record.bytes for record in records.values()),
            }
        )
    actor.close()
    (Path(directory) / f"rank{rank}.json").write_text(json.dumps(rows))


def print_table(figures: dict[str, Any]) -> None:
    """One row for each figure."""
    by_rank = ", ".join(f"{count / 1e6:,.0f}" for count in figures["bytes_by_rank"])
    table = Table(box=None, show_header=False)
    for name, value in (
        ("parameters", f"{figures['parameters']:,}"),
        ("data-parallel ranks", figures["data_parallel"]),
        ("training waits", f"{figures['blocked_seconds']:.2f} s"),
        ("on the disk after", f"{figures['total_seconds']:.2f} s"),
        ("MB written by each rank", by_rank),
        ("MB/s until training goes on", f"{figures['blocked_mb_per_second']:,.0f}"),
        ("MB/s until on the disk", f"{figures['total_mb_per_second']:,.0f}"),
    ):
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
