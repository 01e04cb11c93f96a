"""Speed of the whole loop beside TRL's GRPOTrainer: completion tokens per second on this machine.

Same policy, prompts (in the same order), group size, completion length and dtype on both sides; one optimizer
step per batch of completions, strictly on-policy, no reference model. A step is everything: generation, reward,
training, and bringing the new weights to where the next step samples. TRL generates with `transformers` in its
own process. It is measured once for each of `--trl-threads`, and its best is what ours is compared with. Ours runs
the quickstart's configuration in the layout that is fastest on two cores (`OUR_LAYOUT`; overrides win).

The quickstart's policy ends its responses after some 15 tokens. By default both sides get a copy of it whose
end-of-sequence token is one that it has no use for, so that every completion has `--completion-tokens` tokens;
`--natural-lengths` compares with the policy as it is.

TRL is not in .venv. An environment for it, which takes torch and transformers from .venv:

    .venv/bin/python -m venv .venv-trl
    .venv-trl/bin/pip install --no-deps -r requirements/trl.txt

    python benchmarks/trl_comparison.py [--json FILE] [--trl-python PATH] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ztrl.cli import main as ztrl
from megatron_ztrl.config.load import load_config
from megatron_ztrl.config.schema import Config
from megatron_ztrl.data.prompts import PromptSource, load_prompts
from megatron_ztrl.data.tokenizer import PolicyTokenizer
from megatron_ztrl.envs.prompt_templates import get_template
from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "quickstart" / "config.yaml"
TRL_PROGRAM = Path(__file__).with_name("_trl_grpo.py")
HOW_TO_INSTALL_TRL = (
    ".venv/bin/python -m venv .venv-trl && .venv-trl/bin/pip install --no-deps -r requirements/trl.txt"
)
OUR_LAYOUT = (
    "actor.tensor_parallel_size=1",
    "actor.data_parallel_size=2",
    "engine.count=2",
    "algorithm.old_logprobs=engine",  # one pass less; TRL saves it too where a step is strictly on-policy
)
NEVER_SAMPLED = "<|never_sampled|>"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One side: means over the steps after the warm-up."""

    side: str
    steps: int
    completion_tokens_per_step: float
    """Tokens that the policy sampled; tool replies are not counted."""
    step_seconds: float
    tokens_per_second: float
    phase_shares: dict[str, float] = field(default_factory=dict)
    """Of the step; ours only."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that do the work; TRL only."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """All sides, measured within a few minutes."""

    theirs: list[Measurement]
    ours: list[Measurement]

    @property
    def best_of_trl(self) -> float | None:
        return max((side.tokens_per_second for side in self.theirs), default=None)


def main() -> int:
    options = _parse()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ztrl-trl-") as scratch:
        overrides, config = _setting(options, Path(scratch))
        rounds = [
            measure_round(options, overrides, config, Path(scratch) / str(n)) for n in range(options.rounds)
        ]
    for number, sides in enumerate(rounds, start=1):
        print_table(console, f"round {number} of {len(rounds)}", sides)
    if len(rounds) > 1:
        print_ratios(console, rounds)
    if not options.trl_python.exists():
        console.print(
            f"TRL was not measured, there is no {options.trl_python}: {HOW_TO_INSTALL_TRL}", soft_wrap=True
        )
    if options.json:
        figures = {
            "setting": overrides,
            "rounds": [
                {"trl": [*map(asdict, sides.theirs)], "megatron_ztrl": [*map(asdict, sides.ours)]}
                for sides in rounds
            ],
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure_round(options: argparse.Namespace, overrides: list[str], config: Config, scratch: Path) -> Round:
    """Every side once, one after the other.

    Raises:
        SystemExit: A run of ours failed; its error has been printed.
    """
    scratch.mkdir()
    console = Console()
    theirs, ours = [], []
    if options.trl_python.exists():
        for threads in options.trl_threads:
            console.rule(f"TRL, OMP_NUM_THREADS={threads}")
            theirs.append(measure_trl(options, config, threads, scratch / f"trl{threads}"))
    for env_iterations in options.env_iterations:
        console.rule(f"megatron_ztrl, N = {env_iterations}")
        directory = scratch / f"ours{env_iterations}"
        run = [f"run.directory={directory}", f"rollout.env_iterations={env_iterations}"]
        if code := ztrl(["train", str(CONFIG), *overrides, *run]):
            raise SystemExit(code)
        ours.append(measured_run(directory, env_iterations, options.warm_up))
    return Round(theirs=theirs, ours=ours)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="the first of the steps, not counted")
    parser.add_argument("--prompts", type=int, default=16, help="per step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=96, help="the most, tool replies included")
    parser.add_argument("--natural-lengths", action="store_true", help="let the policy end its completions")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--trl-threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--env-iterations", type=int, nargs="+", default=[0, 2], help="of our side; 0 is TRL's task"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration of our side")
    options = parser.parse_args()
    if not 0 <= options.warm_up < options.steps:
        parser.error("--warm-up must leave a step to count")
    return options


def _setting(options: argparse.Namespace, scratch: Path) -> tuple[list[str], Config]:
    """The overrides that every run of ours gets, and the configuration they make."""
    overrides = [
        *OUR_LAYOUT,
        f"train.num_steps={options.steps}",
        f"rollout.groups_per_step={options.prompts}",
        f"rollout.group_size={options.group_size}",
        f"rollout.max_response_tokens={options.completion_tokens}",
        "algorithm.minibatches=1",
        "actor.learning_rate=1.0e-6",  # the policy stays what it is
        "actor.warmup_steps=0",
        "eval.interval_steps=0",
        "checkpoint.export_hf=false",
        *options.overrides,
    ]
    config = load_config(CONFIG, [*overrides, f"run.directory={scratch}"])
    if not options.natural_lengths:
        policy = scratch / "policy"
        copy_without_end(Path(config.model.path), policy)
        overrides.append(f"model.path={policy}")
        config = load_config(CONFIG, [*overrides, f"run.directory={scratch}"])
    return overrides, config


def copy_without_end(policy: Path, target: Path) -> None:
    """Copies a checkpoint; the copy's end-of-sequence token is one of the unused rows of its vocabulary.

    Raises:
        ValueError: The vocabulary has no unused row.
    """
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(policy, target)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    tokenizer.add_special_tokens({"eos_token": NEVER_SAMPLED})
    vocab_size = json.loads((target / "config.json").read_text())["vocab_size"]
    if tokenizer.eos_token_id >= vocab_size:
        raise ValueError(f"{policy}: all {vocab_size} tokens are in use; compare with --natural-lengths")
    tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(values | {"eos_token_id": tokenizer.eos_token_id}, indent=2))


def measure_trl(options: argparse.Namespace, config: Config, threads: int, directory: Path) -> Measurement:
    """Runs TRL in a process of its own.

    Raises:
        subprocess.CalledProcessError: It failed; its output has been printed.
    """
    directory.mkdir()
    spec = {
        "policy": config.model.path,
        "prompts": _prompts(config),
        "steps": config.train.num_steps,
        "prompts_per_step": config.rollout.groups_per_step,
        "group_size": config.rollout.group_size,
        "completion_tokens": config.rollout.max_response_tokens,
        "learning_rate": config.actor.learning_rate,
        "temperature": config.rollout.temperature,
        "seed": config.run.seed,
        "scratch": str(directory),
        "shared_packages": sysconfig.get_path("purelib"),
    }
    spec_path, result_path = directory / "spec.json", directory / "result.json"
    spec_path.write_text(json.dumps(spec))
    subprocess.run(
        [options.trl_python, TRL_PROGRAM, spec_path, result_path],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    result = json.loads(result_path.read_text())
    steps = result["steps"][options.warm_up :]
    step_seconds = fmean(step["seconds"] for step in steps)
    tokens = fmean(step["completion_tokens"] for step in steps)
    return Measurement(
        side=f"TRL, {threads} threads" if threads > 1 else "TRL, 1 thread",
        steps=len(steps),
        completion_tokens_per_step=tokens,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        versions=result["versions"],
    )


def _prompts(config: Config) -> list[dict[str, str]]:
    """The prompts that our loop draws, in its order."""
    prompts = load_prompts(config.data.train, get_template(config.data.prompt_template).render)
    source = PromptSource(
        prompts,
        seed=config.run.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        tokenize=PolicyTokenizer(Path(config.model.path)).encode,
    )
    count = config.train.num_steps * config.rollout.groups_per_step
    return [{"prompt": prompt.text, "answer": prompt.ground_truth} for prompt in islice(source, count)]


def measured_run(directory: Path, env_iterations: int, warm_up: int) -> Measurement:
    """Reads a run of ours. The step counts from one row to the next, so nothing of the loop is left out."""
    rows: list[dict[str, Any]] = list(read_rows(directory / names.METRICS_FILE))
    starts, counted = [0.0, *(row[names.WALL_SECONDS] for row in rows)], rows[warm_up:]
    step_seconds = (starts[-1] - starts[warm_up]) / len(counted)
    tokens = fmean(row[names.THROUGHPUT_TOKENS] * row[names.TIME_STEP] for row in counted)
    return Measurement(
        side=f"megatron_ztrl, multi-turn (N = {env_iterations})"
        if env_iterations
        else "megatron_ztrl, single-turn",
        steps=len(counted),
        completion_tokens_per_step=tokens,
        step_seconds=step_seconds,
        tokens_per_second=tokens / step_seconds,
        phase_shares={
            phase: fmean(row[phase] for row in counted) / step_seconds for phase in names.TIME_PHASES
        },
    )


def print_table(console: Console, title: str, sides: Round) -> None:
    table = Table("side", title=f"completion tokens per second of the whole loop, {title}")
    for column in ("steps", "tokens/step", "s/step", "tokens/s", "of TRL's best"):
        table.add_column(column, justify="right")
    for side in (*sides.theirs, *sides.ours):
        table.add_row(
            side.side,
            str(side.steps),
            f"{side.completion_tokens_per_step:,.0f}",
            f"{side.step_seconds:.2f}",
            f"{side.tokens_per_second:,.0f}",
            "" if sides.best_of_trl is None else f"{side.tokens_per_second / sides.best_of_trl:.2f}x",
        )
    console.print(table)
    for side in sides.ours:
        shares = ", ".join(
            f"{phase.removeprefix('time/').removesuffix('_seconds')} {share:.0%}"
            for phase, share in side.phase_shares.items()
        )
        console.print(f"{side.side}: {shares}")


def print_ratios(console: Console, rounds: list[Round]) -> None:
    """Ours over TRL's best of the same round."""
    for place, side in enumerate(rounds[0].ours):
        ratios = [
            sides.ours[place].tokens_per_second / sides.best_of_trl for sides in rounds if sides.best_of_trl
        ]
        if ratios:
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            console.print(
                f"{side.side}: {median(ratios):.2f}x of TRL's best, median of {len(ratios)} rounds ({spread})"
            )


if __name__ == "__main__":
    sys.exit(main())
