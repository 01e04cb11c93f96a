"""The quickstart once for each seed, and its results over all of them: mean (least–most).

A seed takes some four minutes. Run again, it goes on with the first seed that is not finished, whose time is then that
of the rest.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--directory runs/quickstart_seeds] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from megatron_ztrl.observability.console import open_console, print_whole

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "run.py"
COLUMNS = ("before", "after", "control_no_tool")
PERCENTAGES = {"accuracy": "accuracy", "code_proportion": "responses that execute code"}
NUMBERS = {
    "code_ratio": "executed calls per response",
    "written_calls": "written code blocks per response",
    "response_tokens": "response tokens",
}
"""Key in ``summary.json`` → what stands in the table."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--directory", type=Path, default=Path("runs/quickstart_seeds"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides for all runs")
    options = parser.parse_args()
    summaries = [run(options.directory / f"seed{seed}", seed, options.overrides) for seed in options.seeds]
    console = open_console()
    print_whole(console, table(summaries))
    seconds = [summary["command_seconds"] for summary in summaries]
    console.print(f"the whole command, by seed: {', '.join(f'{value:.0f} s' for value in seconds)}")
    return 0


def run(directory: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """``summary.json`` of one run of the whole command, and how long that took; made only once."""
    result = directory / "quickstart_seeds.json"
    if not result.exists():
        started = time.monotonic()
        command = [sys.executable, str(QUICKSTART), *overrides]
        subprocess.run([*command, "--seed", str(seed), "--directory", str(directory)], check=True)
        summary = json.loads((directory / "summary.json").read_text())
        result.write_text(json.dumps(summary | {"command_seconds": time.monotonic() - started}))
    return json.loads(result.read_text())


def table(summaries: Sequence[dict[str, Any]]) -> Table:
    """A row for each measure at the N of training, then the accuracy at every other N."""
    iterations = summaries[0]["after"]["env_iterations"]
    made = Table(title=f"{len(summaries)} seeds, N = {iterations} (control: N = 0): mean (least–most)")
    for column in ("", *COLUMNS):
        made.add_column(column.replace("_", " "), justify="right" if column else "left")

    def add(title: str, *keys: str, percent: bool) -> None:
        cells = []
        for column in COLUMNS:
            found = [_find(summary[column], keys) for summary in summaries]
            values = [value for value in found if value is not None]
            cells.append(_spread(values, percent=percent) if values else "")
        made.add_row(title, *cells)

    for names, percent in ((PERCENTAGES, True), (NUMBERS, False)):
        for key, title in names.items():
            add(title, key, percent=percent)
    others = {int(n) for n in summaries[0]["after"]["by_env_iterations"]} - {iterations}
    for n in sorted(others, reverse=True):
        add(f"accuracy, N = {n}", "by_env_iterations", str(n), "accuracy", percent=True)
    return made


def _find(row: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        row = row.get(key) if row is not None else None
    return row


def _spread(values: Sequence[float], *, percent: bool) -> str:
    low, mean, high = (
        100 * value if percent else value for value in (min(values), fmean(values), max(values))
    )
    if percent:
        return f"{mean:.1f} % ({low:.1f}–{high:.1f})"
    return f"{mean:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
