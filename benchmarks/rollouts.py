"""Speed of rollouts alone, with no training beside them: policy tokens per second of engines and executor.

Loads on the quickstart's prompts, each `--batches` batches of `--rollouts` rollouts: without the tool (N = 0) and with
it (N = `rollout.env_iterations`), one batch after the other, as a synchronous run rolls out; and with it, without the
wait for each batch's last rollout ("steady": `--rollouts` in flight throughout). "Per generating second" leaves out the
tool's share of the time that rollouts spent. Only tokens that the policy sampled are counted. The policy decides how
long its responses are and how often it calls the tool, so a trained one (`model.path=runs/quickstart/policy`) is the
realistic case.

    python benchmarks/rollouts.py [--json FILE] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.observability.progress import Progress
from megatron_ztrl.rollout.statistics import model_tokens
from megatron_ztrl.rollout.trajectory import Sampling
from megatron_ztrl.runtime.system import RolloutSystem, launch_rollouts
from megatron_ztrl.types import Prompt, Rollout

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "config.yaml"
Load = Callable[[Sequence[Prompt]], Awaitable[dict[str, float]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=128, help="in flight at once, and in a batch")
    parser.add_argument("--batches", type=int, default=8, help="per load, after one that is not counted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        in_flight = f"engine.max_running_requests={options.rollouts}"
        config = load_config(CONFIG, [f"run.directory={directory}", in_flight, *options.overrides])
        figures = asyncio.run(measure(config, options.rollouts, options.batches))
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


async def measure(config: Config, rollouts: int, batches: int) -> dict[str, dict[str, float]]:
    """Runs the loads one after the other. Returns the figures by load."""
    tokenizer = PolicyTokenizer(Path(config.model.path))
    template = get_template(config.data.prompt_template)
    source = PromptSource(
        load_prompts(config.data.train, template.render),
        seed=config.run.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        tokenize=tokenizer.encode,
    )
    figures = {}
    with Progress(3) as progress:
        async with launch_rollouts(config, Path(config.run.directory), tokenizer, progress) as system:
            for name, load in _loads(system).items():
                progress.phase(name)
                await load(list(islice(source, rollouts)))  # not counted
                prompts = [list(islice(source, rollouts)) for _ in range(batches)]
                figures[name] = await _timed(load, prompts)
            figures[f"{name}, steady"] = await _timed(load, [list(chain(*prompts))])
    return figures


def _loads(system: RolloutSystem) -> dict[str, Load]:
    rollout = system.config.rollout
    runner = system.group_runner(
        Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
        )
    )

    def load(env_iterations: int) -> Load:
        async def run(prompts: Sequence[Prompt]) -> dict[str, float]:
            groups = await asyncio.gather(
                *(
                    runner.run(index, prompt, group_size=1, env_iterations=env_iterations)
                    for index, prompt in enumerate(prompts)
                )
            )
            return _spent([group.rollouts[0] for group in groups])

        return run

    return {f"N = {env_iterations}": load(env_iterations) for env_iterations in (0, rollout.env_iterations)}


def _spent(rollouts: Sequence[Rollout]) -> dict[str, float]:
    return {
        "tokens": model_tokens(rollouts),
        "calls": sum(turn.result is not None for rollout in rollouts for turn in rollout.turns),
        "generate_seconds": sum(rollout.generate_seconds for rollout in rollouts),
        "tool_seconds": sum(rollout.tool_seconds for rollout in rollouts),
    }


async def _timed(load: Load, batches: Sequence[Sequence[Prompt]]) -> dict[str, float]:
    """Totals of ``batches``: rates, and the tool's share of the time that rollouts spent."""
    started = time.monotonic()
    spent = [await load(batch) for batch in batches]
    seconds = time.monotonic() - started
    total = {key: sum(batch[key] for batch in spent) for key in spent[0]}
    rollouts = sum(map(len, batches))
    tool_share = total["tool_seconds"] / (total["tool_seconds"] + total["generate_seconds"])
    return {
        "tokens_per_rollout": total["tokens"] / rollouts,
        "calls_per_rollout": total["calls"] / rollouts,
        "rollouts_per_second": rollouts / seconds,
        "tokens_per_second": total["tokens"] / seconds,
        "tool_share": tool_share,
        "tokens_per_generating_second": total["tokens"] / (seconds * (1 - tool_share)),
    }


def print_table(figures: dict[str, dict[str, float]]) -> None:
    table = Table("figure", *figures)
    for key in next(iter(figures.values())):
        values = [row[key] for row in figures.values()]
        table.add_row(key, *(f"{value:.1%}" if key == "tool_share" else f"{value:,.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
