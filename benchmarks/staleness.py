"""What staleness costs in learning, and what importance correction gives back: the quickstart, asynchronously.

Trains the quickstart's policy with the tool under each setting, on the same problems and with the same seed, and
evaluates it on the held-out problems every `--every` steps. One run at this size takes one to two minutes.

    python benchmarks/staleness.py [--steps 30] [--seeds 0] [--json FILE] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from megatron_ztrl.observability import names
from megatron_ztrl.observability.console import open_console, print_whole
from megatron_ztrl.observability.jsonl import read_rows

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "config.yaml"
ACCURACY = f"eval/arithmetic_held_out/{names.ACCURACY}"
SETTINGS = {
    "S = 0": ("rollout.max_staleness=0",),
    "S = 1": ("rollout.max_staleness=1",),
    **{
        f"S = 4, {correction}": ("rollout.max_staleness=4", f"algorithm.importance_correction={correction}")
        for correction in ("none", "truncate", "mask")
    },
}
"""What stands in the table → overrides."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    figures = []
    for setting, chosen in SETTINGS.items():
        for seed in options.seeds:
            overrides = [
                f"run.seed={seed}",
                f"train.num_steps={options.steps}",
                f"eval.interval_steps={options.every}",
                "eval.env_iterations=[2]",
                *chosen,
                *options.overrides,
            ]
            figures.append({"setting": setting, "seed": seed, **train(overrides)})
    print_whole(open_console(), table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def train(overrides: list[str]) -> dict[str, Any]:
    """One run in a process of its own; ``accuracy`` is by step."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "megatron_ztrl.cli", "train", str(CONFIG)]
        subprocess.run(
            [*command, f"run.directory={directory}", "checkpoint.export_hf=false", *overrides], check=True
        )
        rows = list(read_rows(Path(directory) / names.METRICS_FILE))
    steps = [row for row in rows if row[names.SPLIT] == names.TRAIN]
    return {
        "accuracy": {int(row[names.STEP]): row[ACCURACY] for row in rows if row[names.SPLIT] == names.EVAL},
        "worst_staleness": max(row[names.TRAIN_STALENESS_MAX] for row in steps),
        "stale_tokens": fmean(row.get(names.STALENESS_SHARE, 0.0) for row in steps),
        "cut_tokens": fmean(row.get(names.IMPORTANCE_CUT, 0.0) for row in steps),
        "step_seconds": fmean(row[names.TIME_STEP] for row in steps),
    }


def table(figures: list[dict[str, Any]]) -> Table:
    """A row for each run."""
    steps = list(figures[0]["accuracy"])
    made = Table(title="Accuracy on held-out problems, at most 2 calls")
    for column in ("", "seed", *(f"step {step}" for step in steps)):
        made.add_column(column, justify="right" if column else "left")
    for column in ("worst staleness", "stale tokens", "weights cut", "s/step"):
        made.add_column(column, justify="right")
    for run in figures:
        made.add_row(
            run["setting"],
            str(run["seed"]),
            *(f"{100 * run['accuracy'][step]:.1f} %" for step in steps),
            f"{run['worst_staleness']:.0f}",
            f"{100 * run['stale_tokens']:.0f} %",
            f"{100 * run['cut_tokens']:.2f} %",
            f"{run['step_seconds']:.2f}",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
