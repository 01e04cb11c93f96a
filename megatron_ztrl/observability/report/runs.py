"""Reads a run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import read_rows

Row = Mapping[str, Any]

_ROLLOUT_KEYS = (
    {names.STEP, names.SPLIT, names.ENV_ITERATIONS}
    | {"prompt_id", "problem", "ground_truth", "reward"}
    | {"executed_calls", "response_tokens", "segments"}
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run wrote down."""

    directory: Path
    train: list[Row]
    """One row per step, in order."""
    evaluations: dict[tuple[int, int], Row]
    """By step and N."""
    rollouts: list[Row]
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    def setting(self, path: str) -> Any:
        """A key of the configuration, such as ``rollout.group_size``; None where there is none."""
        found: Any = self.config
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one training metric; steps that lack it are left out."""
        rows = [row for row in self.train if key in row]
        return [row[names.STEP] for row in rows], [row[key] for row in rows]

    @cached_property
    def wall_seconds(self) -> float:
        """When the last row was written."""
        return max(
            (row[names.WALL_SECONDS] for row in [*self.train, *self.evaluations.values()]), default=0.0
        )

    @cached_property
    def evaluated_steps(self) -> list[int]:
        return sorted({step for step, _ in self.evaluations})

    @cached_property
    def env_iterations(self) -> int | None:
        """The N that stands for the run: the one it trained with if that was evaluated, else the largest."""
        evaluated = {n for _, n in self.evaluations}
        trained = self.setting("rollout.env_iterations")
        return trained if trained in evaluated else max(evaluated, default=None)

    def env_iterations_at(self, step: int) -> list[int]:
        """The values of N evaluated at a step."""
        return sorted(n for evaluated, n in self.evaluations if evaluated == step)

    def evaluation(self, step: int, n: int, dataset: str | None = None) -> dict[str, float] | None:
        """The measures of one evaluation: of a data set, or the mean over data sets."""
        row = self.evaluations.get((step, n))
        if row is None:
            return None
        chosen = [dataset] if dataset is not None else datasets(row)
        keys = {measure: [names.eval_key(name, measure) for name in chosen] for measure in names.MEASURES}
        return {
            measure: fmean(row[key] for key in found)
            for measure, wanted in keys.items()
            if (found := [key for key in wanted if key in row])
        }

    def evaluation_series(self, measure: str, n: int) -> tuple[list[int], list[float]]:
        """Steps and values of one measure at one N, as the mean over data sets."""
        found = [(step, self.evaluation(step, n)) for step in self.evaluated_steps]
        points = [(step, values[measure]) for step, values in found if values and measure in values]
        return [step for step, _ in points], [value for _, value in points]


def datasets(row: Row) -> list[str]:
    """The data sets an evaluation row speaks of."""
    suffix = f"/{names.ACCURACY}"
    return [
        key[len("eval/") : -len(suffix)] for key in row if key.startswith("eval/") and key.endswith(suffix)
    ]


def load_run(directory: str | Path) -> Run:
    """Reads what `ztrl train` wrote.

    Raises:
        ValueError: The directory holds no run, or a file of it is damaged.
    """
    directory = Path(directory).absolute()
    if not (directory / names.METRICS_FILE).exists():
        raise ValueError(
            f"{directory}: not a run directory (it has no {names.METRICS_FILE}, which ztrl train writes)"
        )
    rows = _rows(directory / names.METRICS_FILE, _is_of_metrics, "the metrics of a run")
    if not rows:
        raise ValueError(f"{directory}: the run has not finished a step yet")
    # A step that was repeated after a resume is taken as it was done last.
    train = {row[names.STEP]: row for row in rows if row[names.SPLIT] == names.TRAIN}
    config_text, config = _read(directory / names.CONFIG_FILE, yaml.safe_load)
    return Run(
        directory=directory,
        train=[train[step] for step in sorted(train)],
        evaluations=dict(_evaluations(rows)),
        rollouts=_rows(
            directory / names.ROLLOUTS_FILE, lambda row: row.keys() >= _ROLLOUT_KEYS, "rollouts of a run"
        ),
        config=config,
        config_text=config_text,
        environment=_read(directory / names.ENVIRONMENT_FILE, json.loads)[1],
    )


def _evaluations(rows: list[Row]) -> Iterator[tuple[tuple[int, int], Row]]:
    for row in rows:
        if row[names.SPLIT] == names.EVAL:
            yield (row[names.STEP], row[names.ENV_ITERATIONS]), row


def _rows(path: Path, is_right: Callable[[Any], bool], what: str) -> list[Row]:
    rows: list[Row] = list(read_rows(path))
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and is_right(row)):
            raise ValueError(f"{path}:{number}: not {what}")
    return rows


def _is_of_metrics(row: Row) -> bool:
    wanted = [names.STEP, names.WALL_SECONDS]
    if row.get(names.SPLIT) == names.EVAL:
        wanted.append(names.ENV_ITERATIONS)
    return names.SPLIT in row and all(
        isinstance(row.get(key), int | float) for key in (*wanted, *(key for key in row if "/" in key))
    )


def _read(path: Path, parse: Callable[[str], Any]) -> tuple[str, dict[str, Any]]:
    """Text and content of a file that holds a mapping; both are empty where there is none."""
    if not path.exists():
        return "", {}
    try:
        text = path.read_text("utf-8")
        content = parse(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged: holds no keys")
    return text, content
