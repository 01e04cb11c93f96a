"""Progress is readable with and without a terminal."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_ztrl.observability import names
from megatron_ztrl.observability.progress import Progress, format_duration

METRICS = {
    names.TRAIN_REWARD: 0.5,
    names.TRAIN_ACCURACY: 0.5,
    names.TRAIN_CODE_PROPORTION: 0.25,
    names.THROUGHPUT_TOKENS: 1234.0,
    names.TIME_STEP: 2.0,
}


def test_without_a_terminal_each_phase_and_each_step_is_one_plain_line() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Progress(40, console=console) as progress:
        with progress.startup("engine 0"):
            pass
        progress.phase("generating")
        progress.step(10, METRICS)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "engine 0 ..."
    assert lines[1].startswith("engine 0: ready in 0.")
    assert lines[2:] == [
        "step 10/40  reward 0.500  accuracy 50.0%  code 25.0%  tokens/s 1,234  2.0 s/step  1:00 left"
    ]


def test_on_a_terminal_the_display_shows_the_step_the_phase_and_the_last_reward() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress(40, console=console) as progress:
        progress.phase("publishing weights")
        progress.step(10, METRICS)
        assert progress._live is not None
        progress._live.refresh()
        progress.note("a note")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("step 10/40", "publishing weights", "reward 0.500", "a note"):
        assert shown in text


def test_the_time_left_follows_the_last_ten_steps_only() -> None:
    progress = Progress(100, console=Console(file=io.StringIO()))
    assert progress.eta_seconds() is None
    for step in range(1, 21):
        progress.step(step, {names.TIME_STEP: 100.0 if step <= 10 else 3.0})
    assert progress.eta_seconds() == pytest.approx(80 * 3.0)


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"TERM": "dumb"}, {}])
def test_a_log_file_never_gets_control_characters(environment: dict[str, str]) -> None:
    program = (
        "from megatron_ztrl.observability.progress import Progress\n"
        "with Progress(2) as progress:\n"
        "    with progress.startup('Ray'): pass\n"
        "    progress.phase('rollouts'); progress.count(1, 4)\n"
        "    progress.step(1, {'train/reward': 0.5}); progress.note('[a/b] https://c')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    first, second, *rest = done.stderr.splitlines()
    assert first == "Ray ..." and re.fullmatch(r"Ray: ready in \d+\.\d s", second)
    assert rest == ["step 1/2  reward 0.500", "[a/b] https://c"]


def test_a_dumb_terminal_gets_the_lines_of_a_file() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Progress(2, console=console) as progress:
        progress.step(1, {names.TRAIN_REWARD: 0.5})
    assert "step 1/2  reward 0.500" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_display_says_how_many_of_a_phase_are_done_until_the_next_one_begins() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, _environ={})
    with Progress(4, unit="evaluation", console=console) as progress:
        assert progress._live is not None
        progress.phase("evaluating at N = 2")
        progress.count(37, 256)
        progress._live.refresh()
        progress.resume(1)
        progress.phase("evaluating at N = 4")
        progress._live.refresh()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluation 0/4" in text and "evaluating at N = 2 37/256" in text
    assert "evaluation 1/4" in text and "evaluating at N = 4 " in text
    assert "N = 4 37/256" not in text


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (60, "1:00"), (187, "3:07"), (7387, "2:03:07")])
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
