"""Publishing on the CPU: from each trainer shard to each engine shard, over gloo, into real SGLang servers.

A random Qwen2 of 100M parameters in float32, in two layouts: trainer TP 2 x PP 2 into two engines, the second of
which the first feeds, and trainer TP 2 into one engine of TP 2. The trainer's ranks are processes that hold a
Megatron rank's shards and run its end of the publish (`_publish_ranks.py`). For each layout, repeated and the median
taken:

* bytes that each engine rank received, against what it holds;
* seconds of the whole transfer, HTTP calls, checksums and commit included, against plain sends of the same bytes over
  the same links between as many connected processes (gloo, one message per link, all at once), and against the
  broadcast and disk transports;
* of these, seconds of the stream, from the moment when all ranks are ready to the last checksum;
* what the checksums cost;
* the most memory that a rank had beyond what it had before a publish, in buckets: VmHWM of every process, in the first
  publish, with all that it loads and connects, and in the later ones.

The weights alternate between two checkpoints, and every publish compares a canary's log-probs with transformers'.
With --plan-32b instead: Qwen2.5-32B, TP 8 x PP 4 x DP 2 into eight engines of TP 4: seconds of planning, bytes per
link, and the transfer simulated bucket by bucket on network cards of 400 Gb/s. No weights are made.

    python benchmarks/publish.py [--small] [--repeats N] [--json FILE]
    python benchmarks/publish.py --plan-32b [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from _publish_plan import plan_32b
from _publish_ranks import Peak, ShardWorld, bare_seconds, engine_rank_bytes
from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    EngineConfig,
    ModelConfig,
    PublishConfig,
    RunConfig,
    SGLangConfig,
    TrainConfig,
)
from megatron_ztrl.engines.client import EngineClient
from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.weights.hf_mapping import Architecture, ParallelLayout, hf_tensor_shapes
from megatron_ztrl.weights.publish import PublishReport, WeightPublisher
from megatron_ztrl.weights.reshard import plan
from megatron_ztrl.weights.verify import canary_tokens

SIZES = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 50_304},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8_192},
}
CASES = {
    "TP 2 x PP 2 -> two engines": (ParallelLayout(tensor_size=2, pipeline_size=2), 2, 1),
    "TP 2 -> one engine of TP 2": (ParallelLayout(tensor_size=2), 1, 2),
}
"""Trainer's layout, engines, tensor-parallel size of each."""
ITEM_BYTES = 4
TARGETS = {"of_bare": 0.7, "times_broadcast": 1.5, "times_disk": 4.0}
MOST_BUCKETS = 2.1
"""Two, and a tenth for everything else that a process does meanwhile."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="5M parameters, to try it out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bucket-mib", type=float, default=PublishConfig.bucket_bytes / 2**20)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="only this one")
    parser.add_argument("--plan-32b", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = plan_32b() if options.plan_32b else asyncio.run(measure(options))
    if not options.plan_32b:
        print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(row["met"] for row in figures.values()) else 1


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    names = list(CASES) if options.case is None else [list(CASES)[options.case]]
    with tempfile.TemporaryDirectory(prefix="ztrl-publish-") as directory:
        root = Path(directory)
        canaries = {
            path: make_checkpoint(path, SIZES["small" if options.small else "100M"], seed)
            for seed, path in enumerate([root / "even", root / "odd"])
        }
        gc.collect()
        return {name: await Case(name, root, canaries, options).run() for name in names}


def make_checkpoint(path: Path, size: dict[str, int], seed: int) -> list[float]:
    """Write random weights. Returns the canary's log-probs under them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        **size,
        num_attention_heads=size["hidden_size"] // 64,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).float().eval()
    model.save_pretrained(path)
    tokens = canary_tokens(size["vocab_size"])
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return [logprobs[index, token].item() for index, token in enumerate(tokens[1:])]


class Case:
    """One layout, with its trainer and its engines."""

    def __init__(
        self, name: str, root: Path, canaries: dict[Path, list[float]], options: argparse.Namespace
    ) -> None:
        self._layout, count, size = CASES[name]
        self._checkpoints = list(canaries)
        self._canaries = canaries
        self._options = options
        self._version = 0
        self._config = Config(
            run=RunConfig(directory=str(root / "run")),
            model=ModelConfig(path=str(self._checkpoints[0]), dtype="float32"),
            data=DataConfig(train=DatasetConfig(name="none", path="none")),
            train=TrainConfig(num_steps=1),
            engine=EngineConfig(count=count, tensor_parallel_size=size, max_running_requests=4),
            sglang=SGLangConfig(server_args={"skip_tokenizer_init": True, "max_total_tokens": 2048}),
            publish=PublishConfig(bucket_bytes=int(options.bucket_mib * 2**20)),
        )

    async def run(self) -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            world = ShardWorld(self._checkpoints[0], self._layout, self._canaries)
            stack.callback(world.close)
            servers = await self._start(stack)
            clients = [EngineClient(server.url, request_timeout_seconds=600) for server in servers]
            for client in clients:
                stack.push_async_callback(client.close)
            pids = [process.pid for process in world.ranks] + [
                pid for server in servers for pid in schedulers(server)
            ]
            shards, peaks = await self._publishes(world, clients, pids)
            bare = await bare_seconds(world, await self._links(world), self._options.repeats)
            unchecked, _ = await self._publishes(world, clients, checksums=False)
            broadcast, _ = await self._publishes(world, clients, transport="broadcast")
            disk, _ = await self._publishes(world, clients, transport="disk")
        return self._figures(bare, shards, peaks, unchecked, broadcast, disk)

    async def _start(self, stack: AsyncExitStack) -> list[EngineServer]:
        servers = []
        for index in range(self._config.engine.count):
            log_path = Path(self._config.run.directory) / f"engine{index}.log"
            server = EngineServer(self._config, log_path=log_path, index=index)
            server.start()
            stack.callback(server.stop)
            servers.append(server)
        for server in servers:
            server.wait_healthy()
        return servers

    async def _links(self, world: ShardWorld) -> dict[tuple[int, int], int]:
        slices, shapes = self._engine_slices()
        published = plan(await world.parameter_slices(), slices, self._config.engine.count, shapes)
        return {pair: ITEM_BYTES * elements for pair, elements in published.link_elements().items()}

    def _engine_slices(self) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
        hf_config = json.loads((self._checkpoints[0] / "config.json").read_text())
        size = self._config.engine.tensor_parallel_size
        slices = [engine_slices(hf_config, size, rank) for rank in range(size)]
        return slices, hf_tensor_shapes(Architecture.from_hf_config(hf_config))

    async def _publishes(
        self, world: ShardWorld, clients: Sequence[EngineClient], pids: Sequence[int] = (), **publish: Any
    ) -> tuple[list[PublishReport], list[list[int]]]:
        """Publish again and again.

        Returns:
            The reports, except that of the first time, when everybody meets; and the peak of each process in bytes,
            for every publish.
        """
        config = replace(self._config, publish=replace(self._config.publish, **publish))
        publisher = WeightPublisher(config, world, clients)
        reports, used = [], []
        for _ in range(1 + self._options.repeats):
            self._version += 1
            await world.hold(self._checkpoints[self._version % 2])
            peaks = [Peak(pid) for pid in pids]
            report = await publisher.deliver(self._version)
            used.append([peak.num_bytes() for peak in peaks])  # without the canary's forward pass
            reports.append(await publisher.verify(report))
        await publisher.close()
        return reports[1:], used

    def _figures(
        self,
        bare: list[float],
        shards: list[PublishReport],
        peaks: list[list[int]],
        unchecked: list[PublishReport],
        broadcast: list[PublishReport],
        disk: list[PublishReport],
    ) -> dict[str, Any]:
        slices, shapes = self._engine_slices()
        expected = [engine_rank_bytes(rank, shapes, ITEM_BYTES) for rank in slices]
        seconds = {
            "bare": statistics.median(bare),
            **{
                name: statistics.median(report.transfer_seconds for report in reports)
                for name, reports in {
                    "shards": shards,
                    "without_checksums": unchecked,
                    "broadcast": broadcast,
                    "disk": disk,
                }.items()
            },
        }
        bucket_bytes = self._config.publish.bucket_bytes
        exact = all(received == expected for report in shards for received in report.received_bytes.values())
        row: dict[str, Any] = {
            "received_bytes": shards[-1].received_bytes,
            "held_bytes": expected,
            "received_is_held": exact,
            "sent_bytes": list(shards[-1].sent_bytes),
            "seconds": seconds,
            "stream_seconds": statistics.median(report.stream_seconds or 0.0 for report in shards),
            "all_seconds": {
                "stream": [report.stream_seconds for report in shards],
                "bare": bare,
                "shards": [report.transfer_seconds for report in shards],
                "broadcast": [report.transfer_seconds for report in broadcast],
                "disk": [report.transfer_seconds for report in disk],
            },
            "pause_seconds": statistics.median(report.pause_seconds for report in shards),
            "of_bare": seconds["bare"] / seconds["shards"],
            "times_broadcast": seconds["broadcast"] / seconds["shards"],
            "times_disk": seconds["disk"] / seconds["shards"],
            "checksums_cost": seconds["shards"] / seconds["without_checksums"] - 1,
            "first_peak_buckets": [peak / bucket_bytes for peak in peaks[0]],
            "later_peak_buckets": [max(peak) / bucket_bytes for peak in zip(*peaks[1:], strict=True)],
            "largest_logprob_gap": max(r.max_logprob_gap or 0 for r in shards + broadcast + disk),
        }
        row["met"] = (
            exact
            and all(row[name] >= target for name, target in TARGETS.items())
            and max(row["first_peak_buckets"] + row["later_peak_buckets"]) <= MOST_BUCKETS
        )
        return row


def schedulers(server: EngineServer) -> list[int]:
    """The processes that hold the weights."""
    tree = psutil.Process(server.pid).children(recursive=True)
    return [process.pid for process in tree if "scheduler" in " ".join(process.cmdline())]


def print_table(figures: dict[str, Any]) -> None:
    for name, row in figures.items():
        table = Table("", "measured", "target", title=name, title_justify="left")
        held = ", ".join(f"{num_bytes:,}" for num_bytes in row["held_bytes"])
        same = "exactly its shard" if row["received_is_held"] else f"NOT: {row['received_bytes']}"
        table.add_row("bytes received by each engine rank", f"{held}: {same}", "its shard")
        table.add_row(
            "bytes sent by each trainer rank", ", ".join(f"{sent:,}" for sent in row["sent_bytes"]), ""
        )
        for kind, seconds in row["seconds"].items():
            table.add_row(f"{kind.replace('_', ' ')}, median seconds", f"{seconds:.3f}", "")
        table.add_row("of which the stream", f"{row['stream_seconds']:.3f}", "")
        table.add_row(
            "bandwidth of the whole transfer, of bare sends",
            f"{row['of_bare']:.2f}",
            f">= {TARGETS['of_bare']}",
        )
        table.add_row(
            "faster than broadcast", f"{row['times_broadcast']:.1f} x", f">= {TARGETS['times_broadcast']}"
        )
        table.add_row("faster than disk", f"{row['times_disk']:.1f} x", f">= {TARGETS['times_disk']}")
        table.add_row("checksums cost", f"{row['checksums_cost']:.1%}", "")
        for when in ("first", "later"):
            peaks = ", ".join(f"{peak:.2f}" for peak in row[f"{when}_peak_buckets"])
            table.add_row(f"peak memory of each rank, {when} publish, buckets", peaks, "<= 2")
        table.add_row("largest log-prob gap, nats", f"{row['largest_logprob_gap']:.1e}", "")
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
