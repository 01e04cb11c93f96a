"""The quickstart: trains the tiny base policy with the tool, trains a control without it, and reports both.

python examples/quickstart/run.py [--seed 0] [--directory runs/quickstart]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ztrl.cli import main as ztrl
from megatron_ztrl.observability.console import open_console, print_whole

CONFIG = Path(__file__).parent / "config.yaml"
CONTROL = (
    "rollout.env_iterations=0",
    "eval.env_iterations=[0]",
    "eval.interval_env_iterations=[]",
    "checkpoint.export_hf=false",
)
"""The same run without the tool."""


def main() -> int:
    options = _parse()
    directory = options.directory or _new_directory(Path("runs/quickstart"))
    control = directory / "control_no_tool"
    console = open_console()
    seed = f"run.seed={options.seed}"
    for title, arguments in (
        ("with the tool", [f"run.directory={directory}", seed]),
        ("control: no tool", [f"run.directory={control}", seed, *CONTROL]),
    ):
        console.rule(f"training {title}")
        code = ztrl(["train", str(CONFIG), *arguments, *options.overrides, "--resume"])
        if code != 0:
            return code
    console.rule("report")
    code = ztrl(["report", str(directory), "--control", str(control)])
    if code == 0:
        _print_summary(console, directory)
    return code


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, help="default: a new one under runs/; an existing one is resumed"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides for both runs")
    return parser.parse_args()


def _new_directory(wanted: Path) -> Path:
    """``runs/quickstart``, or with the first number that is free."""
    directory, number = wanted, 1
    while directory.exists():
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
    return directory


def _print_summary(console: Console, directory: Path) -> None:
    summary = json.loads((directory / "summary.json").read_text())
    table = Table(title=f"{directory}/report.html")
    measures = ("accuracy", "code_proportion", "code_ratio", "response_tokens")
    for column in ("", *measures):
        table.add_column(column, justify="right" if column else "left")
    for row in ("before", "after", "control_no_tool"):
        if summary[row] is not None:  # with eval.interval_steps=0 nothing was evaluated
            table.add_row(row, *(f"{summary[row][measure]:.3f}" for measure in measures))
    print_whole(console, table)


if __name__ == "__main__":
    sys.exit(main())
