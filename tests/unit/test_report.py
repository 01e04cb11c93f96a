"""The report says what the run's files say, and needs nothing but itself to be read."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from megatron_ztrl import __version__
from megatron_ztrl.config.schema import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.observability.report import write_report
from megatron_ztrl.observability.report.figures import _smooth
from megatron_ztrl.observability.report.runs import load_run
from megatron_ztrl.observability.report.style import RC, LineLabel, label_lines, new_figure, number_axis
from megatron_ztrl.observability.report.summary import summarize
from megatron_ztrl.observability.run_info import write_run_info

MEASURES = ("accuracy", "code_proportion", "code_ratio", "written_calls", "response_tokens")


def train_row(step: int, **measures: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "split": "train", "wall_seconds": 10.0 * step}
    row |= {f"train/{key}": value for key, value in measures.items()}
    return row | {"time/generate_seconds": 3.0, "time/train_seconds": 1.0, "loss/entropy": 0.5}


GOOD_ROW = json.dumps(train_row(1, accuracy=0.5)) + "\n"


def eval_row(step: int, n: int, **datasets: tuple[float, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "split": "eval",
        "env_iterations": n,
        "wall_seconds": 10.0 * step + 1,
    }
    for name, values in datasets.items():
        row |= {f"eval/{name}/{measure}": value for measure, value in zip(MEASURES, values, strict=True)}
    return row


def rollout_row(step: int, text: str, tool: str | None = None) -> dict[str, Any]:
    segments = [{"author": "model", "text": text}] + ([{"author": "tool", "text": tool}] if tool else [])
    return {
        "step": step,
        "split": "eval",
        "env_iterations": 2,
        "rollout_id": "r",
        "prompt_id": "p0",
        "data_source": "math",
        "problem": "What is 1 < 2?",
        "ground_truth": "1",
        "reward": float(tool is not None),
        "stop_reason": "stop",
        "executed_calls": int(tool is not None),
        "response_tokens": 7,
        "segments": segments,
    }


def write(
    directory: Path, metrics: list[Mapping[str, Any]], rollouts: list[Mapping[str, Any]], n: int = 2
) -> Path:
    write_run_info(
        Config(
            run=RunConfig(directory=str(directory)),
            model=ModelConfig(path="org/tiny-base"),
            data=DataConfig(train=DatasetConfig(name="sums", path="org/data")),
            train=TrainConfig(num_steps=2),
            rollout=RolloutConfig(env_iterations=n),
        )
    )
    for name, rows in (("metrics.jsonl", metrics), ("rollouts.jsonl", rollouts)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = {"math": (0.1, 0.2, 0.2, 0.3, 10.0), "amc": (0.3, 0.4, 0.4, 0.5, 30.0)}
    after = {"math": (0.8, 0.9, 1.5, 1.6, 50.0), "amc": (0.6, 0.7, 1.1, 1.2, 70.0)}
    nothing = {"math": (0.0, 0.0, 0.0, 1.0, 10.0), "amc": (0.0, 0.0, 0.0, 1.0, 10.0)}
    measures = dict.fromkeys(MEASURES, 0.5)
    return write(
        tmp_path_factory.mktemp("runs") / "run",
        [
            eval_row(0, 0, **nothing),
            eval_row(0, 2, **before),
            train_row(1, **measures),
            train_row(2, **measures),
            eval_row(2, 0, **nothing),
            eval_row(2, 2, **after),
        ],
        [rollout_row(0, "guess"), rollout_row(2, "```python\nprint(1<2)\n```", "<script>alert(1)</script>")],
    )


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [eval_row(0, 0, math=(0.0,) * 5), train_row(1, **dict.fromkeys(MEASURES, 0.0))]
    last = eval_row(1, 0, math=(0.05, 0.0, 0.0, 0.25, 12.0))
    return write(tmp_path_factory.mktemp("runs") / "no-tool", [*rows, last], [], n=0)


@pytest.fixture(scope="module")
def page(run: Path, control: Path) -> str:
    """The report on ``run``, written once for the tests that only read it."""
    return write_report([run], control=control).read_text()


def test_the_summary_averages_over_data_sets_at_the_runs_own_n(run: Path, page: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["accuracy"] == pytest.approx(0.2)
    assert summary["after"]["accuracy"] == pytest.approx(0.7)
    assert summary["after"]["code_proportion"] == pytest.approx(0.8)
    assert summary["after"]["code_ratio"] == pytest.approx(1.3)
    assert summary["after"]["written_calls"] == pytest.approx(1.4)
    assert summary["after"]["response_tokens"] == pytest.approx(60.0)
    assert (summary["after"]["step"], summary["after"]["env_iterations"]) == (2, 2)
    assert summary["after"]["by_env_iterations"]["0"]["accuracy"] == 0.0
    assert summary["after"]["by_dataset"]["amc"]["accuracy"] == 0.6
    assert summary["control_no_tool"]["accuracy"] == 0.05
    assert summary["control_no_tool"]["written_calls"] == 0.25
    assert summary["wall_seconds"] == 21.0


def test_a_run_without_evaluation_has_a_report_and_no_before_or_after(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", [train_row(1, **dict.fromkeys(MEASURES, 0.5))], [])
    write_report([directory])
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["before"], summary["after"], summary["steps"]) == (None, None, 1)


def test_a_run_that_was_only_evaluated_has_a_before(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", [eval_row(0, 2, math=(0.1, 0.2, 0.2, 0.3, 10.0))], [])
    summary = summarize(load_run(directory), None)
    assert summary["before"]["accuracy"] == 0.1
    assert summary["after"] is None


class _References(HTMLParser):
    """Everything a browser would have to load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
                self.found.append(f"{tag} {name}={value}")


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    references = _References()
    references.feed(page)
    assert references.found == []
    assert "script" not in references.tags
    assert not re.search(r"@import|url\((?!#)", page)


def test_ids_of_figures_on_one_page_do_not_meet(page: str) -> None:
    definitions = re.findall(r'<(?:path|clipPath|marker)[^>]*\bid="([^"]+)"', page)
    assert len(definitions) == len(set(definitions)) > 0


def test_every_figure_is_also_a_png(run: Path, page: str) -> None:
    names = {path.stem for path in (run / "figures").glob("*.png")}
    assert names == {"learning", "env_iterations", "time", "stability"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").glob("*.png"))


def test_one_n_is_no_curve(tmp_path: Path) -> None:
    values = (0.1, 0.2, 0.2, 0.3, 10.0)
    rows = [eval_row(0, 2, math=values), train_row(1, accuracy=0.5), eval_row(1, 2, math=values)]
    page = write_report([write(tmp_path / "run", rows, [])]).read_text()
    assert "What the tool is worth" not in page
    assert not (tmp_path / "run" / "figures" / "env_iterations.png").exists()


def test_tool_replies_are_marked_and_what_a_model_wrote_is_escaped(page: str) -> None:
    assert '<span class="tool">&lt;script&gt;alert(1)&lt;/script&gt;</span>' in page
    assert '<span class="model">```python\nprint(1&lt;2)\n```</span>' in page
    assert "What is 1 &lt; 2?" in page


def test_the_resolved_configuration_is_on_the_page(page: str) -> None:
    assert "groups_per_step: 128" in page


def test_a_step_repeated_after_a_resume_counts_as_it_was_done_last(tmp_path: Path) -> None:
    rows = [train_row(1, accuracy=0.1), train_row(2, accuracy=0.2), train_row(2, accuracy=0.9)]
    assert load_run(write(tmp_path / "run", rows, [])).series("train/accuracy") == ([1, 2], [0.1, 0.9])


def test_the_bold_line_is_a_trailing_mean_over_a_twentieth_of_the_run() -> None:
    values = [float(step) for step in range(40)]
    assert _smooth(values)[:3].tolist() == [0.0, 0.5, 1.5]
    assert _smooth([3.0, 5.0]).tolist() == [3.0, 5.0]


def test_labels_of_lines_that_end_together_are_moved_apart_and_others_stay() -> None:
    axes = new_figure(4, 3).subplots()
    axes.set_ylim(0, 1)
    label_lines(axes, [LineLabel(y=y, text=str(y), color=RC["text.color"]) for y in (1.0, 0.99, 0.0)])
    heights = {text.get_text(): text.xy[1] for text in axes.texts}  # type: ignore[attr-defined]
    assert heights["0.0"] == 0.0
    assert heights["1.0"] == 1.0
    assert heights["0.99"] == pytest.approx(1.0 - 0.085)


@pytest.mark.parametrize("content", [None, ""])
def test_a_directory_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_report([tmp_path])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "run: {dir", r"config.yaml: damaged: .*expected"),
        ("environment.json", '{"a": ', r"environment.json: damaged: Expecting value"),
        ("config.yaml", "- run\n", r"config.yaml: damaged: holds no keys"),
        ("environment.json", "[]", r"environment.json: damaged: holds no keys"),
        ("config.yaml", b"\xff\xfe", r"config.yaml: damaged: 'utf-8' codec can't decode"),
        ("metrics.jsonl", b"\xff\xfe\n", r"metrics.jsonl: not a file of JSON rows: 'utf-8' codec"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics.jsonl:1: not the metrics of a run"),
        ("metrics.jsonl", '{"step": 1, "split": "train"}\n', r"metrics.jsonl:1: not the metrics of a run"),
        ("metrics.jsonl", "[1]\n", r"metrics.jsonl:1: not the metrics of a run"),
        ("metrics.jsonl", GOOD_ROW.replace("0.5", '"a"'), r"metrics.jsonl:1: not the metrics of a run"),
        ("metrics.jsonl", GOOD_ROW.replace("train", "eval", 1), r"metrics.jsonl:1: not the metrics of a run"),
        ("rollouts.jsonl", '{"prompt": "of another project"}\n', r"rollouts.jsonl:1: not rollouts of a run"),
    ],
)
def test_a_file_that_is_no_runs_is_named(
    tmp_path: Path, file: str, content: str | bytes, message: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD_ROW)
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as caught:
        write_report([tmp_path])
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("config", ["", "trainer: {nnodes: 1}\n", "rollout: 3\nmodel: [a]\n"])
def test_a_run_whose_configuration_is_of_another_version_has_a_report_all_the_same(
    tmp_path: Path, config: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD_ROW)
    if config:
        (tmp_path / "config.yaml").write_text(config)
    assert "</html>" in write_report([tmp_path]).read_text()


def test_a_control_that_has_used_the_tool_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = [train_row(1, **dict.fromkeys(MEASURES, 0.5))]
    directory, other = write(tmp_path / "run", rows, []), write(tmp_path / "other", rows, [], n=2)
    with pytest.raises(ValueError, match=r"--control: .*/other was trained with the tool .*env_iterations=2"):
        write_report([directory], control=other)
    assert not (directory / "figures").exists()


def test_a_report_on_a_run_of_others_says_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "run", [train_row(1, accuracy=0.5)], [])

    def refuse(source: str, target: Path) -> None:  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"figures/.*\.png: no permission to write the report"):
        write_report([directory])


def test_the_page_begins_with_what_was_learned_and_what_was_run(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert (
        "Accuracy on math and amc with at most 2 tool calls per rollout: 20.0% before training, 70.0% after 2 steps; "
        "5.0% for the control, which was trained without the tool."
    ) in text
    assert "steps 2 of 2" in text
    assert f"megatron_ztrl {__version__}" in text
    assert "control, no tool 5.0%" in text
    assert "math, control 0" in text


def test_a_report_in_the_middle_of_a_run_says_so(tmp_path: Path) -> None:
    row = train_row(1, **dict.fromkeys(MEASURES, 0.5))
    text = write_report([write(tmp_path / "run", [row], [])]).read_text()
    assert "<dd>1 of 2</dd>" in text


def test_the_way_to_repeat_a_run_can_be_pasted_into_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["ztrl", "train", "my run.yaml", "eval.env_iterations=[0, 4]"]
    monkeypatch.setattr(sys, "argv", command)
    directory = write(tmp_path / "a run", [train_row(1, accuracy=0.5)], [])
    page = html.unescape(write_report([directory]).read_text())
    commands = [shlex.split(line) for line in re.findall(r'<pre class="command">(.*)</pre>', page)]
    assert commands == [["ztrl", "train", f"{directory}/config.yaml", "run.directory=runs/again"], command]


@pytest.mark.parametrize(
    ("reward", "text"),
    [(1.0, "correct"), (0.0, "wrong (it is 1)"), (0.25, "reward 0.25 (it is 1)"), (None, "not scored")],
)
def test_a_rollout_is_right_wrong_between_or_not_scored(
    tmp_path: Path, reward: float | None, text: str
) -> None:
    rows = [train_row(step, accuracy=0.5) for step in (1, 2)]
    rollouts = [rollout_row(step, "guess") | {"reward": reward} for step in (1, 2)]
    page = write_report([write(tmp_path / "run", rows, rollouts)]).read_text()
    assert re.findall(r"</span>\s*<span[^>]*>([^<]*)</span>\s*</header>", page) == [text, text]


@pytest.mark.parametrize(
    ("values", "unit", "shown", "ticks"),
    [
        ([0.0, 5e-5], "nats", "10⁻⁵ nats", {5e-5: "5", 2.5e-5: "2.5"}),
        ([0.0, 0.004], "", "10⁻³", {0.004: "4"}),
        ([0.0, 0.004], "%", "", {0.004: "0.4%"}),
        ([0.0, 0.5], "nats", "nats", {0.25: "0.25"}),
        ([0.0, 24000.0], "per second", "per second", {10000.0: "10,000", 20.5: "20.5"}),
    ],
)
def test_numbers_at_an_axis_are_short_and_keep_their_unit(
    values: list[float], unit: str, shown: str, ticks: dict[float, str]
) -> None:
    axes = new_figure(4, 3).subplots()
    assert number_axis(axes, max(values), unit) == shown
    format_tick = axes.yaxis.get_major_formatter()
    assert {value: format_tick(value, 0) for value in ticks} == ticks
