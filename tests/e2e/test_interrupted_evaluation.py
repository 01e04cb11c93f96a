"""Ctrl-C while a policy is evaluated: every N that was finished is kept."""

import json
import signal

import pytest
from running import LIMIT_SECONDS, QUICKSTART, assert_nothing_left, ztrl


@pytest.mark.slow
def test_an_interrupted_evaluation_keeps_what_it_has_finished(tmp_path, marker):
    run = tmp_path / "run"
    options = ("eval.env_iterations=[0,2]", "eval.samples_per_prompt=4")
    process = ztrl("eval", str(QUICKSTART), f"run.directory={run}", *options)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("N = 0 "):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=LIMIT_SECONDS) == 130, lines + [rest]
    results = json.loads((run / "eval.json").read_text())
    assert list(results) == ["0"]
    assert results["0"]["arithmetic_held_out/response_tokens"] > 0
    assert_nothing_left(marker)
