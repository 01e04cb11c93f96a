"""Rollouts on the real engine while every publish brings other weights: is every token accounted for and exact?

Rollouts of a policy that calls the tool all the time (``_calling_policy``) run in the real engine and sandbox.
Meanwhile a trainer that only sends publishes one version after the other (all weights changed a little, drawn from
the version's number), at random moments: at any time, while snippets run, right before a request is sent, and at
once after the publish before. Then

- every token that the server returned must be in a rollout once, or be one that was sampled past the end of a
  code block;
- masks and versions must be right: the server's, never falling, each published at the time;
- every log-prob must be the one that Hugging Face's implementation computes under the token's own version.

Strategies run one after the other, each on a server of its own. The exit code is 1 if an exact one is not exact.
Log-probs of about 1 token in 20 are also computed under the version after its own: that gap is what a wrong
version, or KV of old weights, would show as.

    python benchmarks/interruption.py [--interrupts 1000] [--strategy retract abort in_place] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _calling_policy import save_calling_policy
from _exactness import check_logprobs, check_record
from _interrupted_rollouts import STATES, Record, interrupt_rollouts
from _sending_trainer import Policies, SendingTrainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ztrl_sandbox.client import ExecutorClient
from ztrl_sandbox.process import ExecutorServer

from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.prompts import load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.engines.server import EngineServer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.rollout.statistics import model_tokens

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "quickstart" / "config.yaml"
STRATEGIES = ("retract", "abort", "in_place")
EXACT = ("retract", "abort")
PROMPTS = 64
ROLLOUTS = ("rollout.env_iterations=4", "rollout.max_response_tokens=160")
CONSOLE = Console(stderr=True)
NOISE = 0.03
"""Relative, between versions."""


def main() -> int:
    options = _parse()
    figures = {strategy: _run(strategy, options) for strategy in options.strategy}
    _print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    inexact = [name for name, row in figures.items() if name in EXACT and not row["exact"]]
    if inexact:
        print(f"not exact: {', '.join(inexact)}")
    return 1 if inexact else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interrupts", type=int, default=1000, help="publishes while rollouts are in flight")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(EXACT))
    parser.add_argument("--in-flight", type=int, default=48, help="rollouts at once")
    parser.add_argument(
        "--running", type=int, default=32, help="requests that the server runs; the rest wait in it"
    )
    parser.add_argument(
        "--mean-interval-seconds", type=float, default=0.1, help="of the publishes at any time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def _run(strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    """One strategy: roll out, then check."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model_path = Path(directory) / "model"
        policies = Policies(save_calling_policy(model_path), NOISE)
        tokenizer = PolicyTokenizer(model_path)
        config = load_config(
            CONFIG,
            [
                f"run.directory={directory}",
                f"model.path={model_path}",
                f"engine.max_running_requests={options.running}",
                f"publish.interruption={strategy}",
                "publish.verify_interval_steps=10",
                *ROLLOUTS,
            ],
        )
        record = asyncio.run(_interrupted(config, policies, tokenizer, options))
    CONSOLE.print(f"{strategy}: computing {model_tokens(record.rollouts)} log-probs again")
    return _figures(record, policies, tokenizer, config.rollout.temperature)


async def _interrupted(
    config: Config, policies: Policies, tokenizer: PolicyTokenizer, options: argparse.Namespace
) -> Record:
    server = EngineServer(config, log_path=Path(config.run.directory) / "engine.log")
    server.start()
    try:
        await asyncio.to_thread(server.wait_healthy)
        async with (
            ExecutorServer(workers=config.sandbox.workers, preload=config.sandbox.preload) as executor,
            ExecutorClient(executor.url) as sandbox,
        ):
            return await interrupt_rollouts(
                config,
                server.url,
                sandbox,
                tokenizer,
                SendingTrainer(policies),
                load_prompts(config.data.train, get_template(config.data.prompt_template).render)[:PROMPTS],
                interrupts=track(range(options.interrupts), config.publish.interruption, console=CONSOLE),
                in_flight=options.in_flight,
                mean_interval_seconds=options.mean_interval_seconds,
                seed=options.seed,
            )
    finally:
        server.stop()


def _figures(
    record: Record, policies: Policies, tokenizer: PolicyTokenizer, temperature: float
) -> dict[str, Any]:
    found = check_record(record, tokenizer)
    gaps = check_logprobs(record.rollouts, policies, temperature)
    publishes = record.publishes[1:]  # the first one met no rollouts
    pauses = sorted(publish.pause_seconds for publish in publishes)
    tokens = model_tokens(record.rollouts)
    hit, meanwhile = Counter[str](), Counter[str]()
    for publish in publishes:
        hit.update(publish.hit)
        meanwhile.update(publish.meanwhile)
    return {
        "interrupts": len(publishes),
        "rollouts": len(record.rollouts),
        "model tokens": tokens,
        "tool calls": sum(rollout.executed_calls for rollout in record.rollouts),
        "rollouts with > 1 version": sum(spans > 1 for spans in found.spans),
        "rollouts with > 2 versions": sum(spans > 2 for spans in found.spans),
        "most versions in a rollout": max(found.spans),
        **{f"rollouts hit {state}": hit[state] for state in STATES},
        **{f"interrupts that hit one {state}": sum(p.hit[state] > 0 for p in publishes) for state in STATES},
        "rollouts begun during a publish": meanwhile["rollout began"],
        "requests sent during a publish": meanwhile["request began"],
        "tool calls ended during a publish": meanwhile["tool call ended"],
        "tokens cut past a block": found.cut,
        "tokens lost": found.lost,
        "tokens duplicated": found.duplicated,
        "wrong tokens": found.wrong_tokens,
        "wrong masks": found.wrong_masks,
        "wrong versions": found.wrong_versions,
        "max log-prob gap": gaps.largest,
        "log-probs off by > 1e-4": gaps.over_limit,
        "median gap to the next version": gaps.neighbour_median,
        "told apart from the next version": gaps.neighbour_told_apart,
        "calls aborted": sum(call.finish == "abort" for call in record.calls),
        "recomputed by the server": sum(call.retractions for call in record.calls),
        "tokens/s": tokens / record.seconds,
        "pause mean, s": statistics.fmean(pauses),
        "pause p99, s": pauses[int(0.99 * (len(pauses) - 1))],
        "seconds": record.seconds,
        "exact": found.exact and gaps.over_limit == 0,
    }


def _print_table(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("figure", *figures)
    for key in next(iter(figures.values())):
        values = [row[key] for row in figures.values()]
        table.add_row(key, *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
