"""Importing the package, or asking for help, loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "megatron", "sglang", "transformers", "matplotlib", "numpy"}
SCRIPT = """
import json, sys, time
start = time.process_time()
{statement}
print(json.dumps([time.process_time() - start, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def measure(statement: str, repeats: int = 5) -> tuple[float, set[str]]:
    """The least processor time of some runs, since the machine may be busy, and the top-level modules loaded."""
    best_seconds, modules = float("inf"), set[str]()
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(statement=statement)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, names = json.loads(done.stdout.splitlines()[-1])
        best_seconds, modules = min(best_seconds, seconds), set(names)
    return best_seconds, modules


@pytest.mark.alone
def test_importing_the_package_takes_less_than_a_third_of_a_second() -> None:
    seconds, modules = measure("import megatron_ztrl, megatron_ztrl.types, megatron_ztrl.config.schema")
    assert seconds <= 0.3
    assert not modules & HEAVY


@pytest.mark.alone
def test_help_takes_less_than_a_third_of_a_second() -> None:
    statement = (
        "import contextlib, megatron_ztrl.cli as c\nwith contextlib.suppress(SystemExit): c.main(['--help'])"
    )
    seconds, modules = measure(statement)
    assert seconds <= 0.3
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "module", ["config.load", "config.native", "observability.metrics", "observability.progress", "doctor"]
)
def test_configuration_and_observability_load_without_the_heavy_packages(module: str) -> None:
    _, modules = measure(f"import megatron_ztrl.{module}", repeats=1)
    assert not modules & HEAVY
