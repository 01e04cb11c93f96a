"""Fills ``templates/report.html.j2``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_ztrl.observability import names
from megatron_ztrl.observability.progress import format_duration
from megatron_ztrl.observability.report.figures import Drawn
from megatron_ztrl.observability.report.runs import Row, Run, datasets

_SHOWN_PROMPTS = 3
_TILES = {
    names.ACCURACY: ("Accuracy", "{:.1%}"),
    names.CODE_PROPORTION: ("Rollouts that execute code", "{:.1%}"),
    names.CODE_RATIO: ("Executed calls per rollout", "{:.2f}"),
    names.RESPONSE_TOKENS: ("Response tokens", "{:.0f}"),
}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number, before and after training, and without the tool."""

    label: str
    before: str
    after: str
    control: str | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the evaluation table."""

    dataset: str
    env_iterations: int
    cells: list[tuple[str, str]]
    """(before, after) of each measure."""


def render(
    run: Run, others: Sequence[Run], control: Run | None, summary: Mapping[str, Any], drawn: Sequence[Drawn]
) -> str:
    """The whole page, with nothing to load from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        others=others,
        control=control,
        figures={figure.name: figure.svg for figure in drawn},
        tiles=_tiles(summary),
        headline_n=run.env_iterations,
        table=_table(run),
        measures=[label for label, _ in _TILES.values()],
        samples=_samples(run),
        facts=_facts(run),
    )


def _tiles(summary: Mapping[str, Any]) -> list[Tile]:
    before, after, control = summary["before"], summary["after"], summary["control_no_tool"]
    if not (before and after):
        return []
    return [
        Tile(
            label=label,
            before=form.format(before[measure]),
            after=form.format(after[measure]),
            control=form.format(control[measure]) if control and measure in control else None,
        )
        for measure, (label, form) in _TILES.items()
        if measure in before and measure in after
    ]


def _table(run: Run) -> list[Line]:
    """Before and after of every data set at every N that was evaluated at both ends."""
    if len(run.evaluated_steps) < 2:
        return []
    first, last = run.evaluated_steps[0], run.evaluated_steps[-1]
    return [
        Line(dataset=dataset, env_iterations=n, cells=_cells(run, (first, last), n, dataset))
        for dataset in datasets(run.evaluations[last, run.env_iterations_at(last)[0]])
        for n in run.env_iterations_at(last)
    ]


def _cells(run: Run, ends: tuple[int, int], n: int, dataset: str) -> list[tuple[str, str]]:
    before, after = (run.evaluation(step, n, dataset) or {} for step in ends)
    return [
        (_show(before, measure, form), _show(after, measure, form)) for measure, (_, form) in _TILES.items()
    ]


def _show(values: Mapping[str, float], measure: str, form: str) -> str:
    return form.format(values[measure]) if measure in values else "–"


def _samples(run: Run) -> list[tuple[Row, Row]]:
    """The same prompts before and after training: evaluated ones where there are any, else trained ones.

    A prompt whose later rollout ran code comes first: it shows what was learned.
    """
    for split in (names.EVAL, names.TRAIN):
        rows = [row for row in run.rollouts if row[names.SPLIT] == split]
        steps = sorted({row[names.STEP] for row in rows})
        if len(steps) < 2:
            continue
        before, after = (_by_prompt(rows, step, run.env_iterations) for step in (steps[0], steps[-1]))
        # Training draws new prompts each step: then unlike prompts are shown beside each other.
        shared = [(before[key], after[key]) for key in before if key in after]
        pairs = shared or list(zip(before.values(), after.values(), strict=False))
        return sorted(pairs, key=lambda pair: -pair[1]["executed_calls"])[:_SHOWN_PROMPTS]
    return []


def _by_prompt(rows: Sequence[Row], step: int, n: int | None) -> dict[str, Row]:
    """One rollout per prompt at a step, at the run's own N where that was sampled."""
    at_step = [row for row in rows if row[names.STEP] == step]
    wanted = [row for row in at_step if row[names.ENV_ITERATIONS] == n] or at_step
    return {row["prompt_id"]: row for row in reversed(wanted)}


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, in a line or two under the title."""
    config, machine = run.config, run.environment.get("machine", {})
    facts = [("steps", str(run.train[-1][names.STEP] if run.train else 0))]
    facts.append(("wall time", format_duration(run.wall_seconds)))
    if config:
        rollout = config["rollout"]
        facts += [
            ("policy", Path(config["model"]["path"]).name),
            ("problems", config["data"]["train"]["name"]),
            ("batch", f"{rollout['groups_per_step']} × {rollout['group_size']}"),
            ("N in training", str(rollout["env_iterations"])),
            ("advantage", config["algorithm"]["advantage"]),
            ("seed", str(config["run"]["seed"])),
        ]
    if machine:
        gpus = machine["gpus"]
        facts.append(("machine", f"{len(gpus)} × {gpus[0]}" if gpus else f"{machine['cpu_count']} CPU cores"))
    source = run.environment.get("source")
    if source:
        facts.append(("revision", source["commit"][:10] + (" (modified)" if source["dirty"] else "")))
    return facts
