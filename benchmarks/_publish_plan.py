"""The publish of a 32B policy, planned by the real planner and simulated bucket by bucket."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.schema import PublishConfig
from megatron_ztrl.engines.parameters import engine_slices
from megatron_ztrl.engines.weight_stream import Bucket, schedule
from megatron_ztrl.weights.hf_mapping import (
    Architecture,
    ParallelLayout,
    hf_tensor_shapes,
    megatron_slices,
)
from megatron_ztrl.weights.reshard import PublishPlan, plan

QWEN_32B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 27_648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152_064,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
LAYOUT = ParallelLayout(tensor_size=8, pipeline_size=4, data_size=2)
ENGINES, ENGINE_RANKS = 8, 4
DTYPE, ITEM_BYTES = "bfloat16", 2
NIC_BYTES_PER_SECOND = 50e9
"""400 Gb/s, in each direction; every GPU has its own."""
MOST_PLANNING_SECONDS = 5.0
SPREADS = {
    "trainer_to_engine_link_bytes": "each link from trainer to engine",
    "engine_to_engine_link_bytes": "each link from engine to engine",
    "trainer_rank_sends_bytes": "each trainer rank sends",
    "engine_rank_receives_bytes": "each engine rank receives",
    "engine_rank_sends_bytes": "each engine rank that has a successor sends",
}


def plan_32b() -> dict[str, Any]:
    """Plan, simulate, print."""
    began = time.perf_counter()
    architecture = Architecture.from_hf_config(QWEN_32B)
    shapes = hf_tensor_shapes(architecture)
    senders = [megatron_slices(architecture, LAYOUT, rank, backend="te") for rank in range(LAYOUT.world_size)]
    engine_ranks = [engine_slices(QWEN_32B, ENGINE_RANKS, rank) for rank in range(ENGINE_RANKS)]
    published = plan(senders, engine_ranks, ENGINES, shapes)
    dtypes = dict.fromkeys(shapes, DTYPE)
    published.sender_links(dtypes), published.receiver_links(dtypes)  # what is sent to the ranks
    planning_seconds = time.perf_counter() - began
    links = {pair: ITEM_BYTES * elements for pair, elements in published.link_elements().items()}
    sent, received = Counter[int](), Counter[int]()
    for (source, to), num_bytes in links.items():
        sent[source] += num_bytes
        received[to] += num_bytes
    seconds = simulate(published, PublishConfig.bucket_bytes)
    busiest = max([*sent.values(), *received.values()])
    row: dict[str, Any] = {
        "planning_seconds": planning_seconds,
        "chains": published.chains,
        "links": len(links),
        "trainer_to_engine_link_bytes": spread(
            [num_bytes for (source, _), num_bytes in links.items() if source < len(senders)]
        ),
        "engine_to_engine_link_bytes": spread(
            [num_bytes for (source, _), num_bytes in links.items() if source >= len(senders)]
        ),
        "trainer_rank_sends_bytes": spread([sent[rank] for rank in range(len(senders))]),
        "engine_rank_receives_bytes": spread([received[rank] for rank in received]),
        "engine_rank_sends_bytes": spread(
            [num_bytes for rank, num_bytes in sent.items() if rank >= len(senders)]
        ),
        "busiest_card_seconds": busiest / NIC_BYTES_PER_SECOND,
        "simulated_seconds": seconds,
        "met": planning_seconds <= MOST_PLANNING_SECONDS,
    }
    print_plan(row)
    return {"plan-32b": row}


def spread(values: list[int]) -> dict[str, float]:
    return {"least": min(values), "mean": statistics.fmean(values), "most": max(values)}


def simulate(published: PublishPlan, bucket_bytes: int) -> float:
    """Seconds until the last bucket has arrived, if each card sends, and receives, one bucket at a time at its rate.

    Every rank handles its buckets in the agreed order with two buffers, as the real ones do: a buffer is free
    again when what it held has been written and sent on. Copies and latencies are not counted.
    """
    out_free, in_free = Counter[int](), Counter[int]()
    buffers: dict[int, list[float]] = {rank: [0.0, 0.0] for rank in range(published.world_size)}
    handled = Counter[int]()
    ended = 0.0
    for path, bucket in _buckets(published, bucket_bytes):
        ready = buffers[path[0]][handled[path[0]] % 2]
        for source, to in pairwise(path):
            start = max(ready, out_free[source], in_free[to], buffers[to][handled[to] % 2])
            ready = out_free[source] = in_free[to] = start + bucket.num_bytes / NIC_BYTES_PER_SECOND
            buffers[source][handled[source] % 2] = ready
            handled[source] += 1
        buffers[path[-1]][handled[path[-1]] % 2] = ready
        handled[path[-1]] += 1
        ended = max(ended, ready)
    return ended


def _buckets(published: PublishPlan, bucket_bytes: int) -> list[tuple[list[int], Bucket]]:
    """All buckets in the agreed order, each with the ranks that it goes through."""
    dtypes = {item.tensor: DTYPE for item in published.transfers}
    sent = published.sender_links(dtypes)
    heads = {link.order: (sender, link) for sender, links in enumerate(sent) for link in links}
    paths = {order: [sender, link.peer] for order, (sender, link) in heads.items()}
    onward = {
        (published.group_rank(engine, rank), link.order): link.forward_to
        for engine, ranks in enumerate(published.receiver_links(dtypes))
        for rank, links in enumerate(ranks)
        for link in links
    }
    for order, path in paths.items():
        while (following := onward[path[-1], order]) is not None:
            path.append(following)
    all_links = [link for _, link in heads.values()]
    return [(paths[bucket.link.order], bucket) for bucket in schedule(all_links, bucket_bytes)]


def print_plan(row: dict[str, Any]) -> None:
    table = Table(
        "", "", title="Qwen2.5-32B, TP 8 x PP 4 x DP 2 -> 8 engines of TP 4, bfloat16", title_justify="left"
    )
    table.add_row("planned in", f"{row['planning_seconds']:.2f} s (target <= {MOST_PLANNING_SECONDS:.0f})")
    table.add_row("engines in chains", " and ".join(" -> ".join(map(str, chain)) for chain in row["chains"]))
    for name, title in SPREADS.items():
        values = row[name]
        table.add_row(
            title,
            f"{values['least'] / 1e9:.3f} .. {values['most'] / 1e9:.3f} GB, mean {values['mean'] / 1e9:.3f}",
        )
    table.add_row("busiest card, at 400 Gb/s", f"{row['busiest_card_seconds']:.3f} s")
    table.add_row("simulated, bucket by bucket", f"{row['simulated_seconds']:.3f} s")
    Console().print(table)
