"""Fills ``templates/report.html.j2``."""

from __future__ import annotations

import dataclasses
import shlex
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
_SHOWN_VERSIONS = ("megatron_ztrl", "megatron-core", "sglang", "torch")
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
        headline=_headline(run, summary),
        tiles=_tiles(summary),
        headline_n=run.env_iterations,
        table=_table(run) + ([] if control is None else _control_lines(control)),
        measures=[label for label, _ in _TILES.values()],
        samples=_samples(run),
        facts=_facts(run),
        started_as=shlex.join(map(str, run.environment.get("command", []))),
        again=f"ztrl train {shlex.quote(str(run.directory / names.CONFIG_FILE))} run.directory=runs/again",
    )


def _headline(run: Run, summary: Mapping[str, Any]) -> str:
    """What the run did to the policy, in a sentence or two."""
    before, after, control = summary["before"], summary["after"], summary["control_no_tool"]
    if not (before and after and names.ACCURACY in before and names.ACCURACY in after):
        return ""
    text = (
        f"Accuracy on {' and '.join(after['by_dataset'])} with at most {after[names.ENV_ITERATIONS]} tool calls"
        f" per rollout: {before[names.ACCURACY]:.1%} {_before(before)},"
        f" {after[names.ACCURACY]:.1%} after {after[names.STEP]} steps"
    )
    if control and names.ACCURACY in control:
        text += f"; {control[names.ACCURACY]:.1%} for the control, which was trained without the tool"
    return f"{text}."


def _before(evaluation: Mapping[str, Any]) -> str:
    step = evaluation[names.STEP]
    return f"after {step} steps" if step else "before training"


def _tiles(summary: Mapping[str, Any]) -> list[Tile]:
    before, after, control = summary["before"], summary["after"], summary["control_no_tool"]
    if not (before and after):
        return []
    return [
        Tile(
            label=label,
            before=f"{_before(before)} {form.format(before[measure])}",
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


def _control_lines(control: Run) -> list[Line]:
    lines = [dataclasses.replace(line, dataset=f"{line.dataset}, control") for line in _table(control)]
    return [line for line in lines if line.env_iterations == 0]


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
    """What was run, on what: a few lines under the title."""
    done, planned = run.train[-1][names.STEP] if run.train else 0, run.setting("train.num_steps")
    facts = {
        "steps": f"{done} of {planned}" if planned else str(done),
        "wall time": format_duration(run.wall_seconds),
        "policy": Path(run.setting("model.path") or "").name,
        "problems": run.setting("data.train.name"),
        "rollouts per step": _rollouts_per_step(run),
        "N in training": run.setting("rollout.env_iterations"),
        "advantage": run.setting("algorithm.advantage"),
        "staleness": run.setting("rollout.max_staleness"),
        "actor": _layout(run),
        "engines": run.setting("engine.count"),
        "seed": run.setting("run.seed"),
        "started": run.environment.get("started_at", "").replace("T", " ").replace("+00:00", " UTC"),
        "machine": _machine(run.environment.get("machine") or {}),
        "versions": _versions(run.environment),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _rollouts_per_step(run: Run) -> str:
    groups, size = run.setting("rollout.groups_per_step"), run.setting("rollout.group_size")
    return f"{groups} groups × {size}" if groups and size else ""


def _layout(run: Run) -> str:
    sizes = {
        short: run.setting(f"actor.{name}_parallel_size")
        for short, name in (("TP", "tensor"), ("PP", "pipeline"), ("CP", "context"), ("DP", "data"))
    }
    return " × ".join(f"{short} {size}" for short, size in sizes.items() if size and size > 1) or "1 rank"


def _machine(machine: Mapping[str, Any]) -> str:
    gpus, cores = machine.get("gpus"), machine.get("cpu_count")
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB" if "memory_bytes" in machine else ""
    if gpus:
        return f"{len(gpus)} × {gpus[0]}"
    return f"{cores} CPU cores{memory}" if cores else ""


def _versions(environment: Mapping[str, Any]) -> str:
    found = environment.get("versions") or {}
    shown = [f"{name} {found[name]}" for name in _SHOWN_VERSIONS if found.get(name)]
    source = environment.get("source")
    if source:
        shown.append(f"commit {source['commit'][:10]}{' (modified)' if source['dirty'] else ''}")
    return ", ".join(shown)
