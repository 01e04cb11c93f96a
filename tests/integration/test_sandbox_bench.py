"""``ztrl-sandbox bench`` from the command line, over a real executor."""

import json
import subprocess
import sys

import pytest
from sandbox_server import ENVIRONMENT, executor_with
from ztrl_sandbox.bench.floor import forks_per_second


def bench(seconds: float, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ztrl_sandbox", "bench", "--seconds", str(seconds)]
    command += ["--concurrency", "1", "32", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


# The endless loops of the mixed load must have printed in a quarter of a second.
@pytest.mark.alone
@pytest.mark.slow
def test_it_starts_an_executor_measures_every_load_and_judges(tmp_path):
    outcome = bench(1.0, "--workers", "2", "--json", str(tmp_path / "figures.json"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["load"], row["concurrency"]) for row in figures["rows"]] == [
        *(("trivial", 1), ("trivial", 32), ("sympy", 1), ("sympy", 32), ("mixed", 1), ("mixed", 32))
    ]
    assert all((row["wrong"], row["lost"]) == (0, 0) for row in figures["rows"])
    assert all(0 < row["run_p50_ms"] <= row["call_p50_ms"] <= row["call_p99_ms"] for row in figures["rows"])
    for row in figures["rows"]:
        assert row["server_cpu_ms_per_call"] < row["executor_cpu_ms_per_call"]
        beside_floor = (row["load"], row["concurrency"]) == ("trivial", 32)
        assert row["forks_per_second"] > 1 if beside_floor else row["forks_per_second"] is None
    assert "times bare fork + exit" in outcome.stdout
    assert "2 workers, preload math,sympy,numpy" in outcome.stdout
    assert "lost calls" in outcome.stdout and "MISSED" not in outcome.stdout.splitlines()[-1]


@pytest.mark.alone
@pytest.mark.slow
def test_it_drives_a_server_of_either_protocol():
    with executor_with("auto", "--workers", "2", "--preload", "math,sympy") as executor:
        for protocol in ("native", "sandboxfusion"):
            outcome = bench(0.3, "--url", executor.url, "--protocol", protocol, "--load", "trivial", "mixed")
            assert outcome.returncode == 0, outcome.stdout + outcome.stderr
            assert "bare fork + exit" not in outcome.stdout  # another machine's floor is not this one's


def test_the_floor_is_measured_in_processes_with_the_modules_loaded():
    assert forks_per_second(["math"], forkers=2, seconds=1.0) > 1
    with pytest.raises(subprocess.CalledProcessError):
        forks_per_second(["no_such_module"], forkers=1, seconds=0.1)
